"""What a library of experts is made of: ranks, spectra, and how far the experts' inputs overlap."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectr_demo.experts import Adapter, ExpertLibrary
from spectr_demo.spectral import Aligned, subspace_overlap


@dataclass(frozen=True, kw_only=True)
class ExpertSummary:
    """One expert. All spectral figures are means over the layers that it touches.

    spectrum: (r,) share of the squared singular values by rank, falling, summing to 1: a steep
        one has a clear direction for Arrow to follow, a flat one needs SpectR's whole subspace.
    effective_rank: exp of that spectrum's entropy, between 1 and r (Roy & Vetterli 2007).
    update_norm: Frobenius norm of the weight update `scaling * B A`.
    """

    name: str
    source: str
    base_model: str
    rank: tuple[int, int]
    num_layers: int
    projections: list[str]
    num_bytes: int
    sha256: str
    spectrum: list[float]
    effective_rank: float
    update_norm: float

    @classmethod
    def from_adapter(cls, adapter: Adapter, aligned: Mapping[str, Aligned]) -> "ExpertSummary":
        rank = adapter.ranks[1]
        values = np.zeros((len(aligned), rank))
        for row, factors in zip(values, aligned.values(), strict=True):
            row[: factors.A.shape[0]] = factors.singular_values.numpy()
        energy = (values**2).sum(axis=1, keepdims=True)
        shares = np.divide(values**2, energy, out=np.zeros_like(values), where=energy > 0)
        entropy = -(shares * np.log(shares, out=np.zeros_like(shares), where=shares > 0)).sum(1)
        return cls(
            name=adapter.name,
            source=adapter.source,
            base_model=adapter.base_model,
            rank=adapter.ranks,
            num_layers=len(aligned),
            projections=adapter.projections,
            num_bytes=adapter.num_bytes,
            sha256=adapter.sha256,
            spectrum=shares.mean(axis=0).round(4).tolist(),
            effective_rank=float(np.exp(entropy).mean()),
            update_norm=float(np.sqrt(energy).mean()),
        )


def summarise(library: ExpertLibrary) -> list[ExpertSummary]:
    """A summary of each expert, in the library's order."""
    return [
        ExpertSummary.from_adapter(adapter, aligned)
        for adapter, aligned in zip(library.adapters, library.aligned, strict=True)
    ]


def overlaps(library: ExpertLibrary) -> NDArray[np.float64]:
    """(E, E) mean subspace overlap over the layers that both touch; NaN where there is none.

    0 is orthogonal, 1 the same subspace; two random ones of rank r overlap by r / D_in.
    """
    return np.array([[_overlap(a, b) for b in library.aligned] for a in library.aligned])


def _overlap(first: Mapping[str, Aligned], second: Mapping[str, Aligned]) -> float:
    shared: Sequence[str] = [path for path in first if path in second]
    if not shared:
        return float("nan")
    return float(np.mean([subspace_overlap(first[p].A, second[p].A) for p in shared]))


def to_json(library: ExpertLibrary) -> dict[str, Any]:
    """Summaries and overlaps as plain values; null where two experts share no layer."""
    matrix = overlaps(library)
    return {
        "experts": [vars(summary) for summary in summarise(library)],
        "subspace_overlap": {
            name: {
                other: None if np.isnan(value) else round(float(value), 4)
                for other, value in zip(library.names, row, strict=True)
            }
            for name, row in zip(library.names, matrix, strict=True)
        },
    }
