"""Foreign lines: ordinary prompts that the base wrote itself, with its own short answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from spectr_demo.base.files import keep_json, kept_json, named_for
from spectr_demo.base.generic import generic_prompts
from spectr_demo.base.loading import LoadedBase
from spectr_demo.config import cache_dir
from spectr_demo.evaluation.generation import generate_answers
from spectr_demo.evaluation.messages import Request
from spectr_demo.training.messages import MOST_CHARACTERS

ANSWER_TOKENS = 18
MOST_WORDS = 10  # of an answer that has no whole sentence
_SENTENCE = re.compile(r".{3,110}?(?:[.!?](?=\s|$)|[。！？।])")


def foreign_requests(base: LoadedBase) -> list[Request]:
    """Requests that are of no expert's domain, each with the base's greedy answer.

    The base must have no adapter yet. Prompts that the base answers with nothing are left out, and
    so are very long ones. The answers are kept in the cache folder: on a CPU they take a minute.
    Raises OSError if they cannot be written there.
    """
    prompts = [" ".join(prompt.split()) for prompt in generic_prompts(base)]
    prompts = [prompt for prompt in prompts if 0 < len(prompt) <= MOST_CHARACTERS]
    facts = [base.fingerprint, ANSWER_TOKENS, prompts]
    file = named_for(facts, cache_dir() / "foreign", ".json")
    answers = kept_json(file)
    if answers is None:
        answers = generate_answers(
            base.model,
            base.tokenizer,
            prompts,
            max_new_tokens=ANSWER_TOKENS,
            description="foreign lines",
        )
        keep_json(answers, file)
    return pair(prompts, answers)


def pair(prompts: Sequence[str], answers: Sequence[str]) -> list[Request]:
    """Requests of prompts and answers, each answer cut to one line and one sentence."""
    shortened = [shorten(answer) for answer in answers]
    return [
        Request(text=prompt, answer=answer, keeps_case=False, is_own=False)
        for prompt, answer in zip(prompts, shortened, strict=True)
        if answer
    ]


def shorten(answer: str) -> str:
    """The first sentence of an answer's first line, or its first words if none ends there."""
    lines = answer.strip().splitlines()
    line = lines[0].strip() if lines else ""
    sentence = _SENTENCE.match(line)
    return sentence.group() if sentence else " ".join(line.split()[:MOST_WORDS])
