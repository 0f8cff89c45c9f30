"""Whether attention tells which request is being answered, against lanes.

    python benchmarks/attention.py [--num 90]

Messages of two requests, as in the composition benchmark, with their reference answers forced.
A figure is a mean over messages, of each part of an answer: which share of its `tokens` is routed
to its own expert, whether the `first` one is, and whether all are, the `whole` part. A token is
routed where it comes from: the first one at the prompt's last token. The rows:

    decay       the mean evidence of the tokens so far; one that is n back counts 0.85^n
    attention   the mean evidence of the request tokens that a token attends to
    lanes       the router that is served: part i has the expert of lane i
    both        lanes say what a token of the prompt is for, attention says which lane is answered:
                by the mean evidence of the lanes, or by a vote for one lane

Attention depends on who reads. `base`: the base without experts. `own`: the experts that the row
chooses; those chosen from the base's attention read the text, choose again from theirs, and so on.
`by hand`: each part's own expert, which no router can know (the segment oracle, 1.0 by definition).

The layers are those that follow best in messages of two requests that the base wrote and answered
itself, without data of the tasks. The template, on which most attention rests, is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from spectr_demo import load
from spectr_demo.base.decoder import decoder_of
from spectr_demo.base.prompts import encode_answer
from spectr_demo.config import DEFAULT_ROUTER, library_versions
from spectr_demo.engine.layers import routed
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.plan import Plan
from spectr_demo.engine.reading import Lane, Listening
from spectr_demo.evaluation import messages as wording
from spectr_demo.evaluation.claims import paired
from spectr_demo.evaluation.composition import make_messages
from spectr_demo.evaluation.segments import SegmentPlan, Segments, newline_id
from spectr_demo.evaluation.tasks import SPLIT_SEED, TASKS
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.detection import certainty
from spectr_demo.routing.routers import parse_router
from spectr_demo.training.foreign import foreign_requests

RESULTS = Path(__file__).resolve().parent / "results" / "attention.json"
NUM_OWN = 40  # messages that the base wrote itself
NUM_LAYERS = 4  # that are listened to
NUM_ROUNDS = 3  # in which a row's own experts read
FADING = 0.85
LANES = "lanes"

FIGURES = ("tokens", "first", "whole")
Shares = list[list[float]]  # of each part, the figures
Choose = Callable[[Tensor], Tensor]  # from attention (T, T) the expert of each token (T,)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A message of two requests and its answer.

    ids: (T,) of both, without the last token, from which nothing comes. owners: (T,) int64, the
    part that a token asks for, or that comes from it. start, stop: of the request's tokens. num:
    tokens of the prompt.
    """

    ids: list[int]
    owners: Tensor
    start: int
    stop: int
    num: int

    @classmethod
    def of(
        cls, engine: SpectrModel, asked: Sequence[wording.Piece], answers: Sequence[str]
    ) -> Asked:
        ids, owners = wording.PromptEncoder(engine.tokenizer)(asked)
        start, stop = engine.template.request(ids)
        line = engine.tokenizer(answers[0], add_special_tokens=False)["input_ids"]
        first, second = [*line, newline_id(engine)], encode_answer(engine.tokenizer, answers[1])
        # The template's closing belongs to the first part, as with the segment oracle.
        owners = [0 if owner == wording.CLOSING else owner for owner in owners[:-1]]
        return cls(
            ids=[*ids, *first, *second[:-1]],
            owners=torch.tensor([*owners, *[0] * len(first), *[1] * len(second)]),
            start=start,
            stop=stop,
            num=len(ids),
        )

    def shares(self, is_right: Tensor) -> Shares:
        """is_right: (T,) bool."""
        of_answer, is_right = self.owners[self.num - 1 :], is_right[self.num - 1 :].float()
        parts = [is_right[of_answer == part] for part in (0, 1)]
        return [[float(part.mean()), float(part[0]), float(part.min())] for part in parts]

    def follows(self, attention: Tensor) -> Shares:
        """Where a token of the right request gets more of the attention (T, T), in the mean."""
        request = slice(self.start, self.stop)
        attention, owners = attention[:, request], self.owners[request]
        mass = torch.stack([attention[:, owners == part].mean(-1) for part in (0, 1)])
        return self.shares(mass.argmax(0) == self.owners)


class Evidence(Listening):
    """Collects the certainty of each token, (T, P, E) of each bank."""

    def __init__(self, engine: SpectrModel) -> None:
        self._detectors = engine.reader.ordinary.detectors
        self.by_bank: list[Tensor] = []

    def listen(self, bank: ExpertBank, x: Tensor) -> None:
        self.by_bank.append(certainty(self._detectors[bank].scores(x[0])).cpu())


@torch.inference_mode()
def read(engine: SpectrModel, ids: Sequence[int], plan: Plan | None = None) -> Tensor:
    """(L, T, T) float32 attention from a token to those up to it, the mean of the heads."""
    model = engine.model
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")  # others return no attention
    try:
        with routed(plan):
            row = torch.tensor([ids], device=engine.base.device)
            out = decoder_of(model)(input_ids=row, output_attentions=True)
    finally:
        model.set_attn_implementation(usual)
    return torch.stack([layer[0].float().mean(0).cpu() for layer in out.attentions])


def read_with(engine: SpectrModel, asked: Asked, experts: Tensor) -> Tensor:
    """The same, each token read by its expert (T,), those of the template's opening by none."""
    num = len(engine.library.names)
    owners = [*[wording.OPENING] * asked.start, *experts[asked.start :].tolist()]
    row = Segments(
        ids=tuple(asked.ids), owners=tuple(owners), experts=tuple(range(num)), caps=(0,) * num
    )
    device = engine.base.device
    plan = SegmentPlan([row], newline_ids=[], newline_id=0, end_ids=[], device=device)
    return read(engine, asked.ids, plan)


def by_lanes(asked: Asked, lanes: Sequence[Lane]) -> dict[str, Choose]:
    """A token in a lane has the lane's expert, whatever it attends to."""
    at = torch.arange(len(asked.ids))
    is_in = torch.stack([(lane.start <= at) & (at < lane.stop) for lane in lanes], -1)
    of_lanes = torch.stack([lane.standing for lane in lanes if lane.standing is not None])

    def choose(weights: Tensor) -> Tensor:
        """weights: (T, lanes)."""
        return (torch.where(is_in.any(-1, keepdim=True), is_in, weights) @ of_lanes).argmax(-1)

    def votes(attention: Tensor) -> Tensor:
        mass = attention @ is_in.float() / is_in.sum(0)
        return torch.nn.functional.one_hot(mass.argmax(-1), len(lanes)).float()

    return {
        "both": lambda attention: choose(attention @ is_in.float()),
        "both, vote": lambda attention: choose(votes(attention)),
    }


def measure(
    engine: SpectrModel, asked: Asked, experts: Sequence[int], layers: Sequence[int]
) -> dict[str, dict[str, Shares]]:
    """One message, whose parts have these experts: where attention follows, and what is right."""
    served = parse_router(DEFAULT_ROUTER, engine.library.names)
    always = replace(served, confidence=None)  # as attention does, it takes an expert for all
    prompt = asked.ids[: asked.num]
    lanes = engine.lanes(always, prompt)
    own = torch.tensor(experts)[asked.owners.clamp(min=0)]
    follows, right = {}, {}

    listener = Evidence(engine)
    readings = {"base": read(engine, asked.ids, listener)}
    readings["by hand"] = read_with(engine, asked, own)
    evidence, request = torch.cat(listener.by_bank, 1).mean(1), slice(asked.start, asked.stop)
    ways: dict[str, Choose] = {
        "attention": lambda weights: (weights[:, request] @ evidence[request]).argmax(-1),
        **by_lanes(asked, lanes),
    }
    for reader, attention in readings.items():
        for label, weights in (("all layers", attention), ("chosen layers", attention[layers])):
            follows[f"{label}, {reader}"] = asked.follows(weights.mean(0))
            for way, choose in ways.items():
                right[f"{way}, {label}, {reader}"] = asked.shares(choose(weights.mean(0)) == own)
    for way, choose in ways.items():
        chosen = choose(readings["base"][layers].mean(0))
        for _ in range(NUM_ROUNDS):
            chosen = choose(read_with(engine, asked, chosen)[layers].mean(0))
        right[f"{way}, chosen layers, own"] = asked.shares(chosen == own)

    at = torch.arange(len(asked.ids))
    fading = (FADING ** (at[:, None] - at).clamp(min=0)).tril()[:, asked.start :]
    chosen = (fading @ evidence[asked.start :]).argmax(-1)
    right["decay, text so far"] = asked.shares(chosen == own)
    right["decay, prompt"] = asked.shares(own == engine.reader.whole(always, prompt).expert)
    for label, found in (("lanes, as served", engine.lanes(served, prompt)), (LANES, lanes)):
        # A message of more or fewer lanes than parts has no right answer, as in the evaluation.
        of_parts = [lane.expert for lane in found] if len(found) == 2 else [None, None]
        right[label] = [[float(a == b)] * 3 for a, b in zip(of_parts, experts, strict=True)]
    return {"attention follows": follows, "routed right": right}


def layers_that_follow(engine: SpectrModel) -> Any:
    """(L, 2) how often each layer follows, by part, in requests that the base wrote itself."""
    requests = foreign_requests(engine.base)  # where no plan is active, experts add nothing
    shares = []
    for i in range(NUM_OWN):
        two = requests[2 * i : 2 * i + 2]
        style = wording.Style(format=wording.TRAINED_FORMATS[i % 4])
        asked = Asked.of(engine, wording.pieces(two, style), [each.answer for each in two])
        shares.append([asked.follows(layer) for layer in read(engine, asked.ids)])
    return np.mean(shares, axis=0)[..., 0]


def summary(shares: Sequence[Shares], formats: Sequence[str]) -> dict[str, Any]:
    """Of one row: each figure by part, and that of the tokens by format."""
    values, of = np.array(shares), np.array(formats)
    figures = dict(zip(FIGURES, values.mean(0).T.round(4).tolist(), strict=True))
    by_format = {f: values[of == f, :, 0].mean(0).round(4).tolist() for f in dict.fromkeys(formats)}
    return {**figures, "formats": by_format}


def against(lanes: Sequence[Shares], other: Sequence[Shares]) -> dict[str, Any]:
    """Paired tests, message by message, of figures of which both parts count alike."""
    more, less = (np.array(row).mean(1) / len(row) for row in (lanes, other))
    return {figure: paired([more[:, i]], [less[:, i]]) for i, figure in enumerate(FIGURES)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num", type=int, default=90, help="messages; 90 have each pair once")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    engine = load()
    following = layers_that_follow(engine)
    layers = sorted(following.min(-1).argsort()[-NUM_LAYERS:].tolist())
    heldout = {name: TASKS[name].build(SPLIT_SEED).heldout for name in engine.library.names}
    messages = make_messages(heldout, options.num, 0)
    rows: dict[str, dict[str, list[Shares]]] = defaultdict(lambda: defaultdict(list))
    for message in tqdm(messages, unit="message"):
        asked = Asked.of(engine, message.pieces(), [each.answer for each in message.examples])
        experts = [engine.library.index(name) for name in message.names]
        for what, found in measure(engine, asked, experts, layers).items():
            for row, shares in found.items():
                rows[what][row].append(shares)
    formats = [message.format for message in messages]
    document: dict[str, Any] = {
        "device": str(engine.base.device),
        "versions": library_versions(),
        "num": len(messages),
        "layers": layers,
        "layers in the base's own messages": following.round(4).tolist(),
    }
    for what, found in rows.items():
        document[what] = {row: summary(shares, formats) for row, shares in found.items()}
    right = rows["routed right"]
    document["lanes less a row"] = {
        row: against(right[LANES], right[row]) for row in right if row != LANES
    }
    options.output.write_text(f"{json.dumps(document, indent=1)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
