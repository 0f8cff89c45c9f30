"""Ordinary prompts, where no expert fits: how many are given one, and how many requests are lost.

All prompts are cut into lanes as they are when they are served. An ordinary prompt is right if the
base answers all of it. A request of a domain is right if it is one lane, for its own expert. How
sure the router must be, its `confidence`, trades one for the other. Cutting a prompt takes one
reading; each confidence makes its own lanes of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from spectr_demo.config import RouterConfig
from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation.scores import summarize

CONFIDENCES = (0.5, 0.75, 0.9, 0.95, 0.98, 0.99)
# What was aimed at: shares of ordinary prompts with an expert, and of requests that are lost.
TARGETS = {"ordinary": 0.05, "lost": 0.01}

Chosen = list[str | None]  # the expert of each lane of a prompt
ByConfidence = dict[str, list[Chosen]]  # of each prompt


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Single requests of a domain: whom their lanes are for, and whether the wording of each was
    never trained."""

    chosen: ByConfidence
    is_heldout: list[bool]


def chosen_experts(
    engine: SpectrModel, router: RouterConfig, prompts: Sequence[str], description: str = "prompts"
) -> ByConfidence:
    """Whom the lanes of each prompt are for, at each of the `levels`."""
    names = engine.library.names
    least = {
        str(level): engine.reader.least_standing(replace(router, confidence=level))
        for level in levels(router)
    }
    result: ByConfidence = {level: [] for level in least}
    for prompt in tqdm(prompts, desc=description, unit="prompt", leave=False):
        read = engine.reader.prompt(engine.encode(prompt))
        for level, at_least in least.items():
            experts = [lane.expert for lane in read.lanes(router, at_least)]
            result[level].append([None if e is None else names[e] for e in experts])
    return result


def levels(router: RouterConfig) -> list[float]:
    """The confidences that are compared, the router's own among them."""
    own = () if router.confidence is None else (router.confidence,)
    return sorted({*CONFIDENCES, *own})


def outcome(lanes: Sequence[str | None], name: str) -> str:
    """Of a request for the expert `name`: `right`, left to the `base`, or `wrong`."""
    if list(lanes) == [name]:
        return "right"
    return "wrong" if any(lanes) else "base"


def ordinary_figures(
    entries: Mapping[str, Sequence[Mapping[str, str]]],
    ordinary: Mapping[str, ByConfidence],
    asked: Mapping[str, Asked],
    confidence: float,
) -> dict[str, Any]:
    """What the results' JSON file says of them. entries: of `ordinary.json`, by length. ordinary:
    whom their lanes are for. asked: by domain. confidence: the router's own.

    `curve`: by confidence, the share of `short` and of `longer` ordinary prompts with an expert,
    and the shares of requests that are left to the `base` or `wrong`. The rest is at the router's
    own confidence. `ordinary`: with intervals, by length, then by kind and by language over both.
    `requests`: over all, by wording and by domain. `chosen`: by domain, and for the ordinary
    prompts, how many prompts went to each expert, to the `base`, or to `several`.
    """
    own = str(confidence)
    curve = {
        level: {
            **{
                length: _share([any(lanes) for lanes in of_length[level]])
                for length, of_length in ordinary.items()
            },
            **_outcomes([row for name, of in asked.items() for row in _rows(name, of, level)]),
        }
        for level in next(iter(ordinary.values()))
    }
    taken: dict[str, dict[str, list[float]]] = {"lengths": {}, "kinds": {}, "languages": {}}
    for length, of_length in entries.items():
        for entry, lanes in zip(of_length, ordinary[length][own], strict=True):
            groups = (length, entry["kind"], entry["language"])
            for group, by_group in zip(groups, taken.values(), strict=True):
                by_group.setdefault(group, []).append(float(any(lanes)))
    rows = {name: _rows(name, of, own) for name, of in asked.items()}
    everything = [row for of_domain in rows.values() for row in of_domain]
    wordings = {"seen wording": False, "held-out wording": True}
    requests = {
        "all": everything,
        **{
            key: [row for row in everything if row[1] == is_held]
            for key, is_held in wordings.items()
        },
    }
    return {
        "confidence": confidence,
        "curve": curve,
        "ordinary": {
            key: {group: summarize(values).to_dict() for group, values in by_group.items()}
            for key, by_group in taken.items()
        },
        "requests": {key: _outcomes(some) for key, some in requests.items() if some},
        "domains": {name: _outcomes(some) for name, some in rows.items()},
        "chosen": {
            **{name: _counted(of.chosen[own]) for name, of in asked.items()},
            "ordinary": _counted(
                [lanes for of_length in ordinary.values() for lanes in of_length[own]]
            ),
        },
    }


def _counted(prompts: Sequence[Chosen]) -> dict[str, int]:
    """How many prompts went whole to each expert or to the `base`, and how many to `several`."""
    whole = [(lanes[0] or "base") if len(lanes) == 1 else "several" for lanes in prompts]
    return dict(sorted(Counter(whole).items()))


def _rows(name: str, asked: Asked, level: str) -> list[tuple[str, bool]]:
    """Of each request: its outcome, and whether its wording was never trained."""
    outcomes = [outcome(lanes, name) for lanes in asked.chosen[level]]
    return list(zip(outcomes, asked.is_heldout, strict=True))


def _outcomes(rows: Sequence[tuple[str, bool]]) -> dict[str, Any]:
    shares = {key: _share([row[0] == key for row in rows]) for key in ("base", "wrong")}
    return {"num": len(rows), **shares}


def _share(values: Sequence[bool]) -> float:
    return round(sum(values) / max(1, len(values)), 4)
