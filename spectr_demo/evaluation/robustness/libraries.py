"""The changed libraries of the stress tests: which candidates are right, and which compete.

A library's key is the test, then what was changed: `("rank", "4")`, `("own", "0.3")`,
`("number", "100", "0")`; `("number",)` is the library as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectr_demo.evaluation.robustness.variants import Variants

Key = tuple[str, ...]


class Library(NamedTuple):
    """Candidates to choose from: those that are right for a text, and the others."""

    right: Tensor
    rivals: Tensor


def libraries_of(
    variants: Variants, own: int, seeds: Sequence[int], sizes: Sequence[int]
) -> dict[Key, Library]:
    """Every library in which a text of expert `own` is tested."""
    E = variants.num_experts
    others = [e for e in range(E) if e != own]

    def library(right: Iterable[int], rivals: Iterable[int]) -> Library:
        device = next(iter(variants.layers.values())).columns.device
        return Library(*(torch.tensor(list(ids), device=device) for ids in (right, rivals)))

    ranks, sigmas = variants.ranks, variants.sigmas
    libraries: dict[Key, Library] = {("number",): library([own], others)}
    for block, k in enumerate(ranks, start=1):
        libraries["rank", str(k)] = library([block * E + own], (block * E + e for e in others))
    for block, sigma in enumerate(map(str, sigmas), start=1 + len(ranks)):
        twin, twins = block * E + own, [block * E + e for e in others]
        libraries["own", sigma] = library([own], [twin])
        libraries["either", sigma] = library([own, twin], [*others, *twins])
        libraries["undertrained", sigma] = library([twin], others)
    for s, seed in enumerate(seeds):
        start = variants.num_blocks * E + s * variants.num_distractors
        for n in sizes:  # a smaller library is part of a larger one
            distractors = range(start, start + n - E)
            libraries["number", str(n), str(seed)] = library([own], [*others, *distractors])
    return libraries
