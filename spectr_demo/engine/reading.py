"""What routers must know before a run, read by the bare base while the experts listen.

Three things are read so. Generic prompts give each score its scale (`calibration`). They also give
the lead that an expert must exceed (`least_lead`). And the prompt itself, read once before the run,
gives routers that read first what all layers know of it (`starts`).

Axes: R rows, T tokens, E experts.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from spectr_demo.base.generic import generic_prompts
from spectr_demo.base.loading import LoadedBase
from spectr_demo.base.prompts import (
    Template,
    decoder_inputs,
    encode,
    shared_length,
)
from spectr_demo.config import RouterConfig
from spectr_demo.engine.layers import routed
from spectr_demo.engine.rows import RouterRows, by_router
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.calibration import Calibration, Measurement
from spectr_demo.routing.context import EvidencePool, Start, lead

_PROMPTS_AT_ONCE = 8


class Listening:
    """A `Plan` under which the experts add nothing to the base and are only listened to."""

    is_base_only = False

    def begin_pass(self, input_ids: Tensor) -> None:
        pass

    def add(self, y: Tensor, bank: ExpertBank, place: int, x: Tensor) -> Tensor:
        if place == 0:
            self.listen(bank, x)
        return y

    def end_pass(self, hidden: Tensor) -> None:
        pass

    def listen(self, bank: ExpertBank, x: Tensor) -> None:
        """What to do with the input x (R, T, D_in) of a bank's layers."""
        raise NotImplementedError


class FirstReading(Listening):
    """Prompts, read for the routers that read first. Each line of a prompt is a row."""

    def __init__(
        self,
        routers: Sequence[RouterConfig],
        *,
        num_experts: int,
        calibration: Calibration,
        num_lines: Sequence[int],
        is_evidence: Tensor,
    ) -> None:
        """routers: one per prompt. num_lines: of each prompt's request; the row of a line is the
        prompt up to there. is_evidence: (rows, T) bool over the rows, which are padded on the left;
        True for the line and the template after it."""
        lines = list(zip(routers, num_lines, strict=True))
        rows = by_router([router for router, num in lines for _ in range(num)])
        self._num_lines = {
            router: [num for reader, num in lines if reader == router] for router in rows
        }
        self._rows = {
            router: RouterRows(
                replace(router, reads_first=False, confidence=None),
                some,
                num_rows=len(is_evidence),
                num_experts=num_experts,
                calibration=calibration,
                is_evidence=is_evidence,
            )
            for router, some in rows.items()
        }

    def begin_pass(self, input_ids: Tensor) -> None:
        for rows in self._rows.values():
            rows.begin_pass(input_ids, None)

    def listen(self, bank: ExpertBank, x: Tensor) -> None:
        z = bank.project(x)
        for rows in self._rows.values():
            rows.scores(bank, z[rows.index])

    def pool(self, router: RouterConfig) -> EvidencePool:
        """Of this router's rows."""
        pool = self._rows[router].pool
        assert pool is not None
        return pool

    def start(self, router: RouterConfig, least: float) -> Start:
        """What a run starts from, a row for each prompt of this router."""
        return self.pool(router).start(self._num_lines[router], least)


class _Statistics(Listening):
    """Measures the scores of the tokens that count."""

    def __init__(self, measurement: Measurement, counts: Tensor) -> None:
        """counts: (R, T) bool."""
        self._measurement = measurement
        self._counts = counts

    def listen(self, bank: ExpertBank, x: Tensor) -> None:
        z = bank.project(x)
        self._measurement.add(bank, z, self._counts.to(z.device))


class Reader:
    """Reads with one base, for one library of experts; what it finds out is kept."""

    def __init__(self, base: LoadedBase, library: ExpertLibrary) -> None:
        self._base = base
        self._library = library
        self.template = Template.of(base.tokenizer)
        self._calibration: Calibration | None = None
        self._lock = threading.RLock()
        # By what decides them: the router's score, and how fast votes fade.
        self._leads: dict[tuple[str, float | None], Tensor] = {}

    @property
    def calibration(self) -> Calibration:
        """Of every expert, measured when it is first needed (on a ZeroGPU, where there is one)."""
        with self._lock:
            if self._calibration is None:
                self._calibration = self._calibrate()
            return self._calibration

    @torch.inference_mode()
    def _calibrate(self) -> Calibration:
        measurement, opening = Measurement(), self.template.opening
        for texts in _parts(self._generic_texts()):
            width = max(map(len, texts))
            # Padding on the right needs no mask of attention: nothing looks ahead.
            input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in texts])
            starts = torch.tensor([[shared_length(opening, ids)] for ids in texts])
            ends = torch.tensor([[len(ids)] for ids in texts])
            counts = (torch.arange(width) >= starts) & (torch.arange(width) < ends)
            with routed(_Statistics(measurement, counts.to(self._base.device))):
                decoder = self._base.model.get_decoder()
                decoder(input_ids=input_ids.to(self._base.device), use_cache=False)
        return measurement.calibration()

    def _generic_texts(self) -> list[list[int]]:
        """Token ids of the generic prompts, the shortest first."""
        prompts = generic_prompts(self._base)
        return sorted((encode(self._base.tokenizer, p) for p in prompts), key=len)

    def starts(
        self,
        routers: Sequence[RouterConfig],
        prompts: Sequence[Sequence[int]],
        least_leads: Mapping[RouterConfig, float],
    ) -> dict[RouterConfig, Start]:
        """What the rows of each router start from. routers: those that read first, one per prompt.
        least_leads: of those with a confidence."""
        if not routers:
            return {}
        reading = self.read_first(routers, prompts)
        return {r: reading.start(r, least_leads.get(r, 0.0)) for r in set(routers)}

    @torch.inference_mode()
    def read_first(
        self, routers: Sequence[RouterConfig], prompts: Sequence[Sequence[int]]
    ) -> FirstReading:
        """The bare base reads the prompts, one for each router, in one pass."""
        lines_of = [self.template.request_lines(ids) for ids in prompts]
        texts, starts = zip(*(line for lines in lines_of for line in lines), strict=True)
        reading = FirstReading(
            routers,
            num_experts=len(self._library.names),
            calibration=self.calibration,
            num_lines=[len(lines) for lines in lines_of],
            is_evidence=evidence_mask(texts, starts, self._base.device),
        )
        with routed(reading):
            decoder = self._base.model.get_decoder()
            decoder(**decoder_inputs(texts, self._base.device), use_cache=False)
        return reading

    def least_lead(self, router: RouterConfig) -> float:
        """The lead that the best expert has at most, in this share of the generic prompts."""
        assert router.confidence is not None
        key = router.name, router.decay
        with self._lock:
            if key not in self._leads:
                leads = []
                for texts in _parts(self._generic_texts()):
                    reading = self.read_first([router] * len(texts), texts)
                    leads.append(lead(reading.pool(router).latest).amax(-1))
                self._leads[key] = torch.cat(leads)
        return float(self._leads[key].quantile(router.confidence))


def evidence_mask(
    texts: Sequence[Sequence[int]], starts: Sequence[int], device: torch.device
) -> Tensor:
    """(R, T) bool, True from each row's start on, in texts that are padded on the left."""
    width = max(map(len, texts))
    firsts = [width - len(ids) + start for ids, start in zip(texts, starts, strict=True)]
    return (torch.arange(width) >= torch.tensor(firsts)[:, None]).to(device)


def _parts(texts: Sequence[list[int]]) -> Iterator[Sequence[list[int]]]:
    """Some at a time, so that a large library needs little memory."""
    for start in range(0, len(texts), _PROMPTS_AT_ONCE):
        yield texts[start : start + _PROMPTS_AT_ONCE]
