"""The operators as launches of `kernels`: the sizes and blocks of each.

Axes: as in `operators`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from spectr_demo.gpu import kernels
from spectr_demo.gpu.rules import FlatRules

_TILE = 8192  # entries that a program of four warps holds at once in float32
_OPTIONS = {"enable_fp_fusion": True}  # Triton 3.9 warns where this is left open
_COLUMNS = 128  # of y, of a program: few, so that a row's programs fill the GPU


def add_chosen_(
    ys: Sequence[Tensor],
    z: Tensor,
    Bs: Sequence[Tensor],
    singular_values: Tensor,
    rules: FlatRules,
    kept: Tensor | None,
    places: Tensor | None,
    weights: Tensor | None,
    scores: Tensor | None,
    step: Tensor | None,
) -> None:
    """See `operators.add_chosen_`."""
    *of_rows, constant, most = rules
    R, P, F, r = z.shape
    num_slots, width = (0, 0) if places is None else (places.shape[1], places.shape[3])
    room = max(most, width, 0 if constant is None else F)
    columns = tuple([B.shape[1] for B in Bs])
    num_blocks, sizes = _sizes_of_token(P, singular_values.shape[1], F, r, columns, width, room)
    with _on(z):
        kernels.add_chosen[R, num_blocks](
            tuple(ys),
            tuple([y.stride(0) for y in ys]),
            z,
            tuple(Bs),
            singular_values,
            *of_rows,
            constant,
            kept,
            places,
            weights,
            scores,
            step,
            num_slots,
            **sizes,
        )


@cache
def _sizes_of_token(
    P: int, E: int, F: int, r: int, columns: tuple[int, ...], width: int, room: int
) -> tuple[int, dict[str, object]]:
    """Programs for each row, and the sizes of a launch of `kernels.add_chosen`."""
    starts = list(accumulate((cdiv(D, _COLUMNS) for D in columns), initial=0))
    blocks, block_rank = _blocks(F, r, room), next_power_of_2(r)
    return starts.pop(), {
        "WIDTH": width,
        "P": P,
        "E": E,
        "F": F,
        "RANK": r,
        "COLUMNS": columns,
        "STARTS": tuple(starts),
        **blocks,
        "BLOCK_RANK": block_rank,
        "BLOCK_EXPERTS": min(blocks["ROOM"], max(1, _TILE // block_rank)),
        "BLOCK_ROWS": min(_TILE // _COLUMNS, next_power_of_2(blocks["ROOM"] * r)),
        "BLOCK_D": _COLUMNS,
        **_OPTIONS,
    }


def weigh(
    z: Tensor,
    singular_values: Tensor,
    rules: FlatRules,
    places: Tensor | None,
    weights: Tensor | None,
    scores: Tensor | None,
) -> Tensor:
    """See `operators.weigh`."""
    measure, *of_rows, constant, most = rules
    N, P, E, r = z.shape
    width = 0 if places is None else places.shape[2]
    room = max(most, width, 0 if constant is None else E)
    weighed = torch.empty_like(z)
    with _on(z):
        kernels.weigh[N, P](
            weighed,
            z,
            N // len(measure),
            singular_values,
            measure,
            *of_rows,
            constant,
            places,
            weights,
            scores,
            WIDTH=width,
            P=P,
            E=E,
            RANK=r,
            **_blocks(E, r, room),
            **_OPTIONS,
        )
    return weighed


def project_kept(x: Tensor, A: Tensor, arrows: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """See `operators.project_kept`."""
    (N, P, E), D = arrows.shape, A.shape[1]
    r = len(A) // (P * E)
    z = A.new_empty(N, P, num_kept, r, dtype=torch.float32)
    kept = A.new_empty(N, P, num_kept, dtype=torch.int32)
    block_rank = next_power_of_2(r)
    with _on(x):
        kernels.project_kept[N * P, num_kept](
            z,
            kept,
            x,
            x.stride(0),
            A,
            arrows,
            P=P,
            E=E,
            F=num_kept,
            RANK=r,
            D=D,
            BLOCK_E=next_power_of_2(E),
            BLOCK_RANK=block_rank,
            BLOCK_D=max(1, min(next_power_of_2(D), _TILE // block_rank)),
            **_OPTIONS,
        )
    return z, kept


@cache
def _blocks(num_experts: int, rank: int, room: int) -> dict[str, int]:
    """Of the choice. room: a slot for each expert that a row may use, or that is recorded."""
    block = next_power_of_2(num_experts)
    return {
        "BLOCK_F": block,
        "BLOCK_R": max(1, min(next_power_of_2(rank), _TILE // block)),
        "ROOM": next_power_of_2(max(room, 1)),
    }


def _on(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.get_device()) if tensor.is_cuda else nullcontext()
