"""Scores of answers: means with 95% intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from spectr_demo.evaluation.tasks import Example, Task

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
