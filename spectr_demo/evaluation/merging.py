"""Static merges as one more expert: TIES and DARE, computed by PEFT's own utilities.

Both merge the LoRA factors A and B apart, each scaled by the root of its scaling, as PEFT's
`add_weighted_adapter` does; the result has the adapters' rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from peft.utils.merge_utils import dare_ties, ties
from torch import Tensor

from spectr_demo.experts.adapters import Adapter, LoraFactors

DENSITY = 0.5  # share of the entries that is kept


def ties_merge(adapters: Sequence[Adapter]) -> Adapter:
    """TIES (Yadav et al. 2023, arXiv 2306.01708): the largest entries, where signs agree."""
    weights = torch.ones(len(adapters))
    return _merge(adapters, "ties", lambda factors: ties(factors, weights, DENSITY))


def dare_merge(adapters: Sequence[Adapter], seed: int) -> Adapter:
    """DARE-TIES (Yu et al. 2023, arXiv 2311.03099): random entries, rescaled, where signs agree."""
    weights = torch.ones(len(adapters))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # PEFT draws from the global generator
        return _merge(
            adapters, f"dare-{seed}", lambda factors: dare_ties(factors, weights, DENSITY)
        )


def _merge(
    adapters: Sequence[Adapter], name: str, combine: Callable[[list[Tensor]], Tensor]
) -> Adapter:
    experts, merged = [adapter.read() for adapter in adapters], {}
    for path in dict.fromkeys(path for expert in experts for path in expert):
        factors = [expert[path] for expert in experts if path in expert]
        ranks = {layer.lora_A.shape[0] for layer in factors}
        if len(factors) < len(adapters) or len(ranks) > 1:
            raise ValueError(
                f"merge {name!r}: {path} has ranks {sorted(ranks)} in {len(factors)} of "
                f"{len(adapters)} adapters; TIES and DARE need one rank on the same layers"
            )
        roots = [math.sqrt(layer.scaling) for layer in factors]
        merged[path] = LoraFactors(
            lora_A=combine([r * f.lora_A.float() for r, f in zip(roots, factors, strict=True)]),
            lora_B=combine([r * f.lora_B.float() for r, f in zip(roots, factors, strict=True)]),
            scaling=1.0,
        )
    parts = "\n".join([name, str(DENSITY), *(adapter.sha256 for adapter in adapters)])
    return Adapter.of(
        merged,
        name=name,
        source=f"{name} merge of {len(adapters)} adapters",
        base_model=adapters[0].base_model,
        sha256=hashlib.sha256(parts.encode()).hexdigest(),
    )
