"""Answers by real, greedy generation: with the model as it is, or routed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from spectr_demo.base.prompts import encode, pad_left
from spectr_demo.config import RouterConfig
from spectr_demo.engine.batches import check_rows
from spectr_demo.engine.layers import routed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from spectr_demo.engine.model import SpectrModel


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    description: str = "generating",
) -> list[str]:
    """Answer each prompt greedily with the model as it is."""
    return continue_texts(
        model,
        tokenizer,
        [encode(tokenizer, prompt) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        description=description,
    )


@torch.inference_mode()
def continue_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    around: Callable[[Sequence[int]], AbstractContextManager[None]] = lambda numbers: nullcontext(),
    batch_size: int = 32,
    description: str = "generating",
) -> list[str]:
    """Continue token ids greedily to the end token, in batches of similar length.

    around: given the numbers of the texts in a batch, the context in which it is generated; their
    rows are padded on the left.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    answers = [""] * len(texts)
    pad = tokenizer.pad_token_id or 0
    with tqdm(total=len(texts), desc=description, unit="text", leave=False) as bar:
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            rows = [list(texts[i]) for i in numbers]
            with around(numbers):
                output = continue_rows(model, rows, pad, max_new_tokens=max_new_tokens)
            decoded = tokenizer.batch_decode(output, skip_special_tokens=True)
            for i, answer in zip(numbers, decoded, strict=True):
                answers[i] = answer.strip()
            bar.update(len(rows))
    return answers


def continue_rows(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], pad: int, **settings: Any
) -> Tensor:
    """What follows token ids greedily, (R, T): `pad` after the end of a row.

    settings: of transformers' `generate`.
    """
    check_rows(model, [len(row) for row in rows])
    padded, mask = pad_left(rows, pad)
    generate: Any = model.generate
    output: Tensor = generate(
        padded.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=False,
        pad_token_id=pad,
        **settings,
    )
    return output[:, padded.shape[1] :]


def routed_answers(
    engine: SpectrModel,
    router: RouterConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    description: str = "generating",
) -> list[str]:
    """Answer prompts, as token ids, greedily with one router, in batches of similar length.

    The lanes of a prompt are rows of their own; its answer is theirs, a line each.
    """
    lanes = [engine.lanes(router, prompt) for prompt in prompts]
    rows = [(number, lane) for number, some in enumerate(lanes) for lane in some]

    def around(numbers: Sequence[int]) -> AbstractContextManager[None]:
        some = [rows[i][1] for i in numbers]
        return routed(engine.plan_lanes([router] * len(some), some))

    texts = continue_texts(
        engine.model,
        engine.tokenizer,
        [lane.ids for _, lane in rows],
        max_new_tokens=max_new_tokens,
        around=around,
        batch_size=batch_size,
        description=description,
    )
    answers: list[list[str]] = [[] for _ in prompts]
    for (number, _), text in zip(rows, texts, strict=True):
        answers[number].append(text)
    return ["\n".join(each) for each in answers]
