"""Routing accuracy: how many decisions of a reading went to the right expert.

A decision is one token in one linear layer (layer and projection). Decisions of the answer are at
the prompt's last token and at all answer tokens but the last. Decisions of the prompt leave out the
chat template's opening. Choosing no expert counts as wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from spectr_demo.evaluation.reading import Reading
from spectr_demo.trace import NOT_ROUTED


def routing_accuracy(readings: Sequence[Reading], expert: int) -> dict[str, Any]:
    """Means over the readings, all of which should go to `expert` (its id).

    prompt, answer: share of first choices that are right. among_top_k: answer decisions with the
    right expert among the K selected. majority: share of texts whose commonest first choice, over
    prompt and answer, is right. unrouted: answer decisions for no expert. by_layer (L) and
    by_projection (P): of answer decisions.
    """
    rows = [_accuracy(reading, expert) for reading in readings]
    return {key: np.mean([row[key] for row in rows], axis=0).tolist() for key in rows[0]}


def _accuracy(reading: Reading, expert: int) -> dict[str, Any]:
    assert reading.choices is not None
    start, end = reading.num_opening, reading.num_prompt - 1
    is_right = reading.choices == expert  # (T, L, P, K)
    first = is_right[..., 0]
    answer = reading.choices[end:, ..., 0]
    votes = np.bincount(reading.choices[start:, ..., 0].ravel() - NOT_ROUTED)[1:]
    return {
        "prompt": first[start:end].mean(),
        "answer": first[end:].mean(),
        "among_top_k": is_right[end:].any(-1).mean(),
        "majority": float(votes.size > 0 and votes.argmax() == expert),
        "unrouted": (answer == NOT_ROUTED).mean(),
        "by_layer": first[end:].mean((0, 2)),
        "by_projection": first[end:].mean((0, 1)),
    }
