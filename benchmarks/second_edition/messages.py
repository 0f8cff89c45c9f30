"""Messages with one to three requests: training rows and held-out tests, as token ids.

A request is of the expert's own domain, or it is foreign: an ordinary prompt that the base wrote.
An answer has one line for each request. A newline ends a line where another request follows. The
end token ends the last one, also if the answers of foreign requests are missing. For build.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PREFIX, OWN, FOREIGN, LABEL = 0, 1, 2, 128
# In training; "bulleted" is never trained.
TRAINED_FORMATS = {"lines": 0.3, "numbered": 0.25, "then": 0.2, "sentence": 0.25}
TESTED_FORMATS = ("lines", "numbered", "bulleted", "then", "sentence")
INTROS = (
    "Two things, please.",
    "Please answer each line.",
    "I have a few requests:",
    "Do the following:",
    "Can you help me with these?",
)
ASKED_NUMBERS = ("Number the answers.", "Please number your answers.", "Answer as a numbered list.")
AFTER_STOP = (" Then ", " Also, ", " And ", " After that, ", " Next, ")
AFTER_WORD = (". Then ", "; then ", ", and then ", ". Also, ", " and ")
MOST_TOKENS = 280


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request and its answer. keeps_case: it begins with the text, not an instruction."""

    text: str
    answer: str
    keeps_case: bool
    is_own: bool = True
    is_answered: bool = True


@dataclass(frozen=True, kw_only=True)
class Style:
    """How requests are put into one message."""

    format: str
    mark: str = "{}. "
    line_break: str = "\n"
    after_stop: str = " Then "
    after_word: str = ", and then "
    lowers: bool = True
    intro: str = ""
    asks_numbers: str = ""


def random_style(rng: random.Random) -> Style:
    """One of the trained formats with its small variations."""
    format_ = rng.choices(list(TRAINED_FORMATS), list(TRAINED_FORMATS.values()))[0]
    asks = rng.random() < {"numbered": 0.4, "lines": 0.15}.get(format_, 0.0)
    return Style(
        format=format_,
        mark=rng.choice(("{}. ", "{}. ", "{}. ", "{}) ")),
        line_break=rng.choice(("\n",) * 5 + ("\n\n",)),
        after_stop=rng.choice(AFTER_STOP),
        after_word=rng.choice(AFTER_WORD),
        lowers=rng.random() < 0.6,
        intro=rng.choice(INTROS) if rng.random() < 0.15 else "",
        asks_numbers=rng.choice(ASKED_NUMBERS) if asks else "",
    )


def pieces(requests: Sequence[Request], style: Style) -> list[tuple[str, int]]:
    """The user turn as (text, number of the request it belongs to).

    Marks and connecting words belong to the request that they introduce; an intro belongs to the
    first one, a wish at the end to the last one.
    """
    out = [(style.intro + "\n", 0)] if style.intro else []
    for i, request in enumerate(requests):
        before, text = "", request.text
        if style.format == "sentence" and i > 0:
            stops = out[-1][0][-1] in ".?!"
            before = style.after_stop if stops else style.after_word
            if style.lowers and not request.keeps_case and text[1:2].islower():
                text = text[0].lower() + text[1:]
        elif i > 0:
            before = style.line_break
        if style.format == "numbered":
            before += style.mark.format(i + 1)
        elif style.format == "bulleted":
            before += "- "
        elif style.format == "then" and i > 0:
            before += "Then: "
        out.append((before + text, i))
    if style.asks_numbers:
        out.append((style.line_break + style.asks_numbers, len(requests) - 1))
    return out


class Encoder:
    """Token ids of messages in the base's chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        marker = "XYZZY"
        whole = tokenizer.apply_chat_template(
            [{"role": "user", "content": marker}], tokenize=False, add_generation_prompt=True
        )
        self.before, self.after = whole.split(marker)
        self.end = tokenizer.eos_token_id
        (self.newline,) = self.plain("\n")

    def plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, parts: Sequence[tuple[str, int]]) -> tuple[list[int], list[int]]:
        """Token ids, and for each the request it belongs to: -1 the template's opening, -2 its
        closing."""
        owner = [-1] * len(self.before)
        for text, number in parts:
            owner += [number] * len(text)
        owner += [-2] * len(self.after)
        text = self.before + "".join(text for text, _ in parts) + self.after
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        owners = [
            owner[min(max(a, b - 1) if a == b else a, len(owner) - 1)]
            for a, b in encoded["offset_mapping"]
        ]
        return list(encoded["input_ids"]), owners

    def row(self, requests: Sequence[Request], style: Style) -> tuple[list[int], list[int]]:
        """Ids and flags of one training row; a label is a token of an own answer."""
        ids, owners = self.prompt(pieces(requests, style))
        answers: list[tuple[int, int]] = []  # token, request
        for i, request in enumerate(requests):
            if not request.is_answered:
                continue
            mark = style.mark.format(i + 1) if style.asks_numbers else ""
            answers += [(token, i) for token in self.plain(mark + request.answer)]
            answers.append((self.end if i == len(requests) - 1 else self.newline, i))
        kinds = [OWN if request.is_own else FOREIGN for request in requests]
        first = kinds[answers[0][1]]
        flags = [PREFIX if o == -1 else first if o == -2 else kinds[o] for o in owners]
        for j, (token, number) in enumerate(answers):
            following = answers[min(j + 1, len(answers) - 1)][1]
            is_label = LABEL if kinds[number] == OWN else 0
            ids.append(token)
            flags.append(kinds[following] | is_label)
        return ids, flags


def own_row(encoder: Encoder, pool: Sequence[Request], rng: random.Random) -> Any:
    """Two or three requests of the own domain."""
    return encoder.row(rng.sample(pool, rng.choice((2, 2, 3))), random_style(rng))


PATTERNS = ("OF", "FO", "OF", "FO", "OF", "FO", "OFO", "FOF", "OOF", "FFO", "OFF", "FOO")


def foreign_row(
    encoder: Encoder, pool: Sequence[Request], foreign: Sequence[Request], rng: random.Random
) -> Any:
    """Own and foreign requests; a fifth of the foreign answers are missing."""
    requests = []
    for kind in rng.choice(PATTERNS):
        if kind == "O":
            requests.append(rng.choice(pool))
            continue
        chosen = rng.choice(foreign)
        answer = chosen.answer
        if rng.random() < 0.4:  # of all lengths, down to a word
            words = answer.split()
            answer = " ".join(words[: rng.randint(1, min(6, len(words)))])
        requests.append(
            Request(
                text=chosen.text,
                answer=answer,
                keeps_case=chosen.keeps_case,
                is_own=False,
                is_answered=rng.random() >= 0.2,
            )
        )
    return encoder.row(requests, random_style(rng))
