"""Which experts each row of a batch uses: the plan of one run, from its routers to what layers add.

A run's plan belongs to that run. Layers find it in the context of the thread that runs the model
(`engine/layers.py`), so two users of one process never share one.

Axes: R rows (columns of a comparison), T tokens, P projections that read one input, E experts, K
selected, r rank.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from spectr_demo.config import RouterConfig
from spectr_demo.engine.constant import ConstantRows
from spectr_demo.engine.fused import BaseLayer, FusedRouting
from spectr_demo.engine.intervention import ChangedRows
from spectr_demo.engine.recorder import Recorder
from spectr_demo.engine.rows import RouterRows, by_router
from spectr_demo.engine.token import MixedToken, TokenPath
from spectr_demo.routing.bank import ExpertBank, Mixed
from spectr_demo.routing.calibration import Calibration
from spectr_demo.routing.spectr import compose


class Place(NamedTuple):
    """Of a layer among those that share a bank. bases: what the base computes at each of them."""

    bank: ExpertBank
    number: int
    bases: tuple[BaseLayer, ...]


# Of each layer that a library's experts touch, by its path: one for each time that it runs in a
# pass.
Places = Mapping[str, Sequence[Place]]


class Plan(Protocol):
    """What layers see of a plan. One that says no more is not static."""

    # Of the library that it was made for; a layer without one is the base alone. None is the
    # library that the model has now.
    places: Places | None = None
    is_base_only: bool  # layers need not ask: they add nothing
    needs_all_tokens: bool  # those too that no answer depends on

    def begin_pass(self, input_ids: Tensor) -> None:
        """The layers read input_ids (R, T) next; -1 where a token has no id."""

    def add(self, y: Tensor, bank: ExpertBank, place: int, x: Tensor) -> Tensor:
        """A layer's output y (R, T, D_out) with what the plan adds, from its input x (R, T, D_in).

        place: of the layer in its bank. The layers of a bank run in the order of their places, and
        all read the same x.
        """

    def is_static(self, device: torch.device) -> bool:
        """Whether one more token of each row is read there by `read_token`, not by `add`: at fixed
        addresses, and without the host, so that it can be part of a CUDA graph."""
        return False

    def read_token(
        self, bank: ExpertBank, place: int, bases: Sequence[BaseLayer], x: Tensor
    ) -> Tensor:
        """A layer's whole output (R, 1, D_out) from x (R, 1, D_in). bases: what the base computes
        at each layer of the bank."""
        raise TypeError(f"{type(self).__name__} is not static: its layers ask `add`")

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
        weights: Mapping[int, Tensor] | None = None,
        changed: Mapping[int, Tensor] | None = None,
        first: Sequence[int] | None = None,
        num_padding: Sequence[int] | None = None,
        places: Places | None = None,
    ) -> None:
        """calibration: needed where a router is calibrated. weights: (E,) of each row whose router
        has read the request, see `engine/reading.py`; changed: the same under its intervention.
        first: of the next token of each row, the place in its answer, negative before it; None is
        0. num_padding: tokens before each row's own; None is none. places: see `Plan`."""
        self.places = places
        self.routers = tuple(routers)
        self.recorder = recorder
        self.num_padding = list(num_padding or [0] * len(routers))
        # With K = 1 both compositions are the same product, and `outputs` is the shorter way.
        self._is_merged = [r.composition == "parameters" and r.top_k != 1 for r in routers]
        self._merged_rows = torch.tensor(self._is_merged)[:, None, None, None, None]
        self.constant = ConstantRows(routers, expert_names, self._is_merged, weights or {})
        self.groups = [
            RouterRows(
                router,
                rows,
                num_rows=len(routers),
                num_experts=len(expert_names),
                calibration=calibration,
            )
            if router.intervention is None
            else ChangedRows(
                router,
                rows,
                expert_names=expert_names,
                unchanged=self.constant.unchanged,
                changed=changed or {},
                first=first or [0] * len(routers),
                calibration=calibration,
            )
            for router, rows in by_router(routers).items()
        ]
        self.is_base_only = not self.groups and self.constant.is_none
        self.needs_all_tokens = recorder is not None
        is_merged = [merged and not self.constant.is_folded for merged in self._is_merged]
        self._token_path = TokenPath(self.groups, self.constant, is_merged, recorder)
        self._fused = FusedRouting(routers, self.groups, self.constant, is_merged, recorder)
        # Of the banks of which a layer is still to run.
        self._mixed: dict[ExpertBank, Mixed | MixedToken] = {}

    @property
    def num_chosen(self) -> dict[int, int]:
        """K of each row that looks at tokens, or at where they stand."""
        return {row: group.num_chosen for group in self.groups for row in group.rows}

    def is_static(self, device: torch.device) -> bool:
        return self._fused.serves(device)

    def read_token(
        self, bank: ExpertBank, place: int, bases: Sequence[BaseLayer], x: Tensor
    ) -> Tensor:
        used = self.constant.used(bank)
        return bases[place](x) if used is None else self._fused.read_token(used, place, bases, x)

    def begin_pass(self, input_ids: Tensor) -> None:
        for group in self.groups:
            group.begin_pass(input_ids.shape[1])
        if self.recorder is not None:
            self.recorder.begin_pass(input_ids.shape[1], input_ids.device)

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
        if self.is_static(bank.A.device):
            return self._fused.mix(bank, x)
        group = self._only_group
        (R, T, _), E = x.shape, bank.num_experts
        if group is None or not bank.copying_pays(group.router.top_k or E, R * T):
            z = bank.project(x)
            return Mixed(bank, self._compose(self.weights(bank, z).to(z.dtype), z), None)
        kept = None
        if bank.copying_pays(group.num_scored, R * T):
            kept = bank.project_first(x).float().abs().topk(group.num_scored, dim=-1).indices
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
