"""Which experts of a library are worth having: `advise`. It needs no data and no training.

Each expert writes: it is on in a user's turn, and then answers that turn. What it writes is of its
own domain, often in the form of its answers, and shows three things. How surely it writes what the
base would not: an expert that was trained too little is unsure, or writes as the base does. Whom
routing takes this text to be for: its author, a twin, or nobody. And whether another expert writes
it as readily. What experts do to ordinary text is read from the base's own answers to ordinary
prompts.

Axes: R requests, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spectr_demo.base.generic import generic_prompts, user_turns
from spectr_demo.config import DEFAULT_ROUTER, RouterConfig
from spectr_demo.engine.batches import has_attention_alone
from spectr_demo.engine.layers import routed
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.sampling import end_token_ids, pad_token_id
from spectr_demo.evaluation.generation import continue_rows
from spectr_demo.evaluation.reading import Reading, Text, read
from spectr_demo.evaluation.requests import evidence
from spectr_demo.routing.routers import parse_router

NUM_REQUESTS = 8  # that each expert writes, and as many ordinary prompts
NUM_TOKENS = 24  # of a request, and of an answer, at most
# Limits of the verdicts. Sound experts of the half `choose` of benchmarks/advice.py had a strength
# of 0.89 or more, those scaled down 0.71 or less; sound ones cost 0.48 at most. The other limits
# were set beforehand, but for NEVER: sound experts write little that is a request of their domain.
WEAK = 0.8  # of `strength`, at least
HARMFUL = 0.6  # of what a token drawn evenly costs, at most
ALIKE = 0.5  # of `shared`, at most
APART = 0.75  # of `apart`, at least
NEVER = 0.01  # of its own requests, the others', or ordinary prompts, at least
TAKEN = 0.5  # of the others' requests, and of ordinary prompts, at most
_TIE = 1e-3  # standard deviations, in which copies of one expert may differ


@dataclass(frozen=True, kw_only=True)
class ExpertAdvice:
    """What one expert is worth. A number is NaN where there is nothing to measure it by.

    request, answer: the first that it wrote, to look at.
    strength: `1 - nll / base_nll` of its answers to its own requests, from 0 to 1. It is the share
        of what surprises the base in them that does not surprise the expert: an expert that does
        nothing has 0, and so has one that is as unsure as the base.
    found: share of its own requests that the default router gives to it.
    others, ordinary: share of the other experts' requests, and of ordinary prompts, that it gets.
    cost: nats a token by which it makes the base's answers to ordinary prompts less likely. A token
        drawn evenly from the vocabulary costs the logarithm of its size, at most.
    nearest: the other expert that stands out in the same requests. None where it is the only one.
    apart: share of both experts' requests in which the author stands out more; 0.5 is a guess.
    shared: of what it gains over the base on its own answers, the share that `nearest` gains there.
    verdicts: what to know and to do; none for a sound one.
    """

    name: str
    request: str
    answer: str
    strength: float
    found: float
    others: float
    ordinary: float
    cost: float
    nearest: str | None
    apart: float
    shared: float
    verdicts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Written:
    """By one expert. texts: its requests with its answers. readings: of the answers, by itself and
    by the base."""

    requests: Sequence[str]
    answers: Sequence[str]
    texts: Sequence[Text]
    readings: Sequence[Reading]


@torch.inference_mode()
def advise(engine: SpectrModel) -> list[ExpertAdvice]:
    """Each expert of the library, judged by what it writes itself; in the library's order.

    With the default base it takes about 20 seconds of one CPU core for each expert.
    """
    names = engine.library.names
    if not names:
        return []
    with tqdm(total=2 * len(names), unit="step", desc="judging experts") as bar:
        written = []
        for e in range(len(names)):
            written.append(write(engine, e))
            bar.update()
        standing = [_standing(engine, own.texts) for own in written]
        ordinary = _ordinary(engine)
        found = []
        for e in range(len(names)):
            found.append(_judge(engine, written, standing, ordinary, e))
            bar.update()
    return found


@torch.inference_mode()
def write(engine: SpectrModel, e: int) -> Written:
    """What one expert writes, and how it is read."""
    router = _single(engine, e)
    opening = engine.template.opening
    with routed(engine.plan([router] * NUM_REQUESTS, [opening] * NUM_REQUESTS)):
        # An empty one was ended at once.
        requests = [turn or "." for turn in user_turns(engine.base, NUM_REQUESTS, NUM_TOKENS)]
    texts = _answered(engine, router, requests)
    answers = engine.tokenizer.batch_decode(
        [list(text.answer_ids) for text in texts], skip_special_tokens=True
    )
    return Written(
        requests=requests,
        answers=answers,
        texts=texts,
        readings=_read(engine, e, texts),
    )


def _single(engine: SpectrModel, e: int) -> RouterConfig:
    return RouterConfig(name="single", expert=engine.library.names[e])


def _read(engine: SpectrModel, e: int, texts: Sequence[Text]) -> list[Reading]:
    """Texts under one expert, and under the base."""
    return read(engine, _single(engine, e), texts, batch_size=_num_rows(engine), with_base=True)


def _num_rows(engine: SpectrModel) -> int:
    """Texts at once. Some recurrent bases take in what pads a row."""
    return NUM_REQUESTS if has_attention_alone(engine.model) else 1


def _answered(engine: SpectrModel, router: RouterConfig, requests: Sequence[str]) -> list[Text]:
    """Requests with the answers of one router."""
    prompts = [engine.encode(request) for request in requests]
    ends = end_token_ids(engine.base)
    pad = pad_token_id(engine.base, ends)
    texts = []
    num = _num_rows(engine)
    for rows in (prompts[i : i + num] for i in range(0, len(prompts), num)):
        with routed(engine.plan([router] * len(rows), rows)):
            written = continue_rows(engine.model, rows, pad, max_new_tokens=NUM_TOKENS)
        for prompt, ids in zip(rows, written.tolist(), strict=True):
            length = next((i for i, token in enumerate(ids, 1) if token in ends), len(ids))
            texts.append(Text(prompt_ids=tuple(prompt), answer_ids=tuple(ids[:length])))
    return texts


def _standing(engine: SpectrModel, texts: Sequence[Text]) -> Tensor:
    """(R, E) of every expert in the requests of texts, each read as one."""
    ordinary = engine.reader.ordinary
    prompts = [text.prompt_ids for text in texts]
    return ordinary.standing(evidence(engine, prompts, ordinary.detectors).certainty)


@dataclass(frozen=True)
class _Ordinary:
    """texts: ordinary prompts with the base's answers. standing: (R, E) in ordinary prompts, more
    than these. least: what an expert must exceed to be chosen."""

    texts: Sequence[Text]
    standing: Tensor
    least: float


def _ordinary(engine: SpectrModel) -> _Ordinary:
    prompts = generic_prompts(engine.base)
    some = prompts[:: -(-len(prompts) // NUM_REQUESTS)]
    known = engine.reader.ordinary
    router = parse_router(DEFAULT_ROUTER, engine.library.names)
    least = engine.reader.least_standing(router)
    texts = _answered(engine, RouterConfig(name="base"), some)
    return _Ordinary(texts, known.standing(known.certainty), -np.inf if least is None else least)


def _judge(
    engine: SpectrModel,
    written: Sequence[Written],
    standing: Sequence[Tensor],
    ordinary: _Ordinary,
    e: int,
) -> ExpertAdvice:
    names, own = engine.library.names, written[e]
    takes = [_share_taken(each, e, ordinary.least) for each in standing]
    cost = -_gain(_read(engine, e, ordinary.texts))
    nearest = _nearest(torch.cat([*standing, ordinary.standing]), e)
    apart = shared = np.nan
    if nearest is not None:
        apart = _apart(standing, e, nearest)
        shared = _shared(engine, own, nearest)
    advice = ExpertAdvice(
        name=names[e],
        request=own.requests[0],
        answer=own.answers[0],
        strength=strength(own.readings),
        found=takes[e],
        others=float(np.mean(takes[:e] + takes[e + 1 :])) if len(names) > 1 else np.nan,
        ordinary=_share_taken(ordinary.standing, e, ordinary.least),
        cost=cost,
        nearest=None if nearest is None else names[nearest],
        apart=apart,
        shared=shared,
    )
    return replace(advice, verdicts=tuple(_verdicts(advice, len(engine.tokenizer))))


def strength(readings: Sequence[Reading]) -> float:
    """See `ExpertAdvice`. readings: of an expert's own answers."""
    nll = -np.concatenate([reading.logprob for reading in readings]).mean()
    base_nll = -np.concatenate([reading.base_logprob for reading in readings]).mean()
    return float(max(0.0, 1 - nll / base_nll)) if base_nll > 0 else 0.0


def _gain(readings: Sequence[Reading]) -> float:
    """Nats a token by which a router makes texts likelier than the base does."""
    return float(np.concatenate([r.logprob - r.base_logprob for r in readings]).mean())


def _share_taken(standing: Tensor, e: int, least: float) -> float:
    """The share of requests that the default router gives to an expert. standing: (R, E)."""
    best, chosen = standing.max(-1)
    return float(((chosen == e) & (best > least)).float().mean())


def _nearest(standing: Tensor, e: int) -> int | None:
    """The expert beside e whose standing (R, E) goes most with that of e, from request to request.
    A twin's is the same, whomever the requests are for."""
    if standing.shape[1] == 1:
        return None
    alike = torch.corrcoef(standing.T).nan_to_num(-1)[e]
    alike[e] = -torch.inf
    return int(alike.argmax())


def _apart(standing: Sequence[Tensor], one: int, other: int) -> float:
    """See `ExpertAdvice`. Where both stand out alike, that is half a point."""
    points = []
    for author, rival in ((one, other), (other, one)):
        lead = standing[author][:, author] - standing[author][:, rival]
        points.append(torch.where(lead.abs() < _TIE, 0.5, (lead > 0).float()).mean())
    return float(torch.stack(points).mean())


def _shared(engine: SpectrModel, own: Written, other: int) -> float:
    """See `ExpertAdvice`; 0 where the other one, or the author itself, gains nothing."""
    gain = _gain(own.readings)
    return max(0.0, _gain(_read(engine, other, own.texts)) / gain) if gain > 0 else 0.0


def _verdicts(advice: ExpertAdvice, vocabulary: int) -> Iterator[str]:
    """vocabulary: number of tokens."""
    if advice.strength < WEAK:
        yield (
            f"weak: its own answers surprise it {advice.strength:.0%} less than they surprise the "
            f"base, sound experts {WEAK:.0%} or more; train it longer, or leave it out"
        )
    if advice.shared >= ALIKE:
        yield (
            f"alike: {advice.nearest!r} knows {advice.shared:.0%} of what it knows, and routing "
            f"tells the two apart in {advice.apart:.0%} (a guess is 50%); keep one of them"
        )
    elif advice.apart < APART:
        yield (
            f"mixed up: routing tells it from {advice.nearest!r} in {advice.apart:.0%} only (a "
            "guess is 50%), though the two write differently; try both alone on your requests"
        )
    elif np.nanmax([advice.found, advice.others, advice.ordinary]) < NEVER:
        yield (
            "never chosen: no request that an expert wrote is given to it, and no ordinary prompt; "
            f"use it by name (single:{advice.name}), or leave it out"
        )
    for share, whose in (
        (advice.others, "other experts' requests"),
        (advice.ordinary, "ordinary prompts"),
    ):
        if share > TAKEN:
            yield f"always chosen: {share:.0%} of {whose} are given to it; leave it out"
    if advice.cost > HARMFUL * math.log(vocabulary):
        yield (
            f"harmful: ordinary text is {advice.cost:.1f} nats a token less likely with it; it "
            "spoils what it is chosen for by mistake; train it at a lower rate, or leave it out"
        )


def to_json(found: Sequence[ExpertAdvice]) -> list[dict[str, Any]]:
    """Plain values, null where there is nothing to measure by."""
    return [
        {
            key: (None if np.isnan(value) else round(value, 4))
            if isinstance(value, float)
            else value
            for key, value in asdict(each).items()
        }
        for each in found
    ]
