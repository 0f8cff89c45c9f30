"""What a library of experts is made of: ranks, spectra, and how far the experts' inputs overlap."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spectr_demo.experts.adapters import Adapter
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.routing.spectr import Aligned

# Mean subspace overlap from which two experts cannot be told apart, and the share of the median
# update below which one is called weak: docs/results.md, "Weak and alike experts" and "Experts
# trained again".
ALIKE, WEAK = 0.95, 0.33


@dataclass(frozen=True, kw_only=True)
class ExpertSummary:
    """One expert. All spectral figures are means over the layers that it touches.

    spectrum: (r,) share of the squared singular values by rank, falling, summing to 1. A steep one
        has a clear direction for Arrow to follow. A flat one needs SpectR's whole subspace.
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

    0 is orthogonal, 1 the same subspace. Two random ones of rank r overlap by r / D_in. For two
    experts at one layer it is `routing.spectr.subspace_overlap`. Here all pairs are one product.
    """
    E = len(library.aligned)
    total, count = np.zeros((E, E)), np.zeros((E, E))
    for path in dict.fromkeys(path for expert in library.aligned for path in expert):
        ids = [e for e, expert in enumerate(library.aligned) if path in expert]
        factors = [library.aligned[e][path].A for e in ids]
        rank = max(A.shape[0] for A in factors)
        stacked = torch.cat([nn.functional.pad(A, (0, 0, 0, rank - A.shape[0])) for A in factors])
        shared = (stacked @ stacked.mT).square().unflatten(0, (-1, rank)).unflatten(2, (-1, rank))
        ranks = (stacked.abs().amax(-1) > 0).unflatten(0, (-1, rank)).sum(1)
        least = torch.minimum(ranks[:, None], ranks)
        where = np.ix_(ids, ids)
        total[where] += (shared.sum((1, 3)) / least.clamp(min=1)).double().numpy()
        count[where] += 1
    return np.divide(total, count, out=np.full((E, E), np.nan), where=count > 0)


def overlap_of(library: ExpertLibrary, expert: int) -> NDArray[np.float64]:
    """(E,) one expert's row of `overlaps`, without the others'."""
    return overlap_with(library, library.aligned[expert])


def overlap_with(library: ExpertLibrary, aligned: Mapping[str, Aligned]) -> NDArray[np.float64]:
    """(E,) how far an expert, in the library or not, overlaps with each expert there.

    aligned: its factors by layer.
    """
    E = len(library.names)
    total, count = np.zeros(E), np.zeros(E)
    for bank in library.banks:
        if bank.run:
            continue
        ids = bank.expert_ids.numpy()
        P, num, r = bank.singular_values.shape
        ranks = (bank.singular_values > 0).sum(-1)
        for place, path in enumerate(bank.paths):
            if path not in aligned:
                continue
            own = aligned[path]
            A = bank.A.view(P, num * r, -1)[place].float()
            shared = (A @ own.A.to(A).mT).square().sum(-1).view(num, r).sum(-1)
            least = ranks[place].clamp(max=int((own.singular_values > 0).sum())).clamp(min=1)
            total[ids] += (shared / least).double().cpu().numpy()
            count[ids] += 1
    return np.divide(total, count, out=np.full(E, np.nan), where=count > 0)


def warnings(library: ExpertLibrary) -> list[str]:
    """What to know before routing between these experts: what was renamed or left out, pairs too
    alike, and weak ones."""
    return _warnings(library, overlaps(library), summarise(library))


def _warnings(
    library: ExpertLibrary, matrix: NDArray[np.float64], summaries: Sequence[ExpertSummary]
) -> list[str]:
    names = library.names
    found = [note for adapter in library.adapters for note in adapter.notes]
    for i, j in zip(*np.triu_indices(len(names), k=1), strict=True):
        if matrix[i, j] >= ALIKE:
            found.append(
                f"experts {names[i]!r} and {names[j]!r} respond to the same inputs (subspace "
                f"overlap {matrix[i, j]:.2f}): no router here can tell them apart; keep one, or "
                "merge them"
            )
    norms = {summary.name: summary.update_norm for summary in summaries}
    median = float(np.median(list(norms.values()))) if norms else 0.0
    for name, norm in norms.items():
        if norm < WEAK * median:
            found.append(
                f"expert {name!r} changes the base little: its update's norm is {norm:.2g}, the "
                f"median is {median:.2g}; it may be undertrained"
            )
    return found


def to_json(library: ExpertLibrary) -> dict[str, Any]:
    """Summaries, overlaps and warnings as plain values; null where two share no layer."""
    matrix, summaries = overlaps(library), summarise(library)
    return {
        "warnings": _warnings(library, matrix, summaries),
        "experts": [vars(summary) for summary in summaries],
        "subspace_overlap": {
            name: {
                other: None if np.isnan(value) else round(float(value), 4)
                for other, value in zip(library.names, row, strict=True)
            }
            for name, row in zip(library.names, matrix, strict=True)
        },
    }
