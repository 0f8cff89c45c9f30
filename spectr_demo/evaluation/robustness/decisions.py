"""Which expert each router chooses for one text, in every changed library.

Routers that look at tokens are asked on the activations of the text's own expert. `spectr-context`
chooses once for a text: what the bare base reads in the prompt decides.

Axes: T tokens, C columns of a layer, V candidates (see `variants`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectr_demo.base.decoder import decoder_of
from spectr_demo.base.prompts import decoder_inputs, shared_length
from spectr_demo.engine.layers import routed
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.plan import RoutingPlan
from spectr_demo.evaluation.listening import late_means, listen
from spectr_demo.evaluation.reading import Text
from spectr_demo.evaluation.robustness.libraries import Key, Library
from spectr_demo.evaluation.robustness.variants import Variants
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.detection import certainty, standing
from spectr_demo.routing.routers import parse_router

OF_TOKENS = ("arrow", "spectr", "norm", "spectr calibrated")
METHODS = (*OF_TOKENS, "spectr in context")
_SLACK = 1e-4  # equal scores may differ by rounding


def hear(
    engine: SpectrModel,
    variants: Variants,
    generic: Sequence[str],
    prompts: Sequence[Sequence[int]],
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """What each column's detector says of the generic prompts and of each prompt: by layer path
    (G, C) and (C,), standardised.

    generic: read in the same pass. They give the variants their statistics, and the detectors,
    which are too large to keep. prompts: token ids.
    """
    requests = engine.reader.requests([*map(engine.encode, generic), *prompts])
    is_generic = requests.owners < len(generic)
    ordinary: dict[str, Tensor] = {}
    heard: list[dict[str, Tensor]] = [{} for _ in prompts]

    def of_bank(bank: ExpertBank, x: Tensor) -> None:
        of_generic = x[is_generic.to(x.device)]
        for path in bank.paths:
            variants.measure(path, of_generic)
            scores = variants.detector(path, of_generic).scores(x)[:, 0]
            means = late_means(requests, scores)
            ordinary[path] = means[: len(generic)]
            for row, mean in zip(heard, means[len(generic) :], strict=True):
                row[path] = mean

    listen(engine, requests, of_bank)
    return ordinary, heard


def certainties(variants: Variants, heard: Mapping[str, Tensor], candidates: Tensor) -> Tensor:
    """How sure the layers are, in the mean, of each of the candidates (C',) among themselves:
    (..., C') from what was heard (..., C)."""
    num = torch.zeros(len(candidates), device=candidates.device)
    total: Tensor | float = 0.0
    for path, scores in heard.items():
        of_columns = scores.index_select(-1, variants.layers[path].columns)
        own = everywhere(variants, path, of_columns).index_select(-1, candidates)
        is_here = own.flatten(0, -2)[0] > -torch.inf if own.dim() > 1 else own > -torch.inf
        added = torch.zeros_like(own)
        if is_here.any():
            added[..., is_here] = certainty(own[..., is_here])
        total = total + added
        num += is_here
    assert isinstance(total, Tensor)
    return total / num.clamp(min=1)


def is_named(
    variants: Variants,
    ordinary: Mapping[str, Tensor],
    heard: Mapping[str, Tensor],
    library: Library,
) -> float:
    """1 where `spectr-context` names a right candidate for a text, 0.5 for as good a rival."""
    right, rivals = library
    candidates = torch.cat(library)
    of_text, of_ordinary = (certainties(variants, each, candidates) for each in (heard, ordinary))
    found = standing(of_text, of_ordinary)
    lead = found[: len(right)].max() - found[-len(rivals) :].max()
    return 0.5 if abs(lead) <= _SLACK else float(lead > 0)


def everywhere(variants: Variants, path: str, scores: Tensor) -> Tensor:
    """(..., V) of all candidates from those that touch the layer, -inf for the others."""
    layer = variants.layers[path]
    if len(layer.candidates) == variants.num_candidates:
        return scores
    shape = (*scores.shape[:-1], variants.num_candidates)
    return scores.new_full(shape, -torch.inf).index_copy(-1, layer.candidates, scores)


class _Decisions(RoutingPlan):
    """The plan of one text's own expert, which also decides at each layer in every library."""

    def __init__(
        self,
        engine: SpectrModel,
        variants: Variants,
        name: str,
        libraries: Mapping[Key, Library],
        text: Text,
    ) -> None:
        names = engine.library.names
        super().__init__([parse_router(f"single:{name}", names)], names)
        self._variants = variants
        self._libraries = libraries
        self._start = shared_length(engine.template.opening, text.prompt_ids)
        # The answer is made at the prompt's last token and every answer token but the last.
        self._answer = slice(len(text.prompt_ids) - 1 - self._start, None)
        zeros = torch.zeros(len(OF_TOKENS), device=engine.model.device)
        self._right, self._num = dict.fromkeys(libraries, zeros), dict.fromkeys(libraries, zeros)
        self._votes = {
            key: tuple(zeros.new_zeros(len(OF_TOKENS), len(ids)) for ids in library)
            for key, library in libraries.items()
        }

    def add(self, y: Tensor, bank: ExpertBank, place: int, x: Tensor) -> Tensor:
        self._decide(bank.paths[place], x[0])
        return super().add(y, bank, place, x)

    def _decide(self, path: str, x: Tensor) -> None:
        layer, variants = self._variants.layers[path], self._variants
        raw = variants.scores(path, x)
        scores = torch.cat([raw, variants.standardise(path, raw)[None]])
        scores = everywhere(variants, path, scores.index_select(-1, layer.columns))
        for key, library in self._libraries.items():
            self._count(key, *(scores.index_select(-1, ids) for ids in library))

    def _count(self, key: Key, right: Tensor, rival: Tensor) -> None:
        """right, rival: (methods, T, candidates), -inf where one does not touch the layer."""
        right, right_ids = right[:, self._start :].max(-1)
        rival, rival_ids = rival[:, self._start :].max(-1)
        counts = (right > -torch.inf) & (rival > -torch.inf)
        lead = torch.where(counts, right - rival, 0)
        # Rounding goes with the layer's scores.
        slack = _SLACK * right.abs().mean(-1, keepdim=True)
        is_right = torch.where(lead.abs() <= slack, 0.5, (lead > 0).float()) * counts
        self._right[key] = self._right[key] + is_right[:, self._answer].sum(-1)
        self._num[key] = self._num[key] + counts[:, self._answer].sum(-1)
        for_right, for_rivals = self._votes[key]
        for_right.scatter_add_(-1, right_ids, is_right)
        for_rivals.scatter_add_(-1, rival_ids, counts.float() - is_right)

    def result(self, key: Key) -> NDArray[np.float64]:
        """(2, methods): the share of right decisions, and whether the majority is right."""
        right, rival = (votes.amax(-1) for votes in self._votes[key])
        majority = torch.where(right == rival, 0.5, (right > rival).float())
        share = self._right[key] / self._num[key].clamp(min=1)
        return torch.stack([share, majority]).double().cpu().numpy()


def read_text(
    engine: SpectrModel,
    variants: Variants,
    name: str,
    libraries: Mapping[Key, Library],
    text: Text,
    ordinary: Mapping[str, Tensor],
    heard: Mapping[str, Tensor],
) -> dict[Key, NDArray[np.float64]]:
    """(2, methods) of each library, see `_Decisions.result`. ordinary, heard: of `hear`."""
    plan = _Decisions(engine, variants, name, libraries, text)
    ids = [*text.prompt_ids, *text.answer_ids[:-1]]
    with torch.inference_mode(), routed(plan):
        decoder = decoder_of(engine.model)
        decoder(**decoder_inputs([ids], engine.model.device), use_cache=False)
    return {
        key: np.c_[plan.result(key), [is_named(variants, ordinary, heard, library)] * 2]
        for key, library in libraries.items()
    }
