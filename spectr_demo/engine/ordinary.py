"""What ordinary text tells, kept by layer and by expert, so that a library can change.

The metric of a layer's inputs is the base's. How an expert scores there is that expert's alone. So
of experts that stay everything stays, bit for bit, and ordinary text is read again for new ones
only. Certainty alone compares experts with each other. It is made again from what each one scored.

Axes: R ordinary prompts, N tokens, P projections of a bank, E experts, S calibrated scores.
"""

import hashlib
import json
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from spectr_demo.base.loading import LoadedBase
from spectr_demo.experts.adapters import Adapter
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.experts.stacked import Packed
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.calibration import Calibration, Measurement, Statistics
from spectr_demo.routing.detection import Detector, Metric, certainty, mean_certainty, standing
from spectr_demo.routing.routers import calibrated_scores
from spectr_demo.routing.spectr import Score

logger = logging.getLogger(__name__)

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

    @classmethod
    def from_tensors(
        cls, bank: ExpertBank, tensors: Mapping[str, Tensor], num_prompts: int
    ) -> "Heard":
        """What `OrdinaryText.to_tensors` gave. Raises ValueError for tensors of other shapes."""
        (P, E, r), D_in = bank.singular_values.shape, bank.A.shape[1]
        k = tensors["damping"].numel() if "damping" in tensors else 0
        needed: dict[str, tuple[int, ...]] = {
            "values": (2 * len(calibrated_scores()) + 2 + num_prompts, P, E),
            "whitening": (P, E, r, r),
            "mean": (D_in,),
            "directions": (D_in, k),
            "damping": (k,),
            "scale": (),
        }
        found = {name: tuple(t.shape) for name, t in tensors.items() if t.dtype == torch.float32}
        if found != needed:
            raise ValueError(
                f"what a library on disk knows of ordinary text at {bank.paths[0]} has shapes "
                f"{found}, needed {needed}: pack it again"
            )
        metric = Metric(
            **{name: tensors[name] for name in ("mean", "directions", "damping", "scale")}
        )
        return cls(bank=bank, metric=metric, values=tensors["values"])


class _Part(NamedTuple):
    """What was measured at one input, of experts that were measured together.

    columns: of each expert in values (V, N), see `Heard`.
    """

    columns: Mapping[_Expert, int]
    values: Tensor

    def without_others(self, kept: set[_Expert]) -> "_Part":
        """Of fewer experts. The memory of the others is freed where they are the half of it."""
        columns = {expert: at for expert, at in self.columns.items() if expert in kept}
        if 2 * len(columns) > self.values.shape[1]:
            return _Part(columns, self.values)
        places = {expert: at for at, expert in enumerate(columns)}
        return _Part(places, self.values[:, list(columns.values())])


class OrdinaryText:
    """All that it has told so far about one base, and about the experts of its libraries.

    lock: held while it is read, so that several who need it read it once. prompts: the ordinary
    ones that experts were measured over; None before the first.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.prompts: Sequence[str] | None = None
        self._metrics: dict[Input, Metric] = {}
        self._known: set[_Expert] = set()
        self._parts: dict[Input, list[_Part]] = defaultdict(list)
        # Of banks of libraries on disk; of others it is made of their factors.
        self._whitening: WeakKeyDictionary[ExpertBank, Tensor] = WeakKeyDictionary()

    def is_unknown(self, library: ExpertLibrary) -> Tensor:
        """(E,) bool: the experts that are still to be measured."""
        return torch.tensor([_key(a) not in self._known for a in library.adapters]).bool()

    def metric(self, bank: ExpertBank) -> Metric | None:
        """Of what the bank's layers read, where they compute; None where that is not known."""
        found = (self._metrics.get(each) for each in _inputs(bank))
        return next((each.to(bank.A.device) for each in found if each is not None), None)

    def add(self, library: ExpertLibrary, heard: Iterable[Heard]) -> None:
        """Keep what was measured of all unknown experts of a library."""
        for each in heard:
            experts = [_key(library.adapters[e]) for e in each.bank.expert_ids.tolist()]
            self._add(each, {expert: at for at, expert in enumerate(experts)})
        self._known |= set(map(_key, library.adapters))

    def _add(self, heard: Heard, columns: Mapping[_Expert, int]) -> None:
        for p, each in enumerate(_inputs(heard.bank)):
            self._metrics.setdefault(each, heard.metric)
            self._parts[each].append(_Part(columns, heard.values[:, p]))

    def add_packed(self, library: ExpertLibrary, base: str) -> None:
        """Take over what libraries on disk know of experts that are unknown here, where it was
        measured with this base (`identity`), and over the same prompts as the others."""
        unknown = self.is_unknown(library).tolist()
        experts: dict[Packed, dict[int, _Expert]] = defaultdict(dict)  # by their numbers there
        for adapter, is_new in zip(library.adapters, unknown, strict=True):
            if is_new and adapter.packed:
                experts[adapter.packed.library][adapter.packed.expert] = _key(adapter)
        for packed, new in experts.items():
            measured = packed.measured
            if measured is None or measured.base != base:
                continue
            if self.prompts not in (None, measured.prompts):
                continue
            try:
                read = [measured.read(number) for number in range(len(packed.banks))]
                found = {
                    bank: (Heard.from_tensors(bank, tensors, len(measured.prompts)), tensors)
                    for bank, tensors in zip(packed.banks, read, strict=True)
                    if tensors is not None
                }
            except ValueError as error:
                logger.warning("%s; its experts are measured over ordinary text again", error)
                continue
            for bank, (heard, tensors) in found.items():
                ids = bank.expert_ids.tolist()
                self._add(heard, {new[e]: at for at, e in enumerate(ids) if e in new})
                self._whitening[bank] = tensors["whitening"]
            self.prompts = measured.prompts
            self._known |= set(new.values())

    def to_tensors(
        self, library: ExpertLibrary, bank: ExpertBank, detector: Detector
    ) -> dict[str, Tensor]:
        """What is known at one bank, for a library on disk; `Heard.from_tensors` reads it."""
        metric = detector.metric
        return {
            "values": self._values(library, bank),
            "whitening": detector.whitening,
            "mean": metric.mean,
            "directions": metric.directions,
            "damping": metric.damping,
            "scale": metric.scale,
        }

    def keep(self, adapters: Iterable[Adapter]) -> None:
        """Forget all other experts."""
        kept = set(map(_key, adapters))
        with self.lock:  # not between an expert's measurement and its use
            self._known &= kept
            for each, parts in self._parts.items():
                fewer = [part.without_others(kept) for part in parts]
                self._parts[each] = [part for part in fewer if part.columns]

    def _values(self, library: ExpertLibrary, bank: ExpertBank) -> Tensor:
        """(V, P, E), see `Heard`, of the experts of a bank, which are known."""
        experts = [_key(library.adapters[e]) for e in bank.expert_ids.tolist()]
        of_layers = []
        for each in _inputs(bank):
            parts = self._parts[each]
            values = torch.empty(len(parts[0].values), len(experts))
            for part in parts:
                at = [i for i, expert in enumerate(experts) if expert in part.columns]
                values[:, at] = part.values[:, [part.columns[experts[i]] for i in at]]
            of_layers.append(values)
        return torch.stack(of_layers, dim=1)

    def of(self, library: ExpertLibrary) -> Ordinary:
        """For a library of which all experts are known."""
        num_scores = 2 * len(calibrated_scores())
        statistics: dict[tuple[ExpertBank, Score], Statistics] = {}
        detectors, by_layer, num_prompts = {}, {}, 0
        for bank in library.banks:
            metric = self.metric(bank)
            if metric is None:  # its layers never run
                continue
            values = self._values(library, bank)
            of_bank, prompts = values[: num_scores + 2].to(bank.A.device), values[num_scores + 2 :]
            for i, score in enumerate(calibrated_scores()):
                statistics[bank, score] = of_bank[2 * i], of_bank[2 * i + 1]
            detectors[bank] = Detector.of(
                bank, metric, of_bank[-2], of_bank[-1], whitening=self._whitening.get(bank)
            )
            by_layer[bank] = certainty(prompts)
            num_prompts = len(prompts)
        total = mean_certainty(by_layer, num_prompts, expert_layers(library))
        return Ordinary(Calibration(statistics), detectors, total)


def identity(base: LoadedBase) -> str:
    """Of a base, as far as it decides what ordinary text tells: its weights and its template."""
    facts = [base.fingerprint, base.name, base.quantization, base.tokenizer.chat_template]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


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
