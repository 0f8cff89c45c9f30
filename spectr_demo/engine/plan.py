"""Which experts each row of a batch uses: the plan of one run, from its routers to what layers add.

A run's plan belongs to that run. Layers find it in the context of the thread that runs the model
(`engine/layers.py`), so two users of one process never share one.

Axes: R rows (columns of a comparison), T tokens, P projections that read one input, E experts, K
selected, r rank.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from spectr_demo.config import RouterConfig
from spectr_demo.engine.constant import ConstantRows
from spectr_demo.engine.recorder import Recorder
from spectr_demo.engine.rows import RouterRows, by_router
from spectr_demo.engine.token import MixedToken, TokenPath
from spectr_demo.routing.bank import ExpertBank, Mixed
from spectr_demo.routing.calibration import Calibration
from spectr_demo.routing.context import Start
from spectr_demo.routing.spectr import compose


class Plan(Protocol):
    """What layers see of a plan."""

    is_base_only: bool  # layers need not ask: they add nothing

    def begin_pass(self, input_ids: Tensor) -> None:
        """The layers read input_ids (R, T) next; -1 where a token has no id."""

    def add(self, y: Tensor, bank: ExpertBank, place: int, x: Tensor) -> Tensor:
        """A layer's output y (R, T, D_out) with what the plan adds, from its input x (R, T, D_in).

        place: of the layer in its bank. The layers of a bank run in the order of their places, and
        all read the same x.
        """

    def end_pass(self, hidden: Tensor) -> None:
        """The layers have read them. hidden: (R, T, D), the decoder's last hidden states."""


class RoutingPlan:
    """A `Plan` with a router for each row of the batch."""

    def __init__(
        self,
        routers: Sequence[RouterConfig],
        expert_names: Sequence[str],
        recorder: Recorder | None = None,
        *,
        calibration: Calibration | None = None,
        is_evidence: Tensor | None = None,
        starts: Mapping[RouterConfig, Start] | None = None,
        least_leads: Mapping[RouterConfig, float] | None = None,
        newline_ids: Tensor | None = None,
    ) -> None:
        """calibration: needed where a router is calibrated. is_evidence: (R, T) bool, False where
        routers that pool have nothing to learn: padding, template, a prompt that was read before.
        starts: of each router that reads the prompt first, what that reading gave its rows, in
        their order. least_leads: of the routers with a confidence, what an expert's lead must
        exceed. newline_ids: (N,) int64 tokens that end a line, at which a router that reads first
        takes up again what the prompt asked for; None is none."""
        self.routers = tuple(routers)
        self.recorder = recorder
        self.is_base_only = all(router.name == "base" for router in routers)
        self.groups = [
            RouterRows(
                router,
                rows,
                num_rows=len(routers),
                num_experts=len(expert_names),
                calibration=calibration,
                is_evidence=is_evidence,
                start=(starts or {}).get(router),
                least_lead=None if router.confidence is None else (least_leads or {})[router],
            )
            for router, rows in by_router(routers).items()
        ]
        # With K = 1 both compositions are the same product, and `outputs` is the shorter way.
        self._is_merged = [r.composition == "parameters" and r.top_k != 1 for r in routers]
        self._merged_rows = torch.tensor(self._is_merged)[:, None, None, None, None]
        self.constant = ConstantRows(routers, expert_names, self._is_merged)
        self._newline_ids = newline_ids
        self._token_path = TokenPath(
            self.groups,
            self.constant,
            [merged and not self.constant.is_folded for merged in self._is_merged],
            recorder,
        )
        # Of the banks of which a layer is still to run.
        self._mixed: dict[ExpertBank, Mixed | MixedToken] = {}

    def begin_pass(self, input_ids: Tensor) -> None:
        is_newline = None
        if self._newline_ids is not None and any(group.pool for group in self.groups):
            is_newline = torch.isin(input_ids, self._newline_ids)
        for group in self.groups:
            group.begin_pass(input_ids, is_newline)

    def add(self, y: Tensor, bank: ExpertBank, place: int, x: Tensor) -> Tensor:
        used = self.constant.used(bank)
        if used is None:
            return y
        if place > 0:
            is_last = place == len(bank.paths) - 1
            mixed = self._mixed.pop(bank) if is_last else self._mixed[bank]
            return mixed.add_(y, place)
        # One token on a CPU is mixed for all layers, and added to the first, by compiled code.
        of_token = self._token_path.mix_and_add_(y, used, x)
        mixed = of_token or self.mix(used, x)
        if len(bank.paths) > 1:
            self._mixed[bank] = mixed
        return y if of_token else mixed.add_(y, 0)

    def end_pass(self, hidden: Tensor) -> None:
        if self.recorder is not None:
            self.recorder.add_hidden(hidden)

    def mix(self, bank: ExpertBank, x: Tensor) -> Mixed:
        """Project, score, select, compose: what the bank's layers multiply by B*, from their input
        x (R, T, D_in).

        That is one product with the stacked factors. Where all rows share a router, and it is less
        to read, it is one with copies of the chosen ones.
        """
        if self.constant.is_folded:
            return Mixed(bank, bank.project(x), None)
        group = self._only_group
        (R, T, _), E = x.shape, bank.num_experts
        if group is None or not bank.copying_pays(group.router.top_k or E, R * T):
            z = bank.project(x)
            return Mixed(bank, self._compose(self.weights(bank, z).to(z.dtype), z), None)
        kept = None
        if bank.copying_pays(group.num_filtered, R * T):
            kept = bank.project_first(x).float().abs().topk(group.num_filtered, dim=-1).indices
            z = bank.project_chosen(x, kept)
        else:
            z = bank.project(x)
        experts, places, weights = self._choose(group, bank, z, kept)
        z = z.gather(-2, experts.unsqueeze(-1).expand(*experts.shape, z.shape[-1]))
        return Mixed(bank, self._compose(weights.to(z.dtype), z), places)

    def weights(self, bank: ExpertBank, z: Tensor) -> Tensor:
        """Weight of each expert for each token: (R, T, P, E) float32 from z (R, T, P, E, r)."""
        constant = self.constant.of(bank)
        if not self.groups:
            return constant.expand(z.shape[:4])
        if self._only_group is not None:
            experts, _, chosen = self._choose(self._only_group, bank, z)
            return torch.zeros(z.shape[:4], device=z.device).scatter_(-1, experts, chosen)
        weights = constant.expand(z.shape[:4]).clone()
        for group in self.groups:
            experts, _, chosen = self._choose(group, bank, z[group.index])
            scattered = weights.new_zeros(len(group.rows), *z.shape[1:4])
            weights[group.index] = scattered.scatter_(-1, experts, chosen)
        return weights

    @property
    def _only_group(self) -> RouterRows | None:
        """Of a plan whose rows all have the same router, and one that scores."""
        return self.groups[0] if self.groups and self.groups[0].is_whole else None

    def _choose(
        self, group: RouterRows, bank: ExpertBank, z: Tensor, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a group's rows choose among the experts of z (R, T, P, E, r): their places there, in
        the bank, and their weights, (R, T, P, K) each. kept: (R, T, P, E) where those of z are in
        the bank; None where z has all of it."""
        experts, weights, scores = group.choose(bank, z)
        places = experts if kept is None else kept.gather(-1, experts)
        if self.recorder is not None:
            for i, row in enumerate(group.rows):
                self.recorder.add_choice(bank, row, (places[i], weights[i], scores[i]))
        return experts, places, weights

    def _compose(self, weights: Tensor, z: Tensor) -> Tensor:
        """(R, T, P, K, r) from weights (R, T, P, K) and z (R, T, P, K, r), each row in its way."""
        if all(self._is_merged):
            return compose(weights, z, "parameters")
        if any(self._is_merged):  # the same as `compose` for some rows, with one product less
            z = torch.where(self._merged_rows.to(z.device), weights.unsqueeze(-2) @ z, z)
        return compose(weights, z, "outputs")
