"""One token through one linear layer, as SpectR routes it, with the loaded experts' own numbers.

The bare base reads a prompt, and what one layer gets and gives is kept. The steps are those of
`routing/spectr.py`. Nothing is added to the base meanwhile, so an upper layer's input is the base's
own. What leaves this module is plain numbers, which may come from another process.

Axes: T tokens, P projections of a bank, E experts of the layer, K chosen, r rank.
"""

from collections import Counter, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass

import gradio as gr
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectr_demo.base.prompts import token_pieces
from spectr_demo.engine.batches import read_after
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.reading import Listening
from spectr_demo.engine.snapshot import Snapshot
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.routing.bank import ExpertBank, Mixed
from spectr_demo.routing.routers import ROUTERS, parse_router
from spectr_demo.routing.spectr import compose, select

ROUTER = "spectr-paper"  # several experts at once, so that there is something to mix
MAX_TOKENS = 128
Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Look:
    """What happens to one token in one linear layer.

    tokens: of the prompt, as text; token: the number of this one. experts: names of those that
    touch the layer. x: (D_in,) its input. z: (E, r) of each expert's directions. scores: (E,).
    chosen, weights: (K,) places among `experts`, the best first. mixed: (r,) the weighted sum of
    the chosen z. base_length, delta_length: of the base's output, and of what the experts add.
    votes: by expert, in how many linear layers it has this token's best score.
    """

    tokens: tuple[str, ...]
    token: int
    layer: int
    projection: str
    experts: tuple[str, ...]
    x: Floats
    z: Floats
    scores: Floats
    chosen: tuple[int, ...]
    weights: tuple[float, ...]
    mixed: Floats
    base_length: float
    delta_length: float
    votes: dict[str, int]


# Of a prompt, a token (None: the request's last), a decoder layer and a projection's name; and, as
# `snapshot`, whose experts.
LookInside = Callable[..., Generator[Look, None, None]]


def look_inside(model: SpectrModel) -> LookInside:
    """A function that uses the model, and so needs a GPU where there is one; it yields once."""

    def look(
        prompt: str,
        token: int | None,
        layer: int,
        projection: str,
        snapshot: Snapshot | None = None,
    ) -> Generator[Look, None, None]:
        try:
            found = model.between_tokens(
                lambda: look_at(model, prompt, token, layer, projection, snapshot)
            )
        except ValueError as error:
            # Of the errors that leave a ZeroGPU worker, only Gradio's own keep their text.
            raise gr.Error(str(error), print_exception=False) from error
        yield found

    return look


@torch.inference_mode()
def look_at(
    model: SpectrModel,
    prompt: str,
    token: int | None,
    layer: int,
    projection: str,
    snapshot: Snapshot | None = None,
) -> Look:
    """snapshot: see `SpectrModel.stream`.
    Raises ValueError for a prompt that is empty or too long, and for a layer without experts."""
    snapshot = snapshot or model.snapshot
    library = snapshot.library
    bank, place = _place(library, layer, projection)
    ids = model.encode(prompt)
    if len(ids) > MAX_TOKENS:
        raise ValueError(
            f"the prompt has {len(ids)} tokens; up to {MAX_TOKENS} are looked into: shorten it"
        )
    if token is None or not 0 <= token < len(ids):
        token = model.template.request(ids)[1] - 1
    watch = _Watch(bank, place, token)
    watch.places = snapshot.places
    deque(read_after(model.model, [], [(torch.tensor([ids]), watch)]), maxlen=0)
    config = parse_router(ROUTER, library.names)
    z = bank.project(watch.x)  # (1, P, E, r)
    scores = _scores(bank, z)
    experts, top_weights, _ = select(scores, config)
    weights = torch.zeros_like(scores).scatter(-1, experts, top_weights)
    values = compose(weights.to(z.dtype), z, config.composition)
    delta = torch.zeros(1, 1, len(watch.y), dtype=torch.float32, device=z.device)
    Mixed(bank, values[:, None], None).add_(delta, place)
    here = z[0, place].float()
    return Look(
        tokens=tuple(token_pieces(model.tokenizer, ids)),
        token=token,
        layer=layer,
        projection=projection,
        experts=tuple(library.names[expert] for expert in bank.expert_ids.tolist()),
        x=_plain(watch.x[0]),
        z=_plain(here),
        scores=_plain(scores[0, place]),
        chosen=tuple(experts[0, place].tolist()),
        weights=tuple(top_weights[0, place].tolist()),
        mixed=_plain(weights[0, place] @ here),
        base_length=float(watch.y.float().norm()),
        delta_length=float(delta.norm()),
        votes=dict(Counter(library.names[expert] for expert in watch.winners).most_common()),
    )


class _Watch(Listening):
    """Keeps what one layer got and gave for one token, and the best expert of all layers.

    x: (1, D_in), y: (D_out,), in the base's dtype.
    """

    x: Tensor
    y: Tensor

    def __init__(self, bank: ExpertBank, place: int, token: int) -> None:
        self._at, self._token = (bank, place), token
        self.winners: list[int] = []

    def add(self, y: Tensor, bank: ExpertBank, place: int, x: Tensor) -> Tensor:
        if (bank, place) == self._at:
            self.x, self.y = x[:, self._token], y[0, self._token]
        return super().add(y, bank, place, x)

    def listen(self, bank: ExpertBank, x: Tensor) -> None:
        best = _scores(bank, bank.project(x[:, self._token])).argmax(-1)[0].cpu()
        self.winners += bank.expert_ids[best].tolist()


def places(library: ExpertLibrary) -> dict[int, list[str]]:
    """By decoder layer, the projections that some expert touches."""
    found: dict[int, list[str]] = {}
    for bank in library.banks:
        for layer, projection in zip(*library.places(bank), strict=True):
            if not bank.run:
                found.setdefault(int(layer), []).append(library.projections[projection])
    return dict(sorted(found.items()))


def _place(library: ExpertLibrary, layer: int, projection: str) -> tuple[ExpertBank, int]:
    """The bank that the layer is in, and its place there."""
    for bank in library.banks:
        for place, (number, name) in enumerate(zip(*library.places(bank), strict=True)):
            if (number, library.projections[name]) == (layer, projection):
                return bank, place
    known = ", ".join(places(library).get(layer, [])) or "none"
    raise ValueError(
        f"no expert touches {projection} of layer {layer}; of this layer they touch {known}: "
        "choose one of those, or another layer"
    )


def _scores(bank: ExpertBank, z: Tensor) -> Tensor:
    """(..., P, E) of the router's score."""
    score = ROUTERS[ROUTER].score
    assert score is not None
    return score(z, bank.singular_values, ROUTERS[ROUTER].preset)


def _plain(values: Tensor) -> Floats:
    return values.float().cpu().numpy()
