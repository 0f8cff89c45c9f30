"""What the operators of a GPU compute, in torch, with the method's own functions.

It runs on a CPU without Triton, and the kernels are tested against it.

Axes: R rows, T tokens, N = R * T tokens in the order of the rows, P projections of a bank, E
experts of z, K selected, r rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from spectr_demo.config import Composition, RouterConfig
from spectr_demo.gpu.rules import MEASURES, FlatRules, Rules
from spectr_demo.routing.spectr import (
    Score,
    arrow_scores,
    compose,
    norm_scores,
    select,
    spectr_scores,
)

SCORES: dict[int, Score] = {
    MEASURES["length"]: spectr_scores,
    MEASURES["first"]: arrow_scores,
    MEASURES["output"]: norm_scores,
}
Choice = tuple[Tensor, Tensor, Tensor]  # places in the bank, weights and scores, (T, P, K) each


def add_chosen_(
    ys: Sequence[Tensor],
    z: Tensor,
    Bs: Sequence[Tensor],
    singular_values: Tensor,
    flat: FlatRules,
    kept: Tensor | None,
    places: Tensor | None,
    weights: Tensor | None,
    scores: Tensor | None,
    step: Tensor | None,
) -> None:
    """See `operators.add_chosen_`."""
    rules, layers = Rules.from_flat(flat), slice(0, len(ys))
    for row in range(len(z)):
        token = slice(row, row + 1)
        ids = None if kept is None else kept[token]
        values, choice = _mix(z[token], singular_values, rules, row, layers, ids)
        for place, (y, B) in enumerate(zip(ys, Bs, strict=True)):
            factors = B.view(-1, z.shape[-1], B.shape[1]).float()
            if kept is not None:
                factors = factors[kept[row, place]]
            added = values[0, place].flatten() @ factors.flatten(0, 1)
            y[row] = (y[row].float() + added).to(y.dtype)
        if choice is None or places is None:
            continue
        assert weights is not None and scores is not None and step is not None
        slot = int(step)
        if slot < places.shape[1]:
            for buffer, part in zip((places, weights, scores), choice, strict=True):
                _write_(buffer[row, slot], part[0])


def weigh(
    z: Tensor,
    singular_values: Tensor,
    flat: FlatRules,
    places: Tensor | None,
    weights: Tensor | None,
    scores: Tensor | None,
) -> Tensor:
    """See `operators.weigh`."""
    rules = Rules.from_flat(flat)
    T, weighed = len(z) // rules.num_rows, torch.empty_like(z)
    for row in range(rules.num_rows):
        tokens, layers = slice(row * T, row * T + T), slice(0, z.shape[1])
        values, choice = _mix(z[tokens], singular_values, rules, row, layers, None)
        weighed[tokens] = values.to(z.dtype)
        if choice is not None and places is not None:
            assert weights is not None and scores is not None
            for buffer, part in zip((places, weights, scores), choice, strict=True):
                _write_(buffer[tokens], part)
    return weighed


def project_kept(x: Tensor, A: Tensor, arrows: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """See `operators.project_kept`."""
    _, P, E = arrows.shape
    kept = arrows.float().abs().topk(num_kept, dim=-1).indices
    A = A.view(P, E, -1, A.shape[1])
    factors = torch.stack([A[p, kept[:, p]] for p in range(P)], dim=1)  # (N, P, F, r, D_in)
    z = torch.einsum("npfrd,nd->npfr", factors.float(), x.to(A.dtype).float())
    return z, kept.int()


def _mix(
    z: Tensor,
    singular_values: Tensor,
    rules: Rules,
    row: int,
    layers: slice,
    kept: Tensor | None,
) -> tuple[Tensor, Choice | None]:
    """What the layers multiply by B*, float32, from z (T, P, E, r) of one row's tokens, and what it
    chose; None where its weights are constant. kept: (T, P, E) where the experts of z are in the
    bank."""
    composition: Composition = "parameters" if rules.is_merged[row] else "outputs"
    z = z.float()

    def of_experts(values: Tensor) -> Tensor:
        """(T, P, E) of the experts of z, from what all experts of the bank have, (R, P, E)."""
        values = values[row, layers].expand(*z.shape[:2], -1)
        return values if kept is None else values.gather(-1, kept.long())

    measure = int(rules.measure[row])
    if measure < 0:
        of_all = z.new_zeros(z.shape[:3]) if rules.constant is None else of_experts(rules.constant)
        return compose(of_all, z, composition), None
    config = RouterConfig(
        name="spectr",
        top_k=int(rules.top_k[row]),
        weighting="softmax" if rules.temperature[row] > 0 else "equal",
        temperature=float(rules.temperature[row]) or 1.0,
    )
    if kept is not None:
        index = kept.long().unsqueeze(-1).expand(*kept.shape, z.shape[-1])
        singular_values = singular_values.expand(len(z), -1, -1, -1).gather(2, index)
    values = SCORES[measure](z, singular_values, config)
    if rules.mean is not None and rules.std is not None:
        values = (values - of_experts(rules.mean)) / of_experts(rules.std)
    num_kept = int(rules.filter[row])
    if num_kept < z.shape[2]:
        best = arrow_scores(z, singular_values, config).topk(num_kept, dim=-1).indices
        values = torch.full_like(values, -torch.inf).scatter(-1, best, values.gather(-1, best))
    experts, weights, top = select(values, config)
    of_all = torch.zeros_like(values).scatter(-1, experts, weights)
    places = experts if kept is None else kept.gather(-1, experts)
    return compose(of_all, z, composition), (places, weights, top)


def _write_(buffer: Tensor, values: Tensor) -> None:
    """What a row chose, (..., K), to room for more, (..., K_max): the rest has no weight."""
    K = values.shape[-1]
    buffer[..., :K] = values.to(buffer.dtype)
    buffer[..., K:] = 0
