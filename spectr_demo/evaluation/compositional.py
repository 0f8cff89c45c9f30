"""Two requests of two domains in one text: does each part get its own expert, and is it right?

`one turn`: both requests in one message, both answers in one reply, a line each. `two turns`: the
second request follows the answer to the first, as a conversation goes. No expert was trained on
either; each has only seen one request and its answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from spectr_demo.base.prompts import encode
from spectr_demo.config import RouterConfig
from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation.generation import routed_answers
from spectr_demo.evaluation.reading import Reading, Text, read
from spectr_demo.evaluation.tasks import Example, get_task
from spectr_demo.routing.routers import ROUTERS

Layout = Literal["one turn", "two turns"]
LAYOUTS: tuple[Layout, ...] = ("one turn", "two turns")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two held-out examples of two domains, by the names of their tasks."""

    names: tuple[str, str]
    examples: tuple[Example, Example]


def make_pairs(examples: Mapping[str, Sequence[Example]], num: int) -> list[Pair]:
    """`num` pairs in which every domain comes first and second about equally often."""
    names = list(examples)
    pairs = []
    for i in range(num):
        first = names[i % len(names)]
        second = names[(i + 1 + i // len(names)) % len(names)]
        if first == second:
            second = names[(i + 1) % len(names)]
        # From the end of the held-out examples: the start is used by the single requests.
        pair = (examples[first][-1 - i], examples[second][-1 - num - i])
        pairs.append(Pair(names=(first, second), examples=pair))
    return pairs


def compositional_scores(
    engine: SpectrModel, router: RouterConfig, pairs: Sequence[Pair], layout: Layout
) -> dict[str, Any]:
    """Per part, over the pairs: the score of the generated answer (given the reference answer of
    the part before it), the reference's mean NLL in nats, and the routing accuracy of its tokens.
    """
    result: dict[str, Any] = {}
    for part, key in enumerate(("first", "second")):
        before = [_before(engine, pair, part, layout) for pair in pairs]
        answers = _continue(engine, router, pairs, part, before)
        references = [_tokens(engine, pair.examples[part].answer) for pair in pairs]
        nums = [len(reference) for reference in references]
        texts = [
            Text(prompt_ids=tuple(prompt), answer_ids=(*earlier, *reference))
            for (prompt, earlier), reference in zip(before, references, strict=True)
        ]
        readings = read(engine, router, texts)
        # The first line is the part's answer; what follows may be the next part's.
        scores = [
            get_task(pair.names[part]).score(answer.partition("\n")[0], pair.examples[part])
            for answer, pair in zip(answers, pairs, strict=True)
        ]
        nlls = [-reading.logprob[-n:].mean() for reading, n in zip(readings, nums, strict=True)]
        result[key] = {"score": float(np.mean(scores)), "nll": float(np.mean(nlls))}
        if ROUTERS[router.name].score is not None:
            experts = [engine.library.index(pair.names[part]) for pair in pairs]
            accuracies = [
                _accuracy(reading, expert, n)
                for reading, expert, n in zip(readings, experts, nums, strict=True)
            ]
            result[key]["accuracy"] = float(np.mean(accuracies))
    return result


def _before(
    engine: SpectrModel, pair: Pair, part: int, layout: Layout
) -> tuple[list[int], list[int]]:
    """Token ids of a part's prompt, and of the answer so far: the line before, if there is one."""
    first, second = pair.examples
    if layout == "one turn":
        prompt = encode(engine.tokenizer, f"{first.prompt}\n{second.prompt}")
        return prompt, _tokens(engine, first.answer + "\n") if part == 1 else []
    turns = [{"role": "user", "content": first.prompt}]
    if part == 1:
        turns.append({"role": "assistant", "content": first.answer})
        turns.append({"role": "user", "content": second.prompt})
    return encode(engine.tokenizer, turns), []


def _continue(
    engine: SpectrModel,
    router: RouterConfig,
    pairs: Sequence[Pair],
    part: int,
    before: Sequence[tuple[list[int], list[int]]],
) -> list[str]:
    """What the router generates for a part of each pair."""
    return routed_answers(
        engine,
        router,
        [[*prompt, *earlier] for prompt, earlier in before],
        num_prompt=[len(prompt) for prompt, _ in before],
        max_new_tokens=max(get_task(pair.names[part]).max_new_tokens for pair in pairs),
        description=f"{router.name}, part {part + 1}",
    )


def _tokens(engine: SpectrModel, text: str) -> list[int]:
    return list(engine.tokenizer(text, add_special_tokens=False)["input_ids"])


def _accuracy(reading: Reading, expert: int, num_tokens: int) -> float:
    """Of the decisions from which the last `num_tokens` tokens came."""
    assert reading.choices is not None
    return float((reading.choices[-num_tokens:, ..., 0] == expert).mean())
