"""Training rows: messages of one to three requests, with labels, and where the adapter is on.

An expert shall answer its own part of a message and leave the rest alone. So it learns from single
requests, from messages of several own requests, and from messages with foreign lines: ordinary
prompts that the base wrote. Their answers are given as text outside the loss, or are missing, and
their tokens run through the base alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypedDict

from transformers import PreTrainedTokenizerBase

from spectr_demo.evaluation.messages import (
    CLOSING,
    OPENING,
    TRAINED_FORMATS,
    PromptEncoder,
    Request,
    Style,
    owned_tokens,
    pieces,
)
from spectr_demo.evaluation.tasks import Example

IGNORED = -100  # the label that cross-entropy leaves out
ONE = Style(format="lines")  # of a message with one request
# How often each format is drawn.
SHARES = dict(zip(TRAINED_FORMATS, (0.3, 0.25, 0.2, 0.25), strict=True))
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
# Own (O) and foreign (F) requests of a message with foreign lines.
PATTERNS = ("OF", "FO", "OF", "FO", "OF", "FO", "OFO", "FOF", "OOF", "FFO", "OFF", "FOO")
MISSING = 0.2  # share of the foreign answers that are left out
# A longer example is trained alone: three in one message would be a text of a page.
MOST_CHARACTERS = 400


class Row(TypedDict):
    """One message and its answer, as token ids.

    labels: the ids of own answers, IGNORED elsewhere. is_on: whether the adapter serves a token.
    """

    input_ids: list[int]
    labels: list[int]
    is_on: list[bool]


class RowEncoder:
    """Makes rows of messages, as the base reads them.

    Raises ValueError for a chat template that does not hold what the user says once.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.prompt = PromptEncoder(tokenizer)
        self.end = tokenizer.eos_token_id  # None: the base has no token that ends an answer

    def __call__(
        self, requests: Sequence[Request], style: Style, *, opening_is_on: bool = True
    ) -> Row:
        """A row; the adapter is off on foreign requests and what the answer says of them.

        A newline ends an answer where another request follows. The end token ends the last one.
        opening_is_on: whether the adapter serves the chat template's opening.
        """
        ids, owners = self.prompt(pieces(requests, style))
        answer, answerers = self._answer(requests, style)
        # A token is served by what the next one belongs to: from it the next one is predicted.
        serving = [answerers[0] if owner == CLOSING else owner for owner in owners]
        serving += [*answerers[1:], answerers[-1]]
        labels = [
            token if requests[owner].is_own else IGNORED
            for token, owner in zip(answer, answerers, strict=True)
        ]
        return Row(
            input_ids=ids + answer,
            labels=[IGNORED] * len(ids) + labels,
            is_on=[opening_is_on if o == OPENING else requests[o].is_own for o in serving],
        )

    def _answer(self, requests: Sequence[Request], style: Style) -> tuple[list[int], list[int]]:
        """Token ids of the answer, and the number of each token's request."""
        last = len(requests) - 1
        lines = []
        for i, request in enumerate(requests):
            mark = style.mark.format(i + 1) if style.asks_numbers else ""
            if request.is_answered:
                lines.append((mark + request.answer + ("" if i == last else "\n"), i))
        ids, owners = owned_tokens(self.tokenizer, lines)
        if requests[last].is_answered and self.end is not None:
            ids.append(int(self.end))
            owners.append(last)
        return ids, owners


def own_request(example: Example) -> Request:
    """A task's example as a request of the expert's domain."""
    keeps_case = example.wording.startswith(("{text}", '"'))
    return Request(text=example.prompt, answer=example.answer, keeps_case=keeps_case)


def fits_a_message(request: Request) -> bool:
    """Whether a request can stand beside others: it is short, and its answer has one line."""
    return "\n" not in request.answer and len(request.text) + len(request.answer) <= MOST_CHARACTERS


def random_style(rng: random.Random) -> Style:
    """One of the trained formats with its small variations."""
    format_ = rng.choices(list(SHARES), list(SHARES.values()))[0]
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


def own_requests(pool: Sequence[Request], rng: random.Random) -> list[Request]:
    """Two or three requests of the own domain; fewer if there are no more."""
    return rng.sample(pool, min(len(pool), rng.choice((2, 2, 3))))


def mixed_requests(
    pool: Sequence[Request], foreign: Sequence[Request], rng: random.Random
) -> list[Request]:
    """Own and foreign requests; a fifth of the foreign answers are missing."""
    return [
        rng.choice(pool) if kind == "O" else _varied(rng.choice(foreign), rng)
        for kind in rng.choice(PATTERNS)
    ]


def _varied(request: Request, rng: random.Random) -> Request:
    """A foreign request with its answer at a random length, down to a word, or missing."""
    answer = request.answer
    if rng.random() < 0.4:
        words = answer.split()
        answer = " ".join(words[: rng.randint(1, min(6, len(words)))])
    return Request(
        text=request.text,
        answer=answer,
        keeps_case=request.keeps_case,
        is_own=False,
        is_answered=rng.random() >= MISSING,
    )
