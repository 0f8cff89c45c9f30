"""Scores on held-out examples by real generation, with 95% intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from spectr_demo.base.prompts import encode, pad_left
from spectr_demo.evaluation.tasks import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Score:
    """The mean of `num` scores in [0, 1], with a 95% interval."""

    mean: float
    low: float
    high: float
    num: int

    def to_dict(self) -> dict[str, float | int]:
        return {k: round(v, 4) for k, v in asdict(self).items()}


def summarize(scores: Sequence[float]) -> Score:
    """Mean with a 95% interval: Wilson's for right-or-wrong scores, else a percentile bootstrap.

    Wilson's interval keeps its width where every answer is wrong (or right); a bootstrap does not.
    """
    if not scores:
        raise ValueError("scores: got none; an interval needs at least one; score some examples")
    values = np.asarray(scores, dtype=np.float64)
    n, mean = len(values), float(values.mean())
    if np.isin(values, (0.0, 1.0)).all():
        z = 1.959964
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * np.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        low, high = max(0.0, float(centre - half)), min(1.0, float(centre + half))
    else:
        draws = np.random.default_rng(0).integers(0, n, size=(NUM_RESAMPLES, n))
        low, high = (float(q) for q in np.quantile(values[draws].mean(axis=1), (0.025, 0.975)))
    return Score(mean=mean, low=low, high=high, num=n)


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
    around: Callable[[list[list[int]]], AbstractContextManager[None]] = lambda rows: nullcontext(),
    batch_size: int = 32,
    description: str = "generating",
) -> list[str]:
    """Continue token ids greedily to the end token, in batches of similar length.

    around: given the rows of a batch (unpadded; they are padded on the left), the context in which
    it is generated: a routing plan needs the rows.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    answers = [""] * len(texts)
    pad = tokenizer.pad_token_id or 0
    with tqdm(total=len(texts), desc=description, unit="text", leave=False) as bar:
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            rows = [list(texts[i]) for i in numbers]
            padded, mask = pad_left(rows, pad)
            generate: Any = model.generate
            with around(rows):
                output = generate(
                    padded.to(model.device),
                    attention_mask=mask.to(model.device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=pad,
                )
            decoded = tokenizer.batch_decode(output[:, padded.shape[1] :], skip_special_tokens=True)
            for i, answer in zip(numbers, decoded, strict=True):
                answers[i] = answer.strip()
            bar.update(len(rows))
    return answers


def score_answers(
    task: Task, examples: Sequence[Example], answers: Sequence[str]
) -> dict[str, Score]:
    """Scores over all examples, and over those with seen and with held-out wordings apart."""
    scores = [task.score(a, e) for a, e in zip(answers, examples, strict=True)]
    groups = {
        "all": scores,
        "seen wording": [
            s for s, e in zip(scores, examples, strict=True) if not e.is_heldout_wording
        ],
        "held-out wording": [
            s for s, e in zip(scores, examples, strict=True) if e.is_heldout_wording
        ],
    }
    return {name: summarize(group) for name, group in groups.items() if group}
