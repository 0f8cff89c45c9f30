"""How a run draws its tokens: shared noise, and what ends an answer."""

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from spectr_demo.base.loading import LoadedBase
from spectr_demo.config import GenerationSettings


def logits_processors(settings: GenerationSettings) -> LogitsProcessorList:
    """What is done to the logits of a token; the last one draws it, unless it is the likeliest."""
    processors = LogitsProcessorList()
    if settings.temperature > 0:
        processors.append(TemperatureLogitsWarper(float(settings.temperature)))
        if settings.top_p < 1:
            processors.append(TopPLogitsWarper(settings.top_p))
        processors.append(SharedNoise(settings.seed))
    return processors


class SharedNoise(LogitsProcessor):
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


def end_token_ids(base: LoadedBase) -> set[int]:
    """Every token that ends an answer: the tokenizer's, and those the base's authors name."""
    generation_config = base.model.generation_config
    configured = None if generation_config is None else generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in [*ids, base.tokenizer.eos_token_id] if i is not None}


def pad_token_id(base: LoadedBase, end_ids: set[int]) -> int:
    """What follows the end of a row while others go on."""
    pad = base.tokenizer.pad_token_id
    return pad if pad is not None else min(end_ids, default=0)
