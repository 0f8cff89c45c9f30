"""Rows whose router is made to ban an expert, to pin it, or to use it alone.

Torch computes them, not compiled code: they are looked at now and then, one column at a time.

Axes: R rows, T tokens, P projections of a bank, E experts, K selected.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from spectr_demo.config import Intervention, RouterConfig
from spectr_demo.engine.rows import RouterRows
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.calibration import Calibration
from spectr_demo.routing.routers import ROUTERS
from spectr_demo.routing.spectr import select


class ChangedRows(RouterRows):
    """One router with an intervention, and the rows that it serves."""

    def __init__(
        self,
        router: RouterConfig,
        rows: Sequence[int],
        *,
        expert_names: Sequence[str],
        unchanged: Tensor,
        changed: Mapping[int, Tensor],
        first: Sequence[int],
        calibration: Calibration | None = None,
    ) -> None:
        """unchanged: (R, E) weights of all rows of the batch that do not look at tokens. changed:
        (E,) of those that have read the request, under the intervention. first: (R,) of the next
        token of each row of the batch, the place in its answer, see `RoutingPlan`."""
        super().__init__(
            router,
            rows,
            num_rows=len(unchanged),
            num_experts=len(expert_names),
            calibration=calibration,
        )
        assert router.intervention is not None
        self._intervention = router.intervention
        self._expert = expert_names.index(router.intervention.expert)
        self._looks_at_tokens = ROUTERS[router.name].score is not None
        at = torch.arange(len(expert_names)) == self._expert
        self._unchanged = unchanged[self.rows]
        self._changed = torch.stack(
            [
                changed[row]
                if row in changed
                else changed_constant(unchanged[row], router.intervention, at)
                for row in rows
            ]
        )
        self._first = torch.tensor([first[row] for row in rows])
        self._num_read = self._num_begun = 0  # tokens: by now, and before this pass

    @property
    def num_chosen(self) -> int:
        return super().num_chosen if self._looks_at_tokens else self._unchanged.shape[1]

    def begin_pass(self, num_tokens: int) -> None:
        """Several tokens are a text from its start, see `Recorder.begin_pass`."""
        self._num_begun = 0 if num_tokens > 1 else self._num_read
        self._num_read = self._num_begun + num_tokens

    def choose(self, bank: ExpertBank, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Experts, weights and scores (R, T, P, K) from z (R, T, P, E, r). A weight of 0 is no
        expert."""
        scores = self.scores(bank, z)
        if self._looks_at_tokens:
            at = (bank.expert_ids == self._expert).to(z.device)
            unchanged = weights_of(scores, self.router)
            changed = changed_weights(scores, self.router, at)
        else:
            unchanged, changed = (
                each[:, None, None, bank.expert_ids].to(z.device).expand_as(scores)
                for each in (self._unchanged, self._changed)
            )
        weights = torch.where(self._is_changed(bank).to(z.device), changed, unchanged)
        weights, experts = weights.topk(min(self.num_chosen, z.shape[3]), dim=-1)
        return experts, weights, scores.gather(-1, experts)

    def _is_changed(self, bank: ExpertBank) -> Tensor:
        """(R, T, P, 1) bool: where the intervention holds."""
        intervention = self._intervention
        t = self._first[:, None] + torch.arange(self._num_begun, self._num_read)
        layer = torch.tensor(bank.layers)[:, None]
        where = torch.ones(*t.shape, len(layer), 1, dtype=torch.bool)
        if intervention.from_token is not None:
            where &= t[..., None, None] >= intervention.from_token
        if intervention.layers is not None:
            first, last = intervention.layers
            where &= (layer >= first) & (layer <= last)
        return where


def weights_of(scores: Tensor, router: RouterConfig, least: float | None = None) -> Tensor:
    """(..., E) from scores (..., E): what `select` gives each expert."""
    experts, weights, _ = select(scores, router, least)
    return torch.zeros_like(scores).scatter(-1, experts, weights)


def changed_weights(
    scores: Tensor, router: RouterConfig, at: Tensor, least: float | None = None
) -> Tensor:
    """The same under the router's intervention.

    at: (E,) bool, its expert; False everywhere in a layer that does not have it. Banned or pinned
    it changes nothing there; used alone, it leaves the layer to the base. least: what the best
    expert must exceed, as in `select`; an expert that is pinned need not.
    """
    assert router.intervention is not None and router.top_k is not None
    if router.intervention.kind == "only":
        return at.to(scores.dtype).expand_as(scores)
    others = torch.where(at, -torch.inf, scores)
    if router.intervention.kind == "pin" and at.any():
        num_others = min(router.top_k, scores.shape[-1]) - 1
        kept = others.topk(num_others, dim=-1).indices
        is_kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, kept, True) | at
        return weights_of(torch.where(is_kept, scores, -torch.inf), router)
    weights = weights_of(others, router, least)
    # One of the K places may be left, where there are no more experts: the others get its part.
    weights = torch.where(others > -torch.inf, weights, 0)
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total, 0)


def changed_constant(weights: Tensor, intervention: Intervention, at: Tensor) -> Tensor:
    """(E,) of a router that looks at nothing. A banned expert leaves its part to the others that
    are used; one that is pinned and was not used is used alone."""
    if intervention.kind == "ban":
        others = torch.where(at, 0, weights)
        return others * (weights.sum() / others.sum()) if others.any() else others
    is_used = intervention.kind == "pin" and bool(weights[at].any())
    return weights if is_used else at.to(weights.dtype)
