"""One token in compiled code, on a CPU: the one place where a plan meets code faster than torch.

A plan asks `TokenPath` first, at each bank. It answers with `None` where torch must do it: several
tokens, many rows, a GPU, another dtype than float32 and bfloat16, or a router whose row names no
compiled measure. Everything that compiled code needs is bound here, from the groups of rows and the
recorder. The loops themselves are in `cpu/token.py`, and know arrays alone.

Axes: R rows, P projections of a bank, E experts, K selected, F kept by LAG's filter, r rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from spectr_demo.cpu import token as compiled
from spectr_demo.cpu.choice import FIRST, LENGTH, OUTPUT, Choices, Rule
from spectr_demo.cpu.filter import Arrows
from spectr_demo.cpu.token import Factors, Record
from spectr_demo.engine.constant import ConstantRows
from spectr_demo.engine.recorder import Recorder
from spectr_demo.engine.rows import RouterRows
from spectr_demo.experts.arrows import arrows_of
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.routers import Measure

MEASURES: dict[Measure, int] = {"length": LENGTH, "first": FIRST, "output": OUTPUT}
RECORDED_AT_ONCE = 64

# What compiled code reads of a bank, kept as long as the bank.
_factors: WeakKeyDictionary[ExpertBank, Factors | None] = WeakKeyDictionary()


def factors_of(bank: ExpertBank) -> Factors | None:
    """A bank's memory; None where compiled code cannot read it (a GPU, another dtype)."""
    if bank not in _factors:
        _factors[bank] = Factors.of(bank.A, bank.B, bank.singular_values)
    return _factors[bank]


class MixedToken:
    """What one token adds at the layers of a bank; the same memory serves all tokens of a run."""

    def __init__(
        self,
        factors: Factors,
        arrows: Arrows | None,
        record: Record,
        choices: Sequence["_Written"],
        arrays: tuple[Any, ...],
    ) -> None:
        """arrows: where LAG's filter keeps some experts. record: of what the layers add. choices:
        of each router that looks at tokens. arrays: what the records point to, kept as long."""
        self.factors = factors
        self.arrows = arrows
        self.record = record
        self.choices = choices
        self._arrays = arrays

    def add_(self, y: Tensor, place: int) -> Tensor:
        """y (R, 1, D_out) with it, in place."""
        B = self.factors.B[place]
        compiled.add_at(self.record, y.data_ptr(), y.dtype == torch.bfloat16, B, place)
        return y


@dataclass
class _Written:
    """Memory that compiled code fills with the choices of one router, token after token."""

    rows: list[int]
    record: Record
    choices: Choices
    num_recorded: int = 0

    def hand_over(self, recorder: Recorder, bank: ExpertBank) -> None:
        """What was chosen since the last time; memory that is full is replaced."""
        places, weights, scores, num = self.choices
        new = slice(self.num_recorded, int(num[0]))
        for i, row in enumerate(self.rows if new.start < new.stop else ()):
            chosen = [torch.from_numpy(part[new, i]) for part in (places, weights, scores)]
            recorder.add_choice(bank, row, (chosen[0], chosen[1], chosen[2]))
        self.num_recorded = new.stop
        if self.choices.is_full:
            self.choices, self.num_recorded = Choices.empty(*places.shape), 0
            compiled.bind_choices(self.record, self.choices)


class TokenPath:
    """The fast path of one plan."""

    def __init__(
        self,
        groups: Sequence[RouterRows],
        constant: ConstantRows,
        is_merged: Sequence[bool],
        recorder: Recorder | None,
    ) -> None:
        """is_merged: (R,) whether a row merges factors before it multiplies."""
        self._groups = groups
        self._constant = constant
        self._is_merged = np.array(is_merged)
        self._recorder = recorder
        self._tokens: dict[ExpertBank, MixedToken | None] = {}

    def mix_and_add_(self, y: Tensor, bank: ExpertBank, x: Tensor) -> MixedToken | None:
        """What the bank's layers add, that of the first one added to its y: y (R, 1, D_out) and x
        (R, 1, D_in). None, and nothing is done, where torch must do it."""
        if not compiled.can_route(x, y):
            self._record(bank)  # before what torch records next
            return None
        if bank not in self._tokens:
            self._tokens[bank] = self._bind(bank)
        token = self._tokens[bank]
        if token is None:
            return None
        places = y.data_ptr(), x.data_ptr(), x.dtype == torch.bfloat16
        A, B = token.factors.A, token.factors.B[0]
        if not self._groups:
            compiled.project_and_add_at(token.record, *places, A, B)
            return token
        last = len(self._groups) - 1
        for i, written in enumerate(token.choices):
            if self._recorder is not None and written.choices.is_full:
                self._record(bank)
            compiled.route_and_add_at(
                written.record, *places, A, token.arrows, B, i == 0, i == last
            )
        return token

    def _bind(self, bank: ExpertBank) -> MixedToken | None:
        """Memory for one token of each row at a bank, and the records that compiled code reads;
        None where it cannot serve the bank."""
        factors = factors_of(bank)
        if factors is None or any(group.measure is None for group in self._groups):
            return None
        P, E, r = factors.singular_values.shape
        R, kept = len(self._is_merged), None
        first = self._groups[0] if self._groups else None
        if first is not None and first.is_whole and first.num_scored < E:
            kept = np.empty((R, P, first.num_scored), np.int64)
        shape = R, P, E if kept is None else kept.shape[2]
        weights = np.ones(shape, np.float32)  # where rows are constant and the factors hold theirs
        if kept is None and not self._constant.is_folded:
            weights = self._constant.of(bank)[:, 0].numpy().copy()
        arrays = np.empty((*shape, r), np.float32), weights, self._is_merged, kept
        bind = partial(compiled.bind, *arrays, factors.singular_values)
        choices, kept_too = [], []
        for group in self._groups:
            rule, rows = _rule(group, bank), np.array(group.rows)
            K = min(group.router.top_k or E, E)
            num_tokens = 1 if self._recorder is None else RECORDED_AT_ONCE
            written = _Written(
                group.rows, bind(rule, rows), Choices.empty(num_tokens, len(rows), P, K)
            )
            compiled.bind_choices(written.record, written.choices)
            choices.append(written)
            kept_too += [rule, rows]
        if self._recorder is not None:
            self._recorder.late[bank] += choices
        # All records have the same z and weights; without a router, one has nothing else.
        record = choices[0].record if choices else bind()
        arrows = None if kept is None else arrows_of(bank)
        return MixedToken(factors, arrows, record, choices, (*arrays, *kept_too))

    def _record(self, bank: ExpertBank) -> None:
        """Hand the recorder what was chosen since the last time."""
        token = self._tokens.get(bank)
        if token is not None and self._recorder is not None:
            for written in token.choices:
                written.hand_over(self._recorder, bank)


def _rule(group: RouterRows, bank: ExpertBank) -> Rule:
    """How a group scores and chooses at a bank."""
    shape = bank.singular_values.shape[:2]
    mean, std = (f(shape, dtype=torch.float32) for f in (torch.zeros, torch.ones))
    if group.calibration is not None:
        mean, std = group.calibration.of(bank, group.score)
    config = group.router
    assert group.measure is not None
    return Rule(
        measure=MEASURES[group.measure],
        num_kept=min(group.num_scored, bank.num_experts),
        mean=mean.numpy(),
        std=std.numpy(),
        temperature=config.temperature if config.weighting == "softmax" else 0.0,
    )
