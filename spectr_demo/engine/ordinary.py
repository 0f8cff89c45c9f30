"""What ordinary text tells, kept by layer and by expert, so that a library can change.

The metric of a layer's inputs is the base's. How an expert scores there is that expert's alone. So
of experts that stay everything stays, bit for bit, and ordinary text is read again for new ones
only. Certainty alone compares experts with each other. It is made again from what each one scored.

Axes: R ordinary prompts, N tokens, P projections of a bank, E experts, S calibrated scores.
"""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectr_demo.experts.adapters import Adapter
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.calibration import Calibration, Measurement, Statistics
from spectr_demo.routing.detection import Detector, Metric, certainty, mean_certainty, standing
from spectr_demo.routing.routers import calibrated_scores
from spectr_demo.routing.spectr import Score

Input = tuple[str, int]  # a layer's path, and which of its runs in a pass
_Expert = tuple[str, str]  # its name, and the digest of its files


@dataclass(frozen=True)
class Ordinary:
    """What ordinary text is like for a library. certainty: (R, E) of its prompts."""

    calibration: Calibration
    detectors: dict[ExpertBank, Detector]
    certainty: Tensor

    def standing(self, certainty: Tensor) -> Tensor:
        """Of requests' certainty (..., E), see `routing.detection.standing`."""
        return standing(certainty, self.certainty)


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What was measured of the experts at one bank.

    values: (2 S + 2 + R, P, E) float32 on the CPU. Mean and deviation of each calibrated score,
    those of the detector's score, and the detector's mean score in each prompt.
    """

    bank: ExpertBank
    metric: Metric
    values: Tensor

    @classmethod
    def of(
        cls,
        bank: ExpertBank,
        metric: Metric,
        inputs: Tensor,
        means_of: Callable[[Tensor], Tensor],
    ) -> "Heard":
        """inputs: (N, D_in) of ordinary text. means_of: (R, P, E) of the prompts from their tokens'
        scores (N, P, E)."""
        measurement = Measurement()
        measurement.add(bank, bank.project(inputs))
        calibration = measurement.calibration()
        found = Detector.standardised(bank, metric, inputs)
        of_scores = [each for score in calibrated_scores() for each in calibration.of(bank, score)]
        values = [*of_scores, found.mean, found.std, *means_of(found.scores(inputs))]
        return cls(bank=bank, metric=metric, values=torch.stack(values).cpu())


class OrdinaryText:
    """All that it has told so far about one base, and about the experts of its libraries.

    lock: held while it is read, so that several who need it read it once.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._metrics: dict[Input, Metric] = {}
        self._experts: dict[_Expert, dict[Input, Tensor]] = {}

    def is_unknown(self, library: ExpertLibrary) -> Tensor:
        """(E,) bool: the experts that are still to be measured."""
        return torch.tensor([_key(a) not in self._experts for a in library.adapters]).bool()

    def metric(self, bank: ExpertBank) -> Metric | None:
        """Of what the bank's layers read; None where that is not known."""
        found = (self._metrics.get(each) for each in _inputs(bank))
        return next((metric for metric in found if metric is not None), None)

    def add(self, library: ExpertLibrary, heard: Iterable[Heard]) -> None:
        """Keep what was measured of all unknown experts of a library."""
        is_unknown = self.is_unknown(library).tolist()
        new: list[dict[Input, Tensor]] = [{} for _ in library.adapters]
        for each in heard:
            inputs = _inputs(each.bank)
            self._metrics |= {key: each.metric for key in inputs if key not in self._metrics}
            for place, e in enumerate(each.bank.expert_ids.tolist()):
                # A copy, so that it does not keep the memory of the others.
                values = each.values[..., place].T.clone(memory_format=torch.contiguous_format)
                new[e] |= dict(zip(inputs, values, strict=True))
        for adapter, values_of, unknown in zip(library.adapters, new, is_unknown, strict=True):
            if unknown:
                self._experts[_key(adapter)] = values_of

    def keep(self, adapters: Iterable[Adapter]) -> None:
        """Forget all other experts."""
        kept = set(map(_key, adapters))
        with self.lock:  # not between an expert's measurement and its use
            self._experts = {key: values for key, values in self._experts.items() if key in kept}

    def of(self, library: ExpertLibrary) -> Ordinary:
        """For a library of which all experts are known."""
        num_scores = 2 * len(calibrated_scores())
        statistics: dict[tuple[ExpertBank, Score], Statistics] = {}
        detectors, by_layer, num_prompts = {}, {}, 0
        for bank in library.banks:
            metric = self.metric(bank)
            if metric is None:  # its layers never run
                continue
            experts = [_key(library.adapters[e]) for e in bank.expert_ids.tolist()]
            values = torch.stack(
                [
                    torch.stack([self._experts[expert][each] for expert in experts], dim=-1)
                    for each in _inputs(bank)
                ],
                dim=1,
            )  # (2 S + 2 + R, P, E)
            of_bank, prompts = values[: num_scores + 2].to(bank.A.device), values[num_scores + 2 :]
            for i, score in enumerate(calibrated_scores()):
                statistics[bank, score] = of_bank[2 * i], of_bank[2 * i + 1]
            detectors[bank] = Detector.of(bank, metric, of_bank[-2], of_bank[-1])
            by_layer[bank] = certainty(prompts)
            num_prompts = len(prompts)
        total = mean_certainty(by_layer, num_prompts, expert_layers(library))
        return Ordinary(Calibration(statistics), detectors, total)


def expert_layers(library: ExpertLibrary) -> Tensor:
    """(E,) float32: on how many linear layers each expert is."""
    num = torch.zeros(len(library.names))
    for bank in library.banks:
        num[bank.expert_ids] += len(bank.paths)
    return num


def _inputs(bank: ExpertBank) -> list[Input]:
    return [(path, bank.run) for path in bank.paths]


def _key(adapter: Adapter) -> _Expert:
    return adapter.name, adapter.sha256
