"""Variants of a library of experts, and the scores of all of them from one reading of a text.

Axes: T tokens, E experts of the library, C columns of a layer, V candidates, r rank. A *column* is
one set of factors at one layer; a *candidate* is one thing that can be chosen, an expert or a
variant of it, with a column at each layer that it touches. Candidates are numbered in blocks of E:
the library, its experts cut to each rank, its experts with noise of each size; after these come the
distractors of each seed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from spectr_demo.config import RouterConfig
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.detection import Detector, detector
from spectr_demo.routing.spectr import Aligned, align, arrow_scores, norm_scores, spectr_scores

Experts = tuple[Mapping[str, Aligned], ...]  # by layer path, in the library's order

_SCORES = (arrow_scores, spectr_scores, norm_scores)
SPECTR = 1  # its place among them


def cut(library: ExpertLibrary, rank: int) -> Experts:
    """The experts' truncated SVD: the first `rank` directions. Nothing is trained again."""
    return tuple(
        {path: Aligned(layer.A[:rank], layer.B[:, :rank]) for path, layer in expert.items()}
        for expert in library.aligned
    )


def with_noise(library: ExpertLibrary, sigmas: Sequence[float], seed: int) -> dict[float, Experts]:
    """By sigma, the experts with Gaussian noise on both raw LoRA factors, aligned again.

    sigma: Frobenius norm of the noise over the factor's own. All sigmas share one draw, so that
    they differ in size alone. Of B* only the singular values are kept: no score needs more.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(sigmas, dtype=torch.float32)[:, None, None]
    result: list[tuple[dict[str, Aligned], ...]] = [
        tuple({} for _ in library.adapters) for _ in sigmas
    ]
    for e, adapter in enumerate(library.adapters):
        for path, layer in adapter.read().items():
            factors = []
            for factor in (layer.lora_A.float(), layer.lora_B.float()):
                noise = torch.randn(factor.shape, generator=generator)
                factors.append(factor + sizes * (factor.norm() / noise.norm()) * noise)
            aligned = _without_outputs(align(factors[0], factors[1], layer.scaling))
            for experts, A, B in zip(result, aligned.A, aligned.B, strict=True):
                experts[e][path] = Aligned(A, B)
    return dict(zip(sigmas, result, strict=True))


def _without_outputs(layer: Aligned) -> Aligned:
    """The same A* and singular values without U: B is (..., 1, r), whatever D_out was."""
    return Aligned(layer.A, layer.singular_values.unsqueeze(-2))


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """pairs: the experts of all layers with this projection and D_in, shared by those layers; own:
    this layer's among them. noisy: sigma by sigma. candidates, columns: (V,) those that touch the
    layer and where their scores are."""

    pairs: ExpertBank
    own: slice
    noisy: ExpertBank
    candidates: Tensor
    columns: Tensor


class Variants:
    """Every candidate's factors, and their statistics over generic text."""

    def __init__(
        self,
        library: ExpertLibrary,
        ranks: Sequence[int],
        noisy: Mapping[float, Experts],
        seeds: Sequence[int],
        num_distractors: int,
    ) -> None:
        """noisy: as `with_noise` gives them. num_distractors: for each seed."""
        self.ranks, self.sigmas = tuple(ranks), tuple(noisy)
        self.num_experts = len(library.names)
        self.num_blocks = 1 + len(ranks) + len(noisy)
        self.num_distractors = num_distractors
        self.num_candidates = self.num_blocks * self.num_experts + len(seeds) * num_distractors
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        groups: dict[tuple[str, int], list[tuple[ExpertBank, int]]] = defaultdict(list)
        for bank in library.banks:
            for place, projection in enumerate(bank.projections):
                groups[projection, bank.A.shape[1]].append((bank, place))
        self.layers: dict[str, _Layer] = {}
        for places in groups.values():
            experts = [
                library.aligned[e][bank.paths[place]]
                for bank, place in places
                for e in bank.expert_ids.tolist()
            ]
            pairs = _stack(places[0][0], experts)
            start = 0
            for bank, place in places:
                own = slice(start, start := start + len(bank.expert_ids))
                layer = self._layer(bank, place, pairs, own, list(noisy.values()), generators)
                self.layers[bank.paths[place]] = layer
        self.statistics: dict[str, Tensor] = {}  # by layer path: (2, 3, C), mean and std
        shape = self.num_blocks, self.num_experts
        self._margins, self._num = torch.zeros(shape).double(), torch.zeros(shape).double()

    def _layer(
        self,
        bank: ExpertBank,
        place: int,
        pairs: ExpertBank,
        own: slice,
        noisy: Sequence[Experts],
        generators: Sequence[torch.Generator],
    ) -> _Layer:
        num_own, num_pairs, E = len(bank.expert_ids), len(pairs.expert_ids), self.num_experts
        ids = bank.expert_ids.tolist()
        columns = [torch.arange(num_pairs)[own]]
        columns.append(num_pairs + torch.arange((self.num_blocks - 1) * num_own))
        candidates = [block * E + bank.expert_ids for block in range(self.num_blocks)]
        if num_own < num_pairs:  # else no other layer has factors that fit here
            for s, generator in enumerate(generators):
                drawn = torch.randint(
                    num_pairs - num_own, (self.num_distractors,), generator=generator
                )
                columns.append(torch.where(drawn < own.start, drawn, drawn + num_own))
                first = self.num_blocks * E + s * self.num_distractors
                candidates.append(first + torch.arange(self.num_distractors))
        return _Layer(
            pairs=pairs,
            own=own,
            noisy=_stack(bank, [experts[e][bank.paths[place]] for experts in noisy for e in ids]),
            candidates=torch.cat(candidates).to(bank.A.device),
            columns=torch.cat(columns).to(bank.A.device),
        )

    def scores(self, path: str, x: Tensor) -> Tensor:
        """Scores of a layer's columns: (3, T, C) float32 (arrow, spectr, norm) from x (T, D_in).

        An expert cut to rank k scores with the first k rows of its A*, so with the same z.
        """
        layer = self.layers[path]
        z = layer.pairs.project(x)[:, 0]
        own, S = z[:, layer.own], layer.pairs.singular_values[0]
        parts = [(z, S), *((own[..., :k], S[layer.own, :k]) for k in self.ranks)]
        parts.append((layer.noisy.project(x)[:, 0], layer.noisy.singular_values[0]))
        config = RouterConfig(name="spectr")
        return torch.stack(
            [torch.cat([score(z, S, config) for z, S in parts], dim=-1) for score in _SCORES]
        )

    def measure(self, path: str, x: Tensor) -> None:
        """Statistics of a layer's columns (as `calibration` has them) and margins of its experts,
        from inputs (N, D_in) of generic text."""
        scores = self.scores(path, x).double()
        std, mean = torch.std_mean(scores, dim=1, correction=0)
        # An expert that never responds has no deviation, and its scores stay 0.
        std = torch.where(std > 1e-6 * mean.abs() + 1e-12, std, 1.0)
        self.statistics[path] = torch.stack([mean, std]).float()
        self._add_margins(path, scores[SPECTR])

    def _add_margins(self, path: str, scores: Tensor) -> None:
        """How far an expert leads the best other one, `(s - s') / (s + s')`, for every token."""
        layer = self.layers[path]
        num_own = layer.own.stop - layer.own.start
        if num_own < 2:
            return
        columns = layer.columns[: self.num_blocks * num_own]
        own = scores[:, columns].unflatten(-1, (-1, num_own))  # (N, blocks, E)
        library = own.clone()  # what an expert stands against: its like, or the clean experts
        library[:, 1 + len(self.ranks) :] = own[:, :1]
        best, indices = library.topk(2, dim=-1)
        is_best = indices[..., :1] == torch.arange(num_own, device=own.device)
        other = torch.where(is_best, best[..., 1:], best[..., :1])
        margins = ((own - other) / (own + other).clamp(min=1e-12)).sum(0).cpu()
        ids = layer.candidates[:num_own].cpu()  # of the first block: the library's own numbers
        self._margins[:, ids] += margins
        self._num[:, ids] += len(own)

    @property
    def margins(self) -> Tensor:
        """(blocks, E) means over all tokens and layers that were measured."""
        return self._margins / self._num

    def detector(self, path: str, x: Tensor) -> Detector:
        """Of a layer's columns, from inputs (N, D_in) of generic text."""
        layer = self.layers[path]
        pairs, noisy = (
            bank.A.view(bank.num_experts, -1, bank.A.shape[-1])
            for bank in (layer.pairs, layer.noisy)
        )
        parts = [pairs, *(pairs[layer.own, :k] for k in self.ranks), noisy]
        rank = max(part.shape[1] for part in parts)
        # Rows of zeros are directions that an expert does not have.
        A = torch.cat([pad(part, (0, 0, 0, rank - part.shape[1])) for part in parts])
        sizes = torch.zeros(1, len(A), rank, device=A.device)
        ids = torch.arange(len(A))
        columns = replace(
            layer.pairs, expert_ids=ids, A=A.flatten(0, 1), B=(), singular_values=sizes
        )
        return detector(columns, x)

    def standardise(self, path: str, scores: Tensor) -> Tensor:
        """SpectR's of a layer's scores (3, T, C), in standard deviations over generic text:
        (T, C)."""
        mean, std = self.statistics[path][:, SPECTR]
        return (scores[SPECTR] - mean) / std


def _stack(like: ExpertBank, experts: Sequence[Aligned]) -> ExpertBank:
    """A bank of any experts with the D_in of `like`, on its device and in its dtype."""
    return ExpertBank.from_aligned(
        like.paths[:1],
        {e: [_without_outputs(expert)] for e, expert in enumerate(experts)},
        device=like.A.device,
        dtype=like.A.dtype,
    )
