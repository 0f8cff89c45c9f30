"""The experts that LAG's filter keeps for one token, found by reading a part of their factors.

The first row of each expert's A* is its arrow. All arrows are read in 8 bits; their factors are
read only where 8 bits leave open which experts are among the best. Axes: R rows, P projections of a
bank, E experts, F of them kept, r rank.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectr_demo.cpu.numbers import Floats, Ids, Stored, compiled, floats_at
from spectr_demo.cpu.products import Team, share, share_dots


@compiled
def best(values: Floats, num: int) -> Ids:
    """(num,) places of the largest of values (E,), the largest first; of equals the first."""
    places = np.zeros(num, np.int64)
    count = 0
    for e in range(len(values)):
        if count < num:
            count += 1
        elif not values[e] > values[places[num - 1]]:
            continue
        k = count - 1
        while k > 0 and values[e] > values[places[k - 1]]:
            places[k] = places[k - 1]
            k -= 1
        places[k] = e
    return places


class Arrows(NamedTuple):
    """The first row a of each expert's A* in 8 bits: half the bytes or fewer, and enough to tell
    which experts are not among the best.

    values (P * E, D_in) int8, scales (P * E,), errors (P * E,) float32: a is `scale * values` but
    for an error of that length, so `a . x` is known within `error * ||x||`.
    """

    values: NDArray[np.int8]
    scales: Floats
    errors: Floats

    @classmethod
    def of(cls, rows: Tensor) -> "Arrows":
        """rows: (P * E, D_in), float."""
        rows = rows.float()
        scales = rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
        values = (rows / scales).round()
        length = torch.linalg.vector_norm
        # And what the sums of float32 that are compared may differ by in their last places.
        errors = length(rows - scales * values, dim=-1) + 1e-5 * length(rows, dim=-1)
        return cls(values.to(torch.int8).numpy(), scales[:, 0].numpy(), errors.numpy())


@compiled
def keep(
    kept: Ids, x: int, is_bfloat16: bool, A: Stored, arrows: Arrows, rank: int, team: Team
) -> None:
    """kept (R, P, F) = places of the experts with the longest first entries of `z = A* x`, for x
    (R, 1, D_in) and A (P * E * r, D_in). A is read where the arrows leave it open."""
    (R, P, num_kept), D = kept.shape, A.shape[1]
    tokens = floats_at(x, is_bfloat16, R, D)
    E = len(arrows.scales) // P
    about = np.empty((R, P * E), np.float32)
    arrow, scale = arrows.values.ctypes.data, arrows.scales.ctypes.data
    share(about, tokens, arrow, 1, scale, P * E, team)
    surely, lengths = np.empty(E, np.float32), np.empty(P * E, np.float32)
    candidates, starts = np.empty(P * E, np.int64), np.empty(P * E, np.int64)
    ends = np.zeros(P + 1, np.int64)
    for row in range(R):
        squares = np.float32(0)
        for value in tokens[row]:
            squares += value * value
        length, count = np.sqrt(squares), 0
        for p in range(P):
            for e in range(E):
                surely[e] = about[row, p * E + e] - arrows.errors[p * E + e] * length
            least = surely[best(surely, num_kept)[num_kept - 1]]
            for e in range(E):
                i = p * E + e
                if about[row, i] + arrows.errors[i] * length < least:
                    continue
                candidates[count], starts[count] = e, i * rank
                count += 1
            ends[p + 1] = count
        share_dots(lengths[:count], A, starts[:count], tokens[row], team)
        for p in range(P):
            of_layer = np.abs(lengths[ends[p] : ends[p + 1]])
            longest = best(of_layer, num_kept)
            for f in range(num_kept):
                kept[row, p, f] = candidates[ends[p] + longest[f]]


@compiled
def project_chosen(
    z: Floats, x: int, is_bfloat16: bool, A: Stored, kept: Ids, num_experts: int, team: Team
) -> None:
    """`z = A* x` of a few experts: z (R, P, F, r), x (R, 1, D_in), A (P * E * r, D_in); kept
    (R, P, F): their places in the bank."""
    R, P, F, rank = z.shape
    tokens, rows = floats_at(x, is_bfloat16, R, A.shape[1]), np.empty((P, F, rank), np.int64)
    for row in range(R):
        for p in range(P):
            for f in range(F):
                for i in range(rank):
                    rows[p, f, i] = (p * num_experts + kept[row, p, f]) * rank + i
        share_dots(z[row].reshape(-1), A, rows.reshape(-1), tokens[row], team)
