"""Whom single requests are for: what one choice for all layers gives, and the metric.

Held-out requests are read by the bare base, as `spectr-context` reads them, each as one request.
An expert is always named. Two metrics are compared: that of ordinary text, and the raw one, in
which SpectR's score is only standardised (`routing/detection.py`).

Axes: R requests, N tokens, P projections of a bank, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectr_demo.base.generic import generic_prompts
from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation.listening import listen
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.detection import Detector, Evidence, Metric, standing

METRICS = ("metric of ordinary text", "raw metric")
Detectors = Mapping[ExpertBank, Detector]


@dataclass(frozen=True)
class Measured:
    """A metric's detectors, and their certainty (R, E) of ordinary prompts."""

    detectors: Detectors
    ordinary: Tensor


def metrics_of(engine: SpectrModel) -> dict[str, Measured]:
    """By name; the second of the `METRICS` is measured now, over the same ordinary prompts."""
    prompts = [engine.encode(prompt) for prompt in generic_prompts(engine.base)]
    requests = engine.reader.requests(prompts)
    found = requests.evidence(engine.library)
    raw: dict[ExpertBank, Detector] = {}

    def measure(bank: ExpertBank, x: Tensor) -> None:
        raw[bank] = raw_detector(bank, x)
        found.add(bank, raw[bank].scores(x))

    listen(engine, requests, measure)
    ordinary = engine.reader.ordinary
    measured = (
        Measured(ordinary.detectors, ordinary.certainty),
        Measured(raw, found.certainty),
    )
    return dict(zip(METRICS, measured, strict=True))


def raw_detector(bank: ExpertBank, inputs: Tensor) -> Detector:
    """SpectR's own score, standardised by inputs (N, D_in) of ordinary text."""
    return Detector.standardised(bank, Metric.none(inputs.shape[-1], inputs.device), inputs)


def evidence(
    engine: SpectrModel, prompts: Sequence[Sequence[int]], detectors: Detectors
) -> Evidence:
    """What token ids of prompts tell in one metric."""
    requests = engine.reader.requests(prompts)
    found = requests.evidence(engine.library)
    listen(engine, requests, lambda bank, x: found.add(bank, detectors[bank].scores(x)))
    return found


def whom(found: Evidence, ordinary: Tensor, expert: int) -> dict[str, list[float]]:
    """Of R requests that are all for one expert:

    ordinary: (R', E) certainty of ordinary prompts.
    one: 1 where the mean over the layers names it. vote: 1 where it is the commonest choice of the
    layers. layers: share of its layers that would choose it.
    """
    num_right = torch.zeros(len(found.certainty))
    num_own = 0
    votes = torch.zeros_like(found.certainty)
    for bank, certainty in found.by_layer.items():
        named = bank.expert_ids[certainty.argmax(-1)]  # (R, P)
        votes.scatter_add_(1, named, torch.ones(named.shape))
        if expert in bank.expert_ids:
            num_right += (named == expert).sum(1)
            num_own += len(bank.paths)
    return {
        "one": (standing(found.certainty, ordinary).argmax(-1) == expert).float().tolist(),
        "vote": (votes.argmax(-1) == expert).float().tolist(),
        "layers": (num_right / num_own).tolist(),
    }


def by_metric(
    engine: SpectrModel,
    prompts: Sequence[str],
    expert: int,
    metrics: Mapping[str, Measured],
) -> dict[str, dict[str, list[float]]]:
    """`whom` by metric, of prompts that are all for one expert."""
    ids = [engine.encode(prompt) for prompt in prompts]
    return {
        name: whom(evidence(engine, ids, metric.detectors), metric.ordinary, expert)
        for name, metric in metrics.items()
    }


def whom_figures(
    rows: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
    is_heldout: Mapping[str, Sequence[bool]],
) -> dict[str, Any]:
    """Means by metric and wording, over the domains. rows: `by_metric` of each domain.
    is_heldout: of each domain's requests, whether their wording was never trained."""
    groups = {"all": (True, False), "seen wording": (False,), "held-out wording": (True,)}
    result: dict[str, Any] = {}
    for metric in METRICS:
        result[metric] = {}
        for group, wordings in groups.items():
            means: dict[str, list[float]] = {}
            for name, of_metrics in rows.items():
                for key, values in of_metrics[metric].items():
                    pairs = zip(values, is_heldout[name], strict=True)
                    chosen = [value for value, wording in pairs if wording in wordings]
                    if chosen:
                        means.setdefault(key, []).append(sum(chosen) / len(chosen))
            if means:
                result[metric][group] = {
                    key: round(sum(values) / len(values), 4) for key, values in means.items()
                }
    return result
