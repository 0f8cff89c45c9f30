"""The routed model: one engine for every front end.

A side-by-side run is one batch: each column is a row with its own router, all rows share one
forward pass per token, one KV cache and the same sampling noise.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer

if TYPE_CHECKING:
    from spectr_demo.engine.model import SpectrModel


class _TokenStreamer(BaseStreamer):
    """Hands on the tokens of all rows, one call per step; the prompt comes first and is skipped."""

    def __init__(self, on_tokens: Any) -> None:
        self.on_tokens = on_tokens
        self.has_prompt = False

    def put(self, value: Tensor) -> None:
        if self.has_prompt:
            self.on_tokens(value.tolist())
        self.has_prompt = True

    def end(self) -> None:
        pass


class _Cancelled(StoppingCriteria):
    def __init__(self, is_cancelled: threading.Event) -> None:
        self.is_cancelled = is_cancelled

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.is_cancelled.is_set(), device=input_ids.device)


class _SharedNoise(LogitsProcessor):
    """Draws each row's token, with the same noise for every row, and leaves it as the only one.

    The exponential race: `argmax p_i / q_i` with `q_i ~ Exp(1)` is a sample of p. The generator is
    the run's own, so runs in other threads do not disturb it; and since rows share the noise, a
    row's text depends neither on its place nor on its neighbours.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty(scores.shape[-1]).exponential_(generator=self.generator)
        drawn = (scores.float().softmax(-1) / noise.to(scores.device)).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0)


def _end_token_ids(engine: SpectrModel) -> set[int]:
    """Every token that ends an answer: the tokenizer's, and those the base's authors name."""
    configured = engine.model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in [*ids, engine.tokenizer.eos_token_id] if i is not None}


def _pad_token_id(engine: SpectrModel, end_ids: set[int]) -> int:
    pad = engine.tokenizer.pad_token_id
    return pad if pad is not None else min(end_ids, default=0)
