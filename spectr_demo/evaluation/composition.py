"""Messages with two and three requests of different domains: is each part answered right?

A message is a user's turn with held-out requests, in one of five formats. A router answers it as a
whole. The answer is split into its lines, and each part is scored by its own task. The bounds are
two: `SEGMENTS` has each part read and answered by its own expert (`segments.py`), and `SINGLE` asks
each request alone, of its own expert.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spectr_demo.base.prompts import LIST_MARK, encode_answer
from spectr_demo.config import RouterConfig
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.reading import Lane
from spectr_demo.evaluation.generation import routed_answers
from spectr_demo.evaluation.messages import FORMATS, Piece, PromptEncoder, Request, Style, pieces
from spectr_demo.evaluation.reading import Reading, Text, read
from spectr_demo.evaluation.segments import Segments, newline_id, segment_answers
from spectr_demo.evaluation.tasks import Example, get_task
from spectr_demo.routing.routers import ROUTERS
from spectr_demo.trace import NOT_ROUTED

SEGMENTS, SINGLE = "segment oracle", "single-request oracle"
MESSAGE_SEED = 0
MARK_TOKENS = 6  # of an answer, for a list mark that was not asked for and the end of the line

Scores = list[list[float]]  # of each message, by part
Figures = dict[str, list[float]]  # of a message: what was measured, by part
Routing = list[Figures]


@dataclass(frozen=True, kw_only=True)
class Message:
    """Held-out examples of different tasks, by the tasks' names, and the format they stand in."""

    names: tuple[str, ...]
    examples: tuple[Example, ...]
    format: str

    def pieces(self) -> list[Piece]:
        return pieces([_request(e) for e in self.examples], Style(format=self.format))

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces())


def make_messages(
    heldout: Mapping[str, Sequence[Example]], num_pairs: int, num_triples: int
) -> list[Message]:
    """`num_pairs` messages of two requests, then `num_triples` of three; no triples of two domains.

    Each domain is equally often at each place. Every ordered pair of domains comes once before one
    comes again, and then in another format: with 10 domains 90 messages have each pair once, and
    450 have each in all five formats. Fewer messages are the first ones of more.
    Only examples of one line are used. Raises ValueError for a domain without any.
    """
    names = list(heldout)
    pools = {name: _endless(name, heldout[name]) for name in names}
    orders = [*_pairs(names, num_pairs), *_triples(names, num_triples)]
    return [
        Message(names=chosen, examples=tuple(next(pools[n]) for n in chosen), format=format_)
        for chosen, format_ in orders
    ]


def _endless(name: str, examples: Sequence[Example]) -> Iterator[Example]:
    """The examples that fit into a line, in an order of their own, again and again."""
    fitting = [e for e in examples if _is_line(e.prompt) and _is_line(e.answer)]
    if not fitting:
        raise ValueError(
            f"task {name!r}: none of its {len(examples)} held-out examples has a request and an "
            "answer of one line; one was needed in a message; leave the task's expert out"
        )
    random.Random(f"{MESSAGE_SEED} {name}").shuffle(fitting)
    while True:
        yield from fitting


def _is_line(text: str) -> bool:
    return len(text.strip().splitlines()) == 1


def _pairs(names: Sequence[str], num: int) -> Iterator[tuple[tuple[str, ...], str]]:
    E = len(names)
    for i in range(num):
        again, j = divmod(i, E * (E - 1))
        shift, first = divmod(j, E)
        # Twice the shift, so that no format stays with a domain at either place.
        format_ = FORMATS[(first + 2 * shift + again) % len(FORMATS)]
        yield (names[first], names[(first + 1 + shift) % E]), format_


def _triples(names: Sequence[str], num: int) -> Iterator[tuple[tuple[str, ...], str]]:
    E, rng = len(names), random.Random(MESSAGE_SEED)
    if E < 3:
        return
    order, shifts = list(names), [0, 1, 2]
    for i in range(num):
        block, j = divmod(i, E)
        if j == 0:
            rng.shuffle(order)
            shifts = [0, *rng.sample(range(1, E), 2)]
        chosen = tuple(order[(j + shift) % E] for shift in shifts)
        yield chosen, FORMATS[(j + block) % len(FORMATS)]


def _request(example: Example) -> Request:
    keeps_case = example.wording.startswith(("{text}", '"'))
    return Request(text=example.prompt, answer=example.answer, keeps_case=keeps_case)


def split_answer(answer: str, num_parts: int) -> list[str]:
    """The parts of an answer: its first lines that are not empty; "" where there are too few."""
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    return [*lines, *[""] * num_parts][:num_parts]


def part_score(name: str, answer: str, example: Example) -> float:
    """The task's score of a part, in [0, 1]. A list mark before it costs nothing.

    Answers may begin like a list mark (`* 9 * * 1` of cron), so both readings are scored and the
    better one counts.
    """
    score = get_task(name).score
    readings = {answer, LIST_MARK.sub("", answer, count=1)}
    return max(float(score(reading, example)) for reading in readings)


def score_parts(messages: Sequence[Message], answers: Sequence[Sequence[str]]) -> Scores:
    """answers: of each message, by part."""
    return [
        [
            part_score(name, answer, example)
            for name, answer, example in zip(message.names, parts, message.examples, strict=True)
        ]
        for message, parts in zip(messages, answers, strict=True)
    ]


def routed_parts(
    engine: SpectrModel, router: RouterConfig, messages: Sequence[Message], batch_size: int = 32
) -> list[list[str]]:
    """What a router answers to each part, from whole answers."""
    answers = routed_answers(
        engine,
        router,
        [engine.encode(message.text) for message in messages],
        max_new_tokens=max((sum(_caps(message)) for message in messages), default=1),
        batch_size=batch_size,
        description=f"{router.name}: messages",
    )
    return [split_answer(a, len(m.names)) for a, m in zip(answers, messages, strict=True)]


def segment_parts(
    engine: SpectrModel, messages: Sequence[Message], batch_size: int = 32
) -> list[list[str]]:
    """What the segment oracle answers to each part: the first line of it, as of other answers."""
    encode = PromptEncoder(engine.tokenizer)
    asked = []
    for message in messages:
        ids, owners = encode(message.pieces())
        experts = tuple(engine.library.index(name) for name in message.names)
        asked.append(
            Segments(ids=tuple(ids), owners=tuple(owners), experts=experts, caps=_caps(message))
        )
    answers = segment_answers(engine, asked, batch_size=batch_size)
    return [[split_answer(part, 1)[0] for part in parts] for parts in answers]


def single_parts(
    engine: SpectrModel, messages: Sequence[Message], batch_size: int = 32
) -> list[list[str]]:
    """What each request is answered alone, by its own expert."""
    answers = {}
    for name in dict.fromkeys(name for message in messages for name in message.names):
        prompts = sorted(
            {
                example.prompt
                for message in messages
                for of, example in zip(message.names, message.examples, strict=True)
                if of == name
            }
        )
        of_prompts = routed_answers(
            engine,
            RouterConfig(name="single", expert=name),
            [engine.encode(prompt) for prompt in prompts],
            max_new_tokens=get_task(name).max_new_tokens,
            batch_size=batch_size,
            description=f"{SINGLE}: {name}",
        )
        answers.update({(name, p): a for p, a in zip(prompts, of_prompts, strict=True)})
    return [
        [answers[name, e.prompt] for name, e in zip(message.names, message.examples, strict=True)]
        for message in messages
    ]


def _caps(message: Message) -> tuple[int, ...]:
    return tuple(get_task(name).max_new_tokens + MARK_TOKENS for name in message.names)


def segment_routing(
    engine: SpectrModel, router: RouterConfig, messages: Sequence[Message], batch_size: int = 16
) -> Routing | None:
    """Whom the router chose for each part, as it reads message and reference answer.

    A router that reads requests has chosen before an answer begins: see `_lane_routing`.

    prompt, answer: share of a part's decisions that chose its expert; those of an answer are the
    ones from which its tokens came. switch: how many of its tokens came before one to which most
    layers and projections gave the part's expert. switched: 1, or 0 where none did; `switch` is
    then all of the part's tokens. None for a router that does not choose.
    """
    if not ROUTERS[router.name].chooses:
        return None
    encode = PromptEncoder(engine.tokenizer)
    prompts = [encode(message.pieces()) for message in messages]
    if ROUTERS[router.name].reads_request:
        return [
            _lane_routing(
                engine.lanes(router, ids),
                [engine.library.index(name) for name in message.names],
                np.array(owners),
            )
            for message, (ids, owners) in zip(messages, prompts, strict=True)
        ]
    answers = [_reference(engine, message) for message in messages]
    texts = [
        Text(prompt_ids=tuple(ids), answer_ids=tuple(token for part in answer for token in part))
        for (ids, _), answer in zip(prompts, answers, strict=True)
    ]
    readings = read(
        engine, router, texts, batch_size=batch_size, description=f"{router.name}: messages"
    )
    return [
        _routing(
            reading,
            [engine.library.index(name) for name in message.names],
            np.array(owners),
            [len(part) for part in answer],
        )
        for reading, message, (_, owners), answer in zip(
            readings, messages, prompts, answers, strict=True
        )
    ]


def _reference(engine: SpectrModel, message: Message) -> list[list[int]]:
    """Token ids of each part's answer; a newline ends all but the last, an end token that one."""
    newline, tokenizer = newline_id(engine), engine.tokenizer
    parts = [
        [*tokenizer(e.answer, add_special_tokens=False)["input_ids"], newline]
        for e in message.examples[:-1]
    ]
    return [*parts, encode_answer(tokenizer, message.examples[-1].answer)]


def _routing(
    reading: Reading, experts: Sequence[int], owners: Any, num_answered: Sequence[int]
) -> Figures:
    """One message's figures by part. owners: (T,) of the prompt's tokens. num_answered: tokens of
    each part's answer."""
    assert reading.choices is not None
    choices = reading.choices[..., 0]  # (T, L, P)
    result: Figures = {"prompt": [], "answer": [], "switch": [], "switched": []}
    start = reading.num_prompt - 1
    for part, (expert, num) in enumerate(zip(experts, num_answered, strict=True)):
        asked = choices[: reading.num_prompt][owners == part]
        answered = choices[start : start + num]
        start += num
        is_own = [_majority(of_token) == expert for of_token in answered]
        result["prompt"].append(float((asked == expert).mean()))
        result["answer"].append(float((answered == expert).mean()))
        result["switch"].append(float(is_own.index(True) if any(is_own) else num))
        result["switched"].append(float(any(is_own)))
    return result


def _lane_routing(lanes: Sequence[Lane], experts: Sequence[int], owners: Any) -> Figures:
    """One message's figures by part, where each lane has one expert for all of its answer.

    Part i is answered in lane i; a message of more or fewer lanes than parts has no right answer.
    A right answer has its expert from the first token, so `switch` is 0; for the others it is not
    known. Line ends between lanes count nowhere. owners: (T,) of the prompt's tokens.
    """
    chosen = np.full(len(owners), NOT_ROUTED)
    is_read = np.zeros(len(owners), np.bool_)
    for lane in lanes:
        chosen[lane.start : lane.stop] = NOT_ROUTED if lane.expert is None else lane.expert
        is_read[lane.start : lane.stop] = True
    of_lanes = [lane.expert for lane in lanes]
    is_cut_right = len(lanes) == len(experts)
    result: Figures = {"prompt": [], "answer": [], "switch": [], "switched": []}
    for part, expert in enumerate(experts):
        is_own = float(is_cut_right and of_lanes[part] == expert)
        asked = chosen[(owners == part) & is_read]
        result["prompt"].append(float((asked == expert).mean()) if len(asked) else 0.0)
        result["answer"].append(is_own)
        result["switch"].append(0.0)
        result["switched"].append(is_own)
    return result


def _majority(choices: Any) -> int:
    """The commonest choice, `NOT_ROUTED` among them."""
    return int(np.bincount(choices.ravel() - NOT_ROUTED).argmax()) + NOT_ROUTED
