"""Routing on a GPU: two launches for a bank. One projects, one chooses and adds at all its layers.

A plan asks `FusedRouting` where its bank is not on a CPU. The operators are in `gpu/`, and know
tensors alone. What they need of a bank and of the rows is bound here, once for a plan.

Axes: R rows, T tokens, P projections of a bank, E experts, F of them kept by LAG's filter, r rank.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from spectr_demo.config import RouterConfig
from spectr_demo.engine.constant import ConstantRows
from spectr_demo.engine.recorder import Recorder
from spectr_demo.engine.rows import RouterRows
from spectr_demo.gpu import operators
from spectr_demo.gpu.operators import add_chosen_, project_kept, weigh
from spectr_demo.gpu.rules import Rule, Rules
from spectr_demo.routing.bank import ExpertBank, Mixed

BaseLayer = Callable[[Tensor], Tensor]


class SlotsOfBank:
    """What rows chose at a bank, token after token, at addresses that stay."""

    def __init__(self, recorder: Recorder, groups: Sequence[RouterRows], z: Tensor, most: int):
        """z: (R, P, F, r). most: experts that a row can choose."""
        self._step = recorder.step(z.device)
        self._choices = _room(len(z), recorder.num_slots, z.shape[1], most, device=z.device)
        self._groups = groups
        self._num_handed = 0

    def buffers(self) -> dict[str, Tensor]:
        return {**self._choices, "step": self._step}

    def hand_over(self, recorder: Recorder, bank: ExpertBank) -> None:
        """What was chosen since the last time."""
        new = slice(self._num_handed, recorder.num_in_slots)
        if new.start < new.stop:
            of_rows = [part[:, new] for part in self._choices.values()]
            _add_choices(recorder, bank, self._groups, of_rows)
        self._num_handed = new.stop


class FusedRouting:
    """The path of a GPU, of one plan."""

    def __init__(
        self,
        routers: Sequence[RouterConfig],
        groups: Sequence[RouterRows],
        constant: ConstantRows,
        is_merged: Sequence[bool],
        recorder: Recorder | None,
    ) -> None:
        self._groups = groups
        self._constant = constant
        self._recorder = recorder
        self._rules_for: dict[int, Rules] = {}  # any bank of so many experts
        self._rules_of: dict[ExpertBank, Rules] = {}
        self._slots_of: dict[ExpertBank, SlotsOfBank] = {}
        self._outputs: dict[ExpertBank, list[Tensor]] = {}  # of layers that are still to run
        self._stream: torch.cuda.Stream | None = None
        self._has_measures = all(group.measure for group in groups)
        self._rows = [Rule(is_merged=merged) for merged in is_merged]
        for group in groups:
            for row in group.rows:
                router = routers[row]
                self._rows[row] = Rule(
                    measure=group.measure,
                    top_k=router.top_k or 0,
                    filter=group.num_scored,
                    temperature=router.temperature if router.weighting == "softmax" else 0.0,
                    is_merged=is_merged[row],
                )

    def serves(self, device: torch.device) -> bool:
        """Whether it can route there. A router of which no measure is known is left to torch."""
        return self._has_measures and operators.serve(device)

    def mix(self, bank: ExpertBank, x: Tensor) -> Mixed:
        """What the bank's layers multiply by B*, from their input x (R, T, D_in)."""
        z = bank.project(x).flatten(0, 1)  # (R * T, P, E, r)
        rules = self._rules(bank, len(x))
        if self._recorder is None or not self._groups:
            z = weigh(z, bank.singular_values, rules)
        else:
            choices = _room(*z.shape[:2], rules.most, device=z.device)
            z = weigh(z, bank.singular_values, rules, **choices)
            of_rows = [part.unflatten(0, x.shape[:2]) for part in choices.values()]
            _add_choices(self._recorder, bank, self._groups, of_rows)
        return Mixed(bank, z.view(*x.shape[:2], *z.shape[1:]), None)

    def read_token(
        self, bank: ExpertBank, place: int, bases: Sequence[BaseLayer], x: Tensor
    ) -> Tensor:
        """A layer's output (R, 1, D_out) from x (R, 1, D_in). At the bank's first layer those of
        all its layers are computed; the others have theirs already."""
        if place > 0:
            return self._outputs[bank].pop(0)
        with self._beside(x.device) as stream:
            z, kept = self._project(bank, x[:, 0])
        ys = [base(x) for base in bases]
        if stream is not None:
            torch.cuda.current_stream(x.device).wait_stream(stream)
        add_chosen_(
            [y.view(len(y), -1) for y in ys],
            z,
            bank.B,
            bank.singular_values,
            self._rules(bank, len(x)),
            kept=kept,
            **self._slots(bank, z),
        )
        self._outputs[bank] = ys[1:]
        return ys[0]

    @contextmanager
    def _beside(self, device: torch.device) -> Iterator[torch.cuda.Stream | None]:
        """In a CUDA graph: a stream of its own, beside the base's products."""
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            yield None
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            yield self._stream

    def _project(self, bank: ExpertBank, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """z (R, P, F, r) from x (R, D_in), and where its experts are in the bank, (R, P, F); None
        where they are all of it."""
        group = self._groups[0] if len(self._groups) == 1 else None
        if group is None or not group.is_whole or group.num_scored >= bank.num_experts:
            return bank.project(x), None
        return project_kept(x, bank.A, bank.project_first(x), group.num_scored)

    def _slots(self, bank: ExpertBank, z: Tensor) -> dict[str, Tensor]:
        """Where a token's choices are recorded."""
        if self._recorder is None or not self._groups:
            return {}
        if bank not in self._slots_of:
            most = self._rules(bank, len(z)).most
            self._slots_of[bank] = SlotsOfBank(self._recorder, self._groups, z, most)
            self._recorder.late[bank].append(self._slots_of[bank])
        return self._slots_of[bank].buffers()

    def _rules(self, bank: ExpertBank, num_rows: int) -> Rules:
        if bank not in self._rules_of:
            self._rules_of[bank] = self._make_rules(bank, num_rows)
        return self._rules_of[bank]

    def _make_rules(self, bank: ExpertBank, num_rows: int) -> Rules:
        device, mean, std, constant = bank.A.device, None, None, None
        if any(group.calibration for group in self._groups):
            shape = num_rows, *bank.singular_values.shape[:2]
            mean, std = torch.zeros(shape, device=device), torch.ones(shape, device=device)
            for group in self._groups:
                if group.calibration is not None:
                    mean[group.rows], std[group.rows] = group.calibration.of(bank, group.score)
        if self._constant.is_folded:
            constant = torch.ones(num_rows, *bank.singular_values.shape[:2], device=device)
        elif not all(rule.measure for rule in self._rows):
            constant = self._constant.of(bank)[:, 0]
        if bank.num_experts not in self._rules_for:
            self._rules_for[bank.num_experts] = Rules.of(
                self._rows, bank.num_experts, device=device
            )
        rules = self._rules_for[bank.num_experts]
        return replace(rules, mean=mean, std=std, constant=constant)


def _room(*shape: int, device: torch.device) -> dict[str, Tensor]:
    """For choices, as the operators of `gpu/` take them."""
    places = torch.zeros(shape, dtype=torch.int32, device=device)
    weights, scores = (torch.zeros(shape, device=device) for _ in range(2))
    return {"places": places, "weights": weights, "scores": scores}


def _add_choices(
    recorder: Recorder, bank: ExpertBank, groups: Sequence[RouterRows], of_rows: Sequence[Tensor]
) -> None:
    """Record what rows chose, each with its own K: places, weights, scores (R, T, P, K_max)."""
    for group in groups:
        for row in group.rows:
            places, weights, scores = (part[row, ..., : group.router.top_k] for part in of_rows)
            recorder.add_choice(bank, row, (places.long(), weights, scores))
