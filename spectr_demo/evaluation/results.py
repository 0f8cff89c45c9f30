"""The content of the results' JSON file, from what was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spectr_demo.config import library_versions
from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation.contenders import Contender
from spectr_demo.evaluation.scores import NUM_RESAMPLES, summarize
from spectr_demo.evaluation.tasks import SPLIT_SEED

RESAMPLING_SEED = 0


def conditions(
    engine: SpectrModel, settings: Mapping[str, Any], contenders: Sequence[Contender]
) -> dict[str, Any]:
    """What was measured, and on what: commit, date, base, device, versions, experts, settings."""
    base = engine.base
    device = base.device
    return {
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "seed": SPLIT_SEED,
        "base": base.source,
        "base_fingerprint": base.fingerprint,
        "quantization": base.quantization,
        "compute_dtype": str(base.compute_dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU ({platform.machine()}, {os.cpu_count()} cores)",
        "versions": library_versions(),
        "projections": list(engine.library.projections),
        "experts": {a.name: a.sha256 for a in engine.library.adapters},
        "settings": dict(settings),
        "routers": {
            c.label: c.router if isinstance(c.router, str) else c.router.to_json()
            for c in contenders
        },
    }


def _commit() -> str | None:
    """The commit that is measured, `-dirty` where files differ from it; None outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def task_scores(answers: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """Task scores by label, from the scores of single answers by label and domain.

    `domains`: mean and 95% interval of each. `macro`: the mean over the domains. `of_oracle`: the
    mean over the domains of the score divided by the oracle's; domains in which the oracle never
    scores are left out. Intervals of the last two are percentile bootstraps, in which all labels
    share the resampled prompts.
    """
    names = list(next(iter(answers.values())))
    rng = np.random.default_rng(RESAMPLING_SEED)
    draws = {
        name: rng.integers(0, num, size=(NUM_RESAMPLES, num))
        for name, num in ((name, len(next(iter(answers.values()))[name])) for name in names)
    }
    means = {
        label: np.array([np.mean(row[name]) for name in names]) for label, row in answers.items()
    }
    resampled = {
        label: np.stack([np.asarray(row[name])[draws[name]].mean(1) for name in names])
        for label, row in answers.items()
    }  # (domains, resamples)
    result: dict[str, Any] = {}
    for label, row in answers.items():
        result[label] = {
            "domains": {name: summarize(row[name]).to_dict() for name in names},
            "macro": interval(means[label].mean(), resampled[label].mean(0)),
        }
        scores = means["oracle"] > 0 if "oracle" in answers else np.zeros(len(names), np.bool_)
        if scores.any():
            oracle = resampled["oracle"]
            ratios = np.divide(
                resampled[label], oracle, out=np.full_like(oracle, np.nan), where=oracle > 0
            )
            result[label]["of_oracle"] = interval(
                (means[label][scores] / means["oracle"][scores]).mean(),
                np.nanmean(ratios[scores], axis=0),
            )
    return result


def interval(mean: float, resampled: NDArray[np.float64]) -> dict[str, float]:
    """A mean with the 95% interval of what resampling gave (N,)."""
    low, high = np.quantile(resampled, (0.025, 0.975))
    return {
        "mean": round(float(mean), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
    }


def likelihoods(readings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """By label: mean NLL of an answer token in nats, by domain and over them.

    `way`: how far this is on the way from the base's (0) to the oracle's (1).
    """
    nll = {
        label: {name: float(np.mean(part["nll"])) for name, part in row.items()}
        for label, row in readings.items()
    }
    macro = {label: float(np.mean(list(row.values()))) for label, row in nll.items()}
    result: dict[str, Any] = {}
    for label, row in nll.items():
        result[label] = {"domains": row, "macro": macro[label]}
        if {"base", "oracle"} <= macro.keys():
            way = (macro["base"] - macro[label]) / (macro["base"] - macro["oracle"])
            result[label]["way"] = round(way, 4)
    return result


def accuracies(readings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Routing accuracy by label and domain, of those routers that choose."""
    return {
        label: {name: row[name]["accuracy"] for name in row}
        for label, row in readings.items()
        if all("accuracy" in part for part in row.values())
    }


def decisions(readings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """By label, of those routers that choose: the share of answer decisions for the right expert,
    as `task_scores` has scores."""
    right = {
        label: {name: part["right"] for name, part in row.items()}
        for label, row in readings.items()
        if all("right" in part for part in row.values())
    }
    return task_scores(right) if right else {}


def chat_shifts(chat: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """Means by label over the prompts; of the KL, also with the interval of a bootstrap."""
    result = {}
    for label, row in chat.items():
        kl, rng = np.asarray(row["kl"]), np.random.default_rng(RESAMPLING_SEED)
        draws = rng.integers(0, len(kl), size=(NUM_RESAMPLES, len(kl)))
        result[label] = {
            **{key: float(np.mean(values)) for key, values in row.items()},
            "kl_interval": interval(kl.mean(), kl[draws].mean(1)),
        }
    return result


def join_readings(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One reading from those of its parts; a mean counts as much as it has texts."""
    result: dict[str, Any] = {
        key: [value for part in parts for value in part[key]]
        for key in ("nll", "right")
        if key in parts[0]
    }
    groups = [part["accuracy"] for part in parts if "accuracy" in part]
    if groups:
        result["accuracy"] = {
            name: _mean([group[name] for group in groups if name in group])
            for name in dict.fromkeys(name for group in groups for name in group)
        }
    return result


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of equal keys, weighted by the rows' `num`, and their sum."""
    nums = [row["num"] for row in rows]
    means = {
        key: np.average([row[key] for row in rows], axis=0, weights=nums).tolist()
        for key in rows[0]
        if key != "num"
    }
    return {"num": sum(nums), **means}
