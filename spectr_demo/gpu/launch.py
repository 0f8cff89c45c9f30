"""The operators as launches of `kernels`: the sizes and blocks of each.

Axes: as in `operators`.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from spectr_demo.gpu import kernels
from spectr_demo.gpu.rules import Rules

_TILE = 8192  # entries that a program of four warps holds at once in float32
_OPTIONS = {"enable_fp_fusion": True}  # Triton 3.9 warns where this is left open
_COLUMNS = 64  # of y, of a program: few, so that a row's programs fill the GPU


def add_chosen_(
    y: Tensor,
    z: Tensor,
    B: Tensor,
    place: int,
    singular_values: Tensor,
    rules: Rules,
    kept: Tensor | None,
    places: Tensor | None,
    weights: Tensor | None,
    scores: Tensor | None,
    step: Tensor | None,
) -> None:
    """See `operators.add_chosen_`."""
    (R, P, F, r), D = z.shape, B.shape[1]
    blocks = _blocks(rules, places, F, r)
    block_rank = next_power_of_2(r)
    with _on(y):
        kernels.add_chosen[R, cdiv(D, _COLUMNS)](
            y,
            y.stride(0),
            z,
            B,
            place,
            singular_values,
            *_tensors(rules),
            kept,
            places,
            weights,
            scores,
            step,
            0 if places is None else places.shape[1],
            WIDTH=0 if places is None else places.shape[-1],
            P=P,
            E=singular_values.shape[1],
            F=F,
            RANK=r,
            D=D,
            **blocks,
            BLOCK_RANK=block_rank,
            BLOCK_EXPERTS=min(blocks["ROOM"], max(1, _TILE // block_rank)),
            BLOCK_ROWS=min(_TILE // _COLUMNS, next_power_of_2(blocks["ROOM"] * r)),
            BLOCK_D=_COLUMNS,
            **_OPTIONS,
        )


def weigh_(
    z: Tensor,
    singular_values: Tensor,
    rules: Rules,
    places: Tensor | None,
    weights: Tensor | None,
    scores: Tensor | None,
) -> None:
    """See `operators.weigh_`."""
    N, P, E, r = z.shape
    with _on(z):
        kernels.weigh[N, P](
            z,
            N // rules.num_rows,
            singular_values,
            *_tensors(rules),
            places,
            weights,
            scores,
            WIDTH=0 if places is None else places.shape[-1],
            P=P,
            E=E,
            RANK=r,
            **_blocks(rules, places, E, r),
            **_OPTIONS,
        )


def project_kept(x: Tensor, A: Tensor, arrows: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """See `operators.project_kept`."""
    (N, P, E), D = arrows.shape, A.shape[1]
    r = len(A) // (P * E)
    z, kept = A.new_empty(N, P, num_kept, r), A.new_empty(N, P, num_kept, dtype=torch.int32)
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


def _tensors(rules: Rules) -> tuple[Tensor | None, ...]:
    """In the order in which kernels take them."""
    return (
        rules.measure,
        rules.top_k,
        rules.filter,
        rules.temperature,
        rules.is_merged,
        rules.mean,
        rules.std,
        rules.constant,
    )


def _blocks(rules: Rules, places: Tensor | None, num_experts: int, rank: int) -> dict[str, int]:
    """Of the choice: ROOM has a slot for each expert that a row may use, or that is recorded."""
    width = 0 if places is None else places.shape[-1]
    constant = 0 if rules.constant is None else num_experts
    block = next_power_of_2(num_experts)
    return {
        "BLOCK_F": block,
        "BLOCK_R": max(1, min(next_power_of_2(rank), _TILE // block)),
        "ROOM": next_power_of_2(max(rules.most, width, constant, 1)),
    }


def _on(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
