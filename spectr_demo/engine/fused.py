"""Routing on a GPU: one launch chooses for a layer and adds what is chosen.

A plan asks `FusedRouting` where its bank is not on a CPU. The operators are in `gpu/`, and know
tensors alone. What they need of a bank and of the rows is bound here, once for a plan.

Axes: R rows, T tokens, P projections of a bank, E experts, F of them kept by LAG's filter, r rank.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from spectr_demo.config import RouterConfig
from spectr_demo.engine.constant import ConstantRows
from spectr_demo.engine.recorder import Recorder
from spectr_demo.engine.rows import RouterRows
from spectr_demo.gpu import operators
from spectr_demo.gpu.operators import add_chosen_, project_kept, weigh_
from spectr_demo.gpu.rules import Rule, Rules
from spectr_demo.routing.bank import ExpertBank, Mixed


class MixedToken:
    """One token of each row at a bank: its layers choose when they add."""

    def __init__(
        self,
        bank: ExpertBank,
        rules: Rules,
        z: Tensor,
        kept: Tensor | None,
        choices: "SlotsOfBank | None",
    ) -> None:
        """z: (R, P, F, r). kept: (R, P, F), where its experts are in the bank; None for all."""
        self._bank = bank
        self._rules = rules
        self._z = z
        self._kept = kept
        self._choices = {} if choices is None else choices.buffers()

    def add_(self, y: Tensor, place: int) -> Tensor:
        """y (R, 1, D_out) with what the layer adds, in place."""
        bank = self._bank
        add_chosen_(
            y.view(len(y), -1),
            self._z,
            bank.B[place],
            place,
            bank.singular_values,
            self._rules,
            kept=self._kept,
            **self._choices,
        )
        return y


class SlotsOfBank:
    """What rows chose at a bank, token after token, at addresses that stay."""

    def __init__(self, recorder: Recorder, groups: Sequence[RouterRows], z: Tensor, most: int):
        """z: (R, P, F, r). most: experts that a row can choose."""
        shape = len(z), recorder.num_slots, z.shape[1], most
        self._step = recorder.step(z.device)
        self._places = torch.zeros(shape, dtype=torch.int32, device=z.device)
        self._weights, self._scores = (torch.zeros(shape, device=z.device) for _ in range(2))
        self._groups = groups
        self._num_handed = 0

    def buffers(self) -> dict[str, Tensor]:
        return {
            "places": self._places,
            "weights": self._weights,
            "scores": self._scores,
            "step": self._step,
        }

    def hand_over(self, recorder: Recorder, bank: ExpertBank) -> None:
        """What was chosen since the last time."""
        new = slice(self._num_handed, recorder.num_in_slots)
        if new.start < new.stop:
            of_rows = [part[:, new] for part in (self._places, self._weights, self._scores)]
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

    def mix(self, bank: ExpertBank, x: Tensor) -> Mixed | MixedToken:
        """What the bank's layers multiply by B*, from their input x (R, T, D_in)."""
        if bank not in self._rules_of:
            self._rules_of[bank] = self._rules(bank, len(x))
        rules = self._rules_of[bank]
        if x.shape[1] == 1:
            return self._mix_token(bank, rules, x[:, 0])
        z = bank.project(x).flatten(0, 1)  # (R * T, P, E, r)
        if self._recorder is None or not self._groups:
            weigh_(z, bank.singular_values, rules)
        else:
            shape = *z.shape[:2], rules.most
            places = torch.zeros(shape, dtype=torch.int32, device=z.device)
            weights, scores = (torch.zeros(shape, device=z.device) for _ in range(2))
            weigh_(z, bank.singular_values, rules, places=places, weights=weights, scores=scores)
            of_rows = [part.view(*x.shape[:2], *shape[1:]) for part in (places, weights, scores)]
            _add_choices(self._recorder, bank, self._groups, of_rows)
        return Mixed(bank, z.view(*x.shape[:2], *z.shape[1:]), None)

    def _mix_token(self, bank: ExpertBank, rules: Rules, x: Tensor) -> MixedToken:
        """x: (R, D_in)."""
        kept = None
        num_kept = self._groups[0].num_scored if len(self._groups) == 1 else bank.num_experts
        if num_kept < bank.num_experts and self._groups[0].is_whole:
            arrows = bank.project_first(x)
            z, kept = project_kept(x, bank.A, arrows, num_kept)
        else:
            z = bank.project(x)
        slots = None
        if self._recorder is not None and self._groups:
            if bank not in self._slots_of:
                slots = SlotsOfBank(self._recorder, self._groups, z, rules.most)
                self._slots_of[bank] = slots
                self._recorder.late[bank].append(slots)
            slots = self._slots_of[bank]
        return MixedToken(bank, rules, z, kept, slots)

    def _rules(self, bank: ExpertBank, num_rows: int) -> Rules:
        device, mean, std, constant = bank.A.device, None, None, None
        if any(group.calibration for group in self._groups):
            shape = num_rows, *bank.singular_values.shape[:2]
            mean, std = torch.zeros(shape, device=device), torch.ones(shape, device=device)
            for group in self._groups:
                if group.calibration is not None:
                    mean[group.rows], std[group.rows] = group.calibration.of(bank, group.score)
        if not all(rule.measure for rule in self._rows):
            constant = self._constant.of(bank)[:, 0]
        if bank.num_experts not in self._rules_for:
            self._rules_for[bank.num_experts] = Rules.of(
                self._rows, bank.num_experts, device=device
            )
        rules = self._rules_for[bank.num_experts]
        return replace(rules, mean=mean, std=std, constant=constant)


def _add_choices(
    recorder: Recorder, bank: ExpertBank, groups: Sequence[RouterRows], of_rows: Sequence[Tensor]
) -> None:
    """Record what rows chose, each with its own K: places, weights, scores (R, T, P, K_max)."""
    for group in groups:
        for row in group.rows:
            places, weights, scores = (part[row, ..., : group.router.top_k] for part in of_rows)
            recorder.add_choice(bank, row, (places.long(), weights, scores))
