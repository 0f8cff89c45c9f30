"""Training rows as train.py reads them: token ids and flags. For build.py."""

from __future__ import annotations

import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from benchmarks.second_edition.train import FOREIGN, LABEL, OWN, PREFIX
from spectr_demo.evaluation.messages import OPENING, PromptEncoder, Request, Style, pieces
from spectr_demo.training.messages import (
    IGNORED,
    RowEncoder,
    mixed_requests,
    own_requests,
    random_style,
)

TESTED_FORMATS = ("lines", "numbered", "bulleted", "then", "sentence")
MOST_TOKENS = 280
Row = tuple[list[int], list[int]]


class Encoder:
    """Token ids of messages in the base's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.prompt = PromptEncoder(tokenizer)
        self.encoded = RowEncoder(tokenizer)

    def row(self, requests: Sequence[Request], style: Style) -> Row:
        """Ids and flags of one training row; a label is a token of an own answer."""
        row = self.encoded(requests, style)
        _, owners = self.prompt(pieces(requests, style))
        opening = owners.count(OPENING)
        flags = [
            (OWN if is_on else FOREIGN) | (0 if label == IGNORED else LABEL)
            for is_on, label in zip(row["is_on"], row["labels"], strict=True)
        ]
        return row["input_ids"], [PREFIX] * opening + flags[opening:]


def own_row(encoder: Encoder, pool: Sequence[Request], rng: random.Random) -> Row:
    """Two or three requests of the own domain."""
    return encoder.row(own_requests(pool, rng), random_style(rng))


def foreign_row(
    encoder: Encoder, pool: Sequence[Request], foreign: Sequence[Request], rng: random.Random
) -> Row:
    """Own and foreign requests; a fifth of the foreign answers are missing."""
    return encoder.row(mixed_requests(pool, foreign, rng), random_style(rng))
