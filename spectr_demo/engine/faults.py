"""A row whose numbers are no longer finite: it ends, and is told which layer and expert did it.

An update that is large, though finite, grows from layer to layer until a norm divides infinity by
infinity. Rows do not mix, so the others go on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from spectr_demo.base.decoder import decoder_of
from spectr_demo.base.memory import execution_device
from spectr_demo.engine.layers import routed
from spectr_demo.engine.plan import Plan, RoutingPlan
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.routing.bank import ExpertBank


class FiniteLogits(LogitsProcessor):
    """Has rows whose logits are NaN, infinite or all alike end here, where the base has an end
    token.

    is_broken: (R,) bool, of the last token.
    """

    def __init__(self, end_ids: Sequence[int]) -> None:
        self._end_ids = list(end_ids)
        self._ending: Tensor | None = None  # (V,) the logits of a row that ends
        self.is_broken = torch.zeros(0, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # Some tokens may be ruled out by -inf, but not all. All are alike where only the sum of
        # squares in a norm is infinite: it divides by that.
        most = scores.amax(-1)  # with `amin` it takes a tenth of the time of `aminmax` on a CPU
        self.is_broken = ~most.isfinite() | (scores.amin(-1) == most)
        if scores.is_cpu and not self.is_broken.any():  # a GPU is not waited for
            return scores
        if self._ending is None:
            self._ending = torch.full_like(scores[0], -torch.inf if self._end_ids else 0)
            self._ending[self._end_ids] = 0
        return torch.where(self.is_broken[:, None], self._ending, scores)


class _Watching(Plan):
    """Under which a plan is followed up to the first number that is not finite.

    most: the layer to whose output experts added the largest number by then, as its bank, its place
    in it, and the input of that bank.
    """

    is_base_only = needs_all_tokens = False

    def __init__(self, plan: RoutingPlan) -> None:
        self._plan = plan
        self.places = plan.places
        self._is_over = False
        self._largest = 0.0
        self.most: tuple[ExpertBank, int, Tensor] | None = None

    def begin_pass(self, input_ids: Tensor) -> None:
        self._plan.begin_pass(input_ids)

    def add(self, y: Tensor, bank: ExpertBank, place: int, x: Tensor) -> Tensor:
        before = y.clone()
        after = self._plan.add(y, bank, place, x)
        self._is_over = self._is_over or not bool(x.isfinite().all())
        if not self._is_over:
            added = float((after - before).abs().amax())
            is_finite = bool(after.isfinite().all())
            if added > self._largest or not is_finite:
                self._largest, self.most = added, (bank, place, x)
            self._is_over = not is_finite
        return after

    def end_pass(self, hidden: Tensor) -> None:
        self._plan.end_pass(hidden)


@torch.inference_mode()
def fault_of(
    model: PreTrainedModel, library: ExpertLibrary, plan: RoutingPlan, ids: Sequence[int]
) -> str:
    """Why the numbers of a row are no longer finite: the row is read again.

    plan: of this row alone, without a recorder. ids: its tokens.
    """
    device = execution_device(model.get_input_embeddings())
    watching = _Watching(plan)
    with routed(watching):
        decoder_of(model)(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
    if plan.is_base_only or watching.most is None:
        return "the base's own numbers are too large to compute with; the answer ends here"
    bank, place, x = watching.most
    z = bank.project(x)
    weights = plan.weights(bank, z)[..., place, :]  # (1, T, E)
    parts = torch.linalg.vector_norm(
        z[..., place, :, :].float() * bank.singular_values[place], dim=-1
    )
    added = torch.where(weights > 0, weights * parts, 0).nan_to_num(torch.inf).amax((0, 1))
    name = library.names[int(bank.expert_ids[int(added.argmax())])]
    return (
        f"expert {name!r} makes numbers too large to compute with, at {bank.paths[place]}; the "
        "answer ends here: leave the expert out, or train it again"
    )
