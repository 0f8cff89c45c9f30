"""Routing as three torch operators, each of which is one launch on a GPU.

On CUDA they are Triton kernels. On a CPU they are `reference.py`, or the same kernels in Triton's
interpreter where `TRITON_INTERPRET=1`. On the device `meta` they do nothing. None of them asks the
device for a value, so all can be part of a CUDA graph. They have no gradient.

Axes: R rows, T tokens, N = R * T tokens in the order of the rows, P projections of a bank, E
experts of the bank, F experts of z, K selected, r rank. F is E where z has all experts.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from spectr_demo.gpu import reference
from spectr_demo.gpu.rules import Rules

_RULES = (
    "Tensor measure, Tensor top_k, Tensor filter, Tensor temperature, Tensor is_merged, "
    "Tensor? mean, Tensor? std, Tensor? constant, int most"
)
_CHOICES = "Tensor(c!)? places, Tensor(d!)? weights, Tensor(e!)? scores"
_SCHEMAS = (
    f"add_chosen_(Tensor(a!)[] ys, Tensor z, Tensor[] Bs, Tensor singular_values, {_RULES}, "
    f"Tensor? kept, {_CHOICES}, Tensor? step) -> ()",
    f"weigh(Tensor z, Tensor singular_values, {_RULES}, {_CHOICES}) -> Tensor",
    "project_kept(Tensor x, Tensor A, Tensor arrows, int num_kept) -> (Tensor, Tensor)",
)
_NUM_RULES = len(fields(Rules))
_library = torch.library.Library("spectr", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema)


def add_chosen_(
    ys: Sequence[Tensor],
    z: Tensor,
    Bs: Sequence[Tensor],
    singular_values: Tensor,
    rules: Rules,
    *,
    kept: Tensor | None = None,
    places: Tensor | None = None,
    weights: Tensor | None = None,
    scores: Tensor | None = None,
    step: Tensor | None = None,
) -> None:
    """Score, select, weigh and add, for one token of each row at all layers of a bank.

    `y += sum_e w_e B*_e z_e` in place, with `sum_e w_e z_e` for each z_e in rows that are merged.
    Sums are float32, and rounded once. Of equal scores the expert that is first in z is chosen
    first. NaN counts as the largest score.

    ys: P of (R, D_out), all of one float dtype. z: (R, P, F, r) and Bs: P of (E * r, D_out), in the
    bank's dtype. D_out is the layer's own. singular_values: (P, E, r) float32. kept: (R, P, F)
    int32, where the experts of z are in the bank; None where z has all of them.

    places (R, C, P, K_max) int16 or int32, weights and scores (R, C, P, K_max) float32, step (1,)
    int64: where given, what the rows that score chose is written to slot step[0], by falling score;
    a slot that is not there is not written. Places are those in the bank. A row with a smaller K
    has weights of 0 after it.
    """
    assert len(ys) == len(Bs) == z.shape[1]
    assert len({y.dtype for y in ys}) == len({B.dtype for B in Bs}) == 1
    torch.ops.spectr.add_chosen_(
        ys, z, Bs, singular_values, *rules.flat, kept, places, weights, scores, step
    )


def weigh(
    z: Tensor,
    singular_values: Tensor,
    rules: Rules,
    *,
    places: Tensor | None = None,
    weights: Tensor | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """The same choice for any number of tokens: what the bank's layers multiply by B*.

    That is (N, P, E, r) from z of that shape and dtype, 0 for the experts that are not chosen. With
    it `y.addmm_(weighed[:, p].flatten(1), B[p])` is all that a layer adds.

    places (N, P, K_max) int16 or int32, weights and scores (N, P, K_max) float32: where given, what
    was chosen, as `add_chosen_` writes it. Rows that do not score leave theirs as they are.
    """
    assert len(z) % rules.num_rows == 0
    weighed: Tensor = torch.ops.spectr.weigh(
        z, singular_values, *rules.flat, places, weights, scores
    )
    return weighed


def project_kept(x: Tensor, A: Tensor, arrows: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """`z = A* x` of the experts that LAG's filter keeps: those with the longest arrows.

    x: (N, D_in), any float dtype. A: (P * E * r, D_in). arrows: (N, P, E), the first entry of z of
    each expert. num_kept: F, at most E. Returns z (N, P, F, r) float32, and kept (N, P, F)
    int32, the places of its experts, by falling length.
    """
    z, kept = torch.ops.spectr.project_kept(x, A, arrows, num_kept)
    return z, kept


def serve(device: torch.device) -> bool:
    """Whether routing runs by these operators there: on CUDA where Triton is installed, and on
    `meta`, where nothing is computed."""
    return device.type == "meta" or (device.type == "cuda" and _has_triton())


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _code(is_cuda: bool) -> ModuleType:
    if is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        return import_module("spectr_demo.gpu.launch")  # Triton may be missing
    return reference


def _implementation(name: str, is_cuda: bool) -> Callable[..., Any]:
    """An operator with what its schema has, from the function of that name that takes `Rules`."""
    start = {"add_chosen_": 4, "weigh": 2}.get(name)

    def run(*args: Any) -> Any:
        function = getattr(_code(is_cuda), name)
        if start is None:
            return function(*args)
        stop = start + _NUM_RULES
        return function(*args[:start], args[start:stop], *args[stop:])

    return run


def _nothing(*args: Any) -> None:
    """On the device `meta`: there are no values to change."""


def _kept_on_meta(x: Tensor, A: Tensor, arrows: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    N, P, E = arrows.shape
    shape = N, P, num_kept
    z = A.new_empty(*shape, len(A) // (P * E), dtype=torch.float32)
    return z, A.new_empty(shape, dtype=torch.int32)


_ON_META: dict[str, Callable[..., Any]] = {
    "add_chosen_": _nothing,
    "weigh": lambda z, *args: torch.empty_like(z),
    "project_kept": _kept_on_meta,
}
for _name, _on_meta in _ON_META.items():
    _library.impl(_name, _implementation(_name, is_cuda=True), "CUDA")
    _library.impl(_name, _implementation(_name, is_cuda=False), "CPU")
    _library.impl(_name, _on_meta, "Meta")
