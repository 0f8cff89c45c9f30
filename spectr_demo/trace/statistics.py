"""The statistics of one column: shares, dominant experts, probabilities. Arrays only.

A *share* is a mean weight over what was routed. So the shares of one token, layer or part sum to 1
where the router's weights do, and to 0 where nothing was routed. `RoutingTrace` has a method for
each statistic, which looks up the column by its label.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectr_demo.trace.column import NOT_ROUTED, ColumnTrace, Part, distinct

TIE_MARGIN = 1e-6  # two shares that are no further apart are equal: no expert leads

# Cells of a (T, L, E) table worked on at once: 32 MB of float64, whatever E is.
_CELLS_PER_CHUNK = 4_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class DominantExperts:
    """The expert of largest weight per token and layer, in one projection or over all.

    expert: (T, L) int16, `NOT_ROUTED` where no expert was used.
    weight: (T, L) float32, its weight there (the mean over the routed projections).
    score: (T, L) float32, its score there (the mean over the projections that selected it), NaN
        where the router computes none.
    is_tied: (T, L) bool, another expert has the same weight and score: none dominates. Those of
        equal weight are ranked by score.
    """

    expert: NDArray[np.int16]
    weight: NDArray[np.float32]
    score: NDArray[np.float32]
    is_tied: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class BestScores:
    """Which expert a layer's scores put first, whatever was used then.

    expert: (T, L) int16, `NOT_ROUTED` where nothing was scored. lead: (T, L) float32 in [0, 1],
    over the second. Of scores of single tokens: the share of the layer's projections that put it
    first, less that of the second; equal ones are ranked by score. Of a request that was read
    before: the lead in certainty.
    """

    expert: NDArray[np.int16]
    lead: NDArray[np.float32]


def token_share(column: ColumnTrace, num_experts: int) -> NDArray[np.float32]:
    """(T, E) float32: each token's mean weight per expert over its routed layers and projections.

    Rows of tokens that were not routed are 0.
    """
    share = _mean_weights(column.experts, column.weights, axis=0, num_experts=num_experts)
    return np.broadcast_to(share, (column.num_tokens, num_experts))


def layer_share(column: ColumnTrace, num_experts: int, part: Part) -> NDArray[np.float32]:
    """(L, E) float32: each layer's mean weight per expert over a part's tokens and projections.

    Only routed places count. Layers without routing are 0.
    """
    where = column.part_slice(part)
    share = _mean_weights(
        column.experts[where], column.weights[where], axis=1, num_experts=num_experts
    )
    return np.broadcast_to(share, (column.experts.shape[1], num_experts))


def share(column: ColumnTrace, num_experts: int, part: Part) -> NDArray[np.float32]:
    """(E,) float32: the mean of `token_share` over a part's tokens that were read; 0 where none is.

    What is missing to 1 was left to the base.
    """
    where = column.part_slice(part)
    is_read = is_token_read(column)[where]
    of_token = token_share(column, num_experts)[where]
    return of_token[is_read].sum(axis=0) / np.float32(max(1, is_read.sum()))


def token_scores(column: ColumnTrace, num_experts: int) -> NDArray[np.float32]:
    """(T, E) float32: each token's mean score per expert over the places that selected it.

    Of a router that reads requests: the standing in the token's lane. NaN where there is none.
    """
    if column.reading is not None:
        standing = np.append(column.reading.standing, np.full((1, num_experts), np.nan), axis=0)
        return standing[column.reading.lanes].astype(np.float32)  # -1 is the row of NaN
    experts, scores = distinct(column.experts, column.scores)
    mean = _mean_scores(experts, scores, axes=(0,), num_experts=num_experts)
    return np.broadcast_to(mean.astype(np.float32), (column.num_tokens, num_experts))


def is_token_read(column: ColumnTrace) -> NDArray[np.bool_]:
    """(T,) bool: whether any expert, or the base alone, served the token.

    Not read are the last token of a router that looks at each of them, and blanks between requests.
    """
    if column.reading is not None:
        return column.reading.lanes >= 0
    is_read = np.ones(column.num_tokens, np.bool_)
    is_read[-1] = is_token_routed(column)[-1] or not column.is_routed
    return is_read


def is_token_routed(column: ColumnTrace) -> NDArray[np.bool_]:
    """(T,) bool: whether any layer used any expert for the token."""
    (experts,) = distinct(column.experts)
    is_routed = (experts != NOT_ROUTED).any(axis=(1, 2, 3))
    return np.broadcast_to(is_routed, (column.num_tokens,))


def dominant_tokens(
    column: ColumnTrace, num_experts: int
) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """Each token's expert of largest share, and its lead over the second.

    Returns (T,) int16 expert ids, `NOT_ROUTED` where the token was not routed, and (T,) float32
    leads >= 0. Experts of equal share are ranked by score, with a lead of 0.
    """
    of_token, scores = token_share(column, num_experts), token_scores(column, num_experts)
    first, margin, _ = _first(of_token, scores)
    expert = np.where(is_token_routed(column), first, NOT_ROUTED)
    return expert.astype(np.int16), margin.astype(np.float32)


def dominant_cells(
    column: ColumnTrace, num_experts: int, projection: int | None = None
) -> DominantExperts:
    """The dominant expert of every (token, layer).

    projection: a place on the P axis; None takes the mean over all projections.
    """
    chosen = slice(None) if projection is None else slice(projection, projection + 1)
    experts, weights, scores = distinct(
        column.experts[:, :, chosen], column.weights[:, :, chosen], column.scores[:, :, chosen]
    )
    T, L = experts.shape[:2]
    dominant = np.full((T, L), NOT_ROUTED, np.int16)
    weight = np.zeros((T, L), np.float32)
    is_tied = np.zeros((T, L), np.bool_)
    step = max(1, _CELLS_PER_CHUNK // max(1, L * num_experts))
    for start in range(0, T, step):
        rows = slice(start, start + step)
        total, count = _weight_sums(
            experts[rows], weights[rows], axes=(0, 1), num_experts=num_experts
        )
        mean = total / np.maximum(count, 1)[..., None]
        mean_scores = _mean_scores(
            experts[rows], scores[rows], axes=(0, 1), num_experts=num_experts
        )
        first, _, has_equal = _first(mean, mean_scores)
        dominant[rows] = np.where(count > 0, first, NOT_ROUTED)
        weight[rows] = np.take_along_axis(mean, first[..., None], axis=-1)[..., 0]
        is_tied[rows] = has_equal & (count > 0)
    full = (column.num_tokens, column.experts.shape[1])
    return DominantExperts(
        expert=np.broadcast_to(dominant, full),
        weight=np.broadcast_to(weight, full),
        score=np.broadcast_to(_mean_score(dominant, experts, scores), full),
        is_tied=np.broadcast_to(is_tied, full),
    )


def best_scores(column: ColumnTrace, num_experts: int) -> BestScores | None:
    """The expert of best score in every (token, layer); None where there are no scores."""
    if column.reading is not None:
        return _best_certainty(column)
    experts, scores = distinct(column.experts, column.scores)
    is_scored = np.isfinite(scores)
    if not is_scored.any():
        return None
    slot = np.where(is_scored, scores, -np.inf).argmax(axis=-1)[..., None]
    is_scored, best, score = (
        np.take_along_axis(part, slot, axis=-1) for part in (is_scored, experts, scores)
    )
    best = np.where(is_scored, best, NOT_ROUTED)
    T, L = best.shape[:2]
    expert = np.full((T, L), NOT_ROUTED, np.int16)
    lead = np.zeros((T, L), np.float32)
    step = max(1, _CELLS_PER_CHUNK // max(1, L * num_experts))
    for start in range(0, T, step):
        rows = slice(start, start + step)
        votes, count = _weight_sums(
            best[rows], is_scored[rows], axes=(0, 1), num_experts=num_experts
        )
        mean_scores = _mean_scores(best[rows], score[rows], axes=(0, 1), num_experts=num_experts)
        first, margin, _ = _first(votes / np.maximum(count, 1)[..., None], mean_scores)
        expert[rows] = np.where(count > 0, first, NOT_ROUTED)
        lead[rows] = margin
    full = (column.num_tokens, L)
    return BestScores(expert=np.broadcast_to(expert, full), lead=np.broadcast_to(lead, full))


def _best_certainty(column: ColumnTrace) -> BestScores:
    """Of the request that each token belongs to."""
    assert column.reading is not None
    certainty, lanes = column.reading.certainty, column.reading.lanes
    is_known = np.isfinite(certainty)
    # -1 is the least certainty there is; blanks, which have lane -1, take a lane of nothing.
    first, margin, _ = _first(np.where(is_known, certainty, -1), certainty)
    expert = np.where(is_known.any(axis=-1), first, NOT_ROUTED).astype(np.int16)
    nothing = np.full((1, expert.shape[1]), NOT_ROUTED, np.int16)
    lead = np.append(margin.clip(0, 1), np.zeros(nothing.shape), axis=0).astype(np.float32)
    return BestScores(expert=np.append(expert, nothing, axis=0)[lanes], lead=lead[lanes])


def mean_logprob(column: ColumnTrace) -> float:
    """Mean log-probability of a column's answer tokens under its own model, in nats; NaN where it
    has none."""
    logprob = column.logprob[column.part_slice("answer")]
    return float(logprob.mean()) if len(logprob) else float("nan")


def _mean_score(
    expert: NDArray[np.int16], experts: NDArray[np.int16], scores: NDArray[np.float32]
) -> NDArray[np.float32]:
    """(T, L) float32: the mean score of each cell's expert where a projection selected it."""
    has_score = (experts == expert[..., None, None]) & np.isfinite(scores)
    num_scores = has_score.sum(axis=(2, 3))
    total = np.where(has_score, scores, 0.0).sum(axis=(2, 3), dtype=np.float64)
    mean = np.where(num_scores > 0, total / np.maximum(num_scores, 1), np.nan)
    return mean.astype(np.float32)


def _mean_weights(
    experts: NDArray[np.int16], weights: NDArray[np.float32], *, axis: int, num_experts: int
) -> NDArray[np.float32]:
    """(n, E) float32 mean weights over the routed cells; n is 1 where the axis is constant."""
    experts, weights = distinct(experts, weights)
    total, count = _weight_sums(experts, weights, axes=(axis,), num_experts=num_experts)
    return (total / np.maximum(count, 1)[:, None]).astype(np.float32)


def _weight_sums(
    experts: NDArray[np.int16],
    weights: NDArray[np.float32],
    *,
    axes: tuple[int, ...],
    num_experts: int,
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Sum the weights per expert over all axes but `axes` (of T, L, P; K is always summed).

    Returns (*kept, E) sums and (*kept,) counts of the (token, layer, projection) cells in which
    any expert was used.
    """
    kept = tuple(experts.shape[axis] for axis in axes)
    cell = np.zeros((1,) * 4, np.intp)
    for axis in axes:
        place = np.arange(experts.shape[axis]).reshape([-1 if a == axis else 1 for a in range(4)])
        cell = cell * experts.shape[axis] + place
    is_selected = experts != NOT_ROUTED
    # Slots that are not routed weigh 0: any valid id will do for them.
    key = cell * num_experts + np.where(is_selected, experts, 0)
    size = int(np.prod(kept)) * num_experts
    total: NDArray[np.float64] = np.bincount(
        key.ravel(), weights=weights.ravel(), minlength=size
    ).astype(np.float64, copy=False)
    summed = tuple(axis for axis in range(3) if axis not in axes)
    count: NDArray[np.intp] = np.count_nonzero(is_selected.any(axis=3), axis=summed)
    return total.reshape(*kept, num_experts), count


def _mean_scores(
    experts: NDArray[np.int16],
    scores: NDArray[np.float32],
    *,
    axes: tuple[int, ...],
    num_experts: int,
) -> NDArray[np.float64]:
    """(*kept, E) mean score per expert where it has one, over all axes but `axes`; else NaN."""
    is_scored = np.isfinite(scores) & (experts != NOT_ROUTED)
    scored = np.where(is_scored, experts, NOT_ROUTED)
    total, _ = _weight_sums(
        scored, np.where(is_scored, scores, 0), axes=axes, num_experts=num_experts
    )
    num, _ = _weight_sums(scored, is_scored, axes=axes, num_experts=num_experts)
    return np.where(num > 0, total / np.maximum(num, 1), np.nan)


def _first(
    share: NDArray[Any], scores: NDArray[Any]
) -> tuple[NDArray[np.intp], NDArray[Any], NDArray[np.bool_]]:
    """The index of the largest value on the last axis, its lead over the second largest, and
    whether another is its equal in score, too.

    Equal values are ranked by score; those without one come last.
    """
    if share.shape[-1] == 0:
        nothing = np.zeros(share.shape[:-1])
        return nothing.astype(np.intp), nothing, nothing.astype(np.bool_)
    is_largest = share >= share.max(axis=-1, keepdims=True) - TIE_MARGIN
    rank = np.where(is_largest, np.where(np.isfinite(scores), scores, -1e30), -np.inf)
    first = rank.argmax(axis=-1)
    best = np.take_along_axis(rank, first[..., None], axis=-1)
    has_equal = np.count_nonzero(rank == best, axis=-1) > 1
    if share.shape[-1] == 1:
        return first, share[..., 0], has_equal
    largest_two = np.partition(share, -2, axis=-1)
    return first, largest_two[..., -1] - largest_two[..., -2], has_equal
