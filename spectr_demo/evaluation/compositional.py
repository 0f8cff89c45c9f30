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

from spectr_demo.config import RouterConfig
from spectr_demo.engine import SpectrModel
from spectr_demo.evaluation.heldout import continue_texts
from spectr_demo.evaluation.reading import Reading, Text, read
from spectr_demo.evaluation.tasks import Example, get_task
from spectr_demo.layers import routed
from spectr_demo.prompts import encode
from spectr_demo.routing import ROUTERS

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
    prompts = [_prompts(engine, pair, layout) for pair in pairs]
    result: dict[str, Any] = {}
    for part, key in enumerate(("first", "second")):
        texts = [
            Text(prompt_ids=tuple(before[part]), answer_ids=tuple(_answer(engine, pair, part)))
            for before, pair in zip(prompts, pairs, strict=True)
        ]
        answers = continue_texts(
            engine.model,
            engine.tokenizer,
            [text.prompt_ids for text in texts],
            max_new_tokens=max(get_task(pair.names[part]).max_new_tokens for pair in pairs),
            around=lambda rows: routed(engine.plan([router] * len(rows), rows)),
            description=f"{router.name}, {layout}",
        )
        readings = read(engine, router, texts)
        # The first line is the part's answer; what follows may be the next part's.
        scores = [
            get_task(pair.names[part]).score(answer.partition("\n")[0], pair.examples[part])
            for answer, pair in zip(answers, pairs, strict=True)
        ]
        result[key] = {
            "score": float(np.mean(scores)),
            "nll": float(np.mean([reading.nll for reading in readings])),
        }
        if ROUTERS[router.name].score is not None:
            experts = [engine.library.index(pair.names[part]) for pair in pairs]
            result[key]["accuracy"] = float(
                np.mean([_accuracy(r, e) for r, e in zip(readings, experts, strict=True)])
            )
    return result


def _prompts(engine: SpectrModel, pair: Pair, layout: Layout) -> tuple[list[int], list[int]]:
    """Token ids before the first answer, and before the second one."""
    first, second = pair.examples
    if layout == "two turns":
        turns = [{"role": "user", "content": first.prompt}]
        later = [
            *turns,
            {"role": "assistant", "content": first.answer},
            {"role": "user", "content": second.prompt},
        ]
        return encode(engine.tokenizer, turns), encode(engine.tokenizer, later)
    prompt = encode(engine.tokenizer, f"{first.prompt}\n{second.prompt}")
    return prompt, [*prompt, *_tokens(engine, first.answer + "\n")]


def _answer(engine: SpectrModel, pair: Pair, part: int) -> list[int]:
    return _tokens(engine, pair.examples[part].answer)


def _tokens(engine: SpectrModel, text: str) -> list[int]:
    return list(engine.tokenizer(text, add_special_tokens=False)["input_ids"])


def _accuracy(reading: Reading, expert: int) -> float:
    assert reading.choices is not None
    return float((reading.choices[reading.num_prompt - 1 :, ..., 0] == expert).mean())
