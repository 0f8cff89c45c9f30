"""Examples as token ids and labels: the loss is on the answer, the prompt is masked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from spectr_demo.base.prompts import encode, encode_answer
from spectr_demo.evaluation.tasks import Example

IGNORED = -100  # the label that cross-entropy leaves out


class AnswerDataset(Dataset[dict[str, list[int]]]):
    """Tokenized examples: `input_ids` of prompt and answer, `labels` IGNORED on the prompt."""

    def __init__(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> None:
        self.rows = [labelled(example, tokenizer) for example in examples]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def labelled(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Token ids of one example as the base reads it, and a label for each.

    Returns input_ids and labels, of one length. The labels of the prompt are IGNORED; those of the
    answer are its token ids, the end token included, where the base has one. Raises ValueError for
    an empty prompt.
    """
    prompt = encode(tokenizer, example.prompt)
    answer = encode_answer(tokenizer, example.answer)
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


def collate(rows: Sequence[dict[str, list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad on the left, so that all answers end in the last column.

    Returns input_ids, attention_mask and labels, each (R, T) int64. With left padding the loss can
    ask the model for the last positions only (see `trainer.AnswerTrainer`).
    """
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([[fill] * (width - len(row[key])) + row[key] for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(width)[None] >= width - lengths[:, None]).long()
    return {
        "input_ids": padded("input_ids", pad_token_id),
        "attention_mask": mask,
        "labels": padded("labels", IGNORED),
    }
