"""The rows of a training run, step by step, and batches of them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from spectr_demo.evaluation.messages import Request
from spectr_demo.evaluation.tasks import Example
from spectr_demo.training.messages import (
    IGNORED,
    ONE,
    Row,
    RowEncoder,
    fits_a_message,
    mixed_requests,
    own_request,
    own_requests,
    random_style,
)
from spectr_demo.training.recipe import Recipe


class MessageDataset(Dataset[Row]):
    """All rows of a run in order: row `index` is of step `index // batch_size`.

    The first rows of a step are single requests, every example once before any comes again. Then
    come messages of own requests, then those with foreign lines. A row follows from the recipe's
    seed and its index alone, so that a run which continues reads what it would have read.
    Raises ValueError where the recipe has messages, and no example or no foreign request for them.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        foreign: Sequence[Request],
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
    ) -> None:
        self.requests = [own_request(example) for example in examples]
        self.pool = [request for request in self.requests if fits_a_message(request)]
        self.foreign = list(foreign)
        self.encoder = RowEncoder(tokenizer)
        self.recipe = recipe
        lacking = []
        if recipe.num_own + recipe.num_foreign and not self.pool:
            lacking.append("an example that fits a message")
        if recipe.num_foreign and not self.foreign:
            lacking.append("a foreign request")
        if lacking:
            raise ValueError(
                f"training data: it lacks {' and '.join(lacking)}; the recipe has messages made of "
                "them; set the recipe's own_share or foreign_share to 0"
            )

    def __len__(self) -> int:
        return self.recipe.num_steps(len(self.requests)) * self.recipe.batch_size

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        step, place = divmod(index, self.recipe.batch_size)
        rng = random.Random(f"{self.recipe.seed} {index}")
        opening_is_on = rng.random() >= self.recipe.opening_off
        num_single = self.recipe.num_single
        if place < num_single:
            requests, style = [self._single(step * num_single + place)], ONE
        elif place < num_single + self.recipe.num_own:
            requests, style = own_requests(self.pool, rng), random_style(rng)
        else:
            requests = mixed_requests(self.pool, self.foreign, rng)
            style = random_style(rng)
        return self.encoder(requests, style, opening_is_on=opening_is_on)

    def _single(self, number: int) -> Request:
        passed, place = divmod(number, len(self.requests))
        order = np.random.default_rng([self.recipe.seed or 0, passed])
        return self.requests[order.permutation(len(self.requests))[place]]


def collate(rows: Sequence[Row], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad on the left, longest row first, so that all answers end in the last column.

    Returns input_ids, attention_mask and labels, each (R, T) int64, and is_on (R, T) bool. With
    left padding the loss can ask the model for the last positions only (see `trainer.answer_loss`).
    """
    rows = sorted(rows, key=lambda row: -len(row["input_ids"]))
    lengths = [len(row["input_ids"]) for row in rows]
    gaps = [lengths[0] - length for length in lengths]

    def padded(values: Sequence[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([[fill] * n + list(v) for n, v in zip(gaps, values, strict=True)])

    return {
        "input_ids": padded([row["input_ids"] for row in rows], pad_token_id),
        "attention_mask": padded([[1] * length for length in lengths], 0),
        "labels": padded([row["labels"] for row in rows], IGNORED),
        "is_on": padded([list(map(int, row["is_on"])) for row in rows], 0).bool(),
    }


def pieces_of(batch: dict[str, torch.Tensor], most_tokens: int) -> list[dict[str, torch.Tensor]]:
    """Cut a batch of `collate` into pieces of at most so many padded tokens, a row at least.

    Rows of similar length come together, without the padding that all of them share.
    """
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    pieces, start = [], 0
    while start < len(lengths):
        longest = lengths[start]
        stop = start + max(1, most_tokens // longest)
        pieces.append({key: values[start:stop, -longest:] for key, values in batch.items()})
        start = stop
    return pieces
