"""The figures of messages with two and three requests, from the scores of their parts.

Axes: M messages, D domains, N resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectr_demo.evaluation.composition import SEGMENTS, SINGLE, Message, Routing, Scores
from spectr_demo.evaluation.messages import FORMATS
from spectr_demo.evaluation.results import RESAMPLING_SEED, interval
from spectr_demo.evaluation.scores import NUM_RESAMPLES, summarize

PLACES = ("first", "second", "third")
SIZES = {2: "two", 3: "three"}
ENOUGH = 0.9  # of the score that its own expert reaches alone, for a part to count as right
FULL = 0.999
TARGETS = {"segments": 0.85, "subject": 0.9, "gap": 0.05}

Floats = NDArray[np.float64]


def composition_figures(
    messages: Sequence[Message],
    scores: Mapping[str, Scores],
    routing: Mapping[str, Routing | None],
) -> dict[str, Any]:
    """What the results' JSON file says of them. scores, routing: by label; `SINGLE` and `SEGMENTS`
    must be among the scores.

    `num`: messages by size. Of each label in `rows`:
    `domains`: mean score of a domain's parts.
    `of_single`: share of the score that each request's own expert reaches alone, over `all` parts,
    by size, place and format. That is a ratio for each domain, then their mean; a domain in which
    that expert never scores is left out. `of_segments`: the same, of the segment oracle's, over all
    parts. `gap`: share in the first place less the one in the second. Intervals are percentile
    bootstraps over messages; all figures share the resampled messages.
    `whole`: share of messages of which all parts are right, by size, see `is_right`.
    `routing`: see `_routing_figures`; None for a router that does not choose.
    """
    sums = Resampled(messages)
    used = {
        group for m in messages for place in range(len(m.names)) for group in groups_of(m, place)
    }
    groups = [g for g in ("all", *SIZES.values(), *PLACES, *FORMATS) if g in used]
    single, segments = scores[SINGLE], scores[SEGMENTS]
    rows: dict[str, Any] = {}
    for label, values in scores.items():
        of_single = {group: sums.shares(values, single, group) for group in groups}
        of_segments = sums.shares(values, segments, "all")
        of_routing = routing.get(label)
        rows[label] = {
            "domains": _domain_means(messages, values),
            "of_single": {n: _figure(s) for n, s in of_single.items() if s is not None},
            **({} if of_segments is None else {"of_segments": _figure(of_segments)}),
            **_gap(of_single),
            "whole": {
                name: summarize(right).to_dict()
                for name, right in _whole(messages, values, single).items()
            },
            "routing": None if of_routing is None else _routing_figures(of_routing),
        }
    nums = [len(message.names) for message in messages]
    return {"num": {name: nums.count(size) for size, name in SIZES.items()}, "rows": rows}


class Resampled:
    """Sums over messages, as they are and resampled: always the same resamples."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self._messages = messages
        self._names = list(dict.fromkeys(name for m in messages for name in m.names))
        num = len(messages)
        rng = np.random.default_rng(RESAMPLING_SEED)
        drawn = rng.multinomial(num, np.full(num, 1 / num), size=NUM_RESAMPLES)
        # (1 + N, M): how often each message counts. The first row is the messages as they are.
        self._counts = np.concatenate([np.ones((1, num)), drawn])

    def shares(self, values: Scores, reference: Scores, group: str) -> Floats | None:
        """(1 + N,) of the reference's score: a ratio for each domain, then their mean.

        NaN where a resample has nothing to divide by; None where the messages have nothing.
        """
        top, bottom = (self._counts @ self._sums(part, group) for part in (values, reference))
        ratios = np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)  # (1 + N, D)
        num = (bottom > 0).sum(1)
        means = np.divide(ratios.sum(1), num, out=np.full(len(num), np.nan), where=num > 0)
        return None if np.isnan(means[0]) else means

    def summands(self, values: Scores, reference: Scores, group: str) -> Floats | None:
        """(M,) what each message adds to the share; None where the messages have nothing to divide
        by. `shares` has their sum first."""
        bottom = self._sums(reference, group).sum(0)  # (D,)
        has = bottom > 0
        if not has.any():
            return None
        return (self._sums(values, group)[:, has] / bottom[has]).mean(1)

    def _sums(self, values: Scores, group: str) -> Floats:
        """(M, D) sums of the scores of a group's parts."""
        sums = np.zeros((len(self._messages), len(self._names)))
        for m, message in enumerate(self._messages):
            for place, name in enumerate(message.names):
                if group in groups_of(message, place):
                    sums[m, self._names.index(name)] += values[m][place]
        return sums


def groups_of(message: Message, place: int) -> tuple[str, ...]:
    """The groups of a part: all, by its message's size, its place and its message's format."""
    return ("all", SIZES[len(message.names)], PLACES[place], message.format)


def _figure(shares: Floats) -> dict[str, float]:
    return interval(shares[0], shares[1:][~np.isnan(shares[1:])])


def _gap(shares: Mapping[str, Floats | None]) -> dict[str, Any]:
    first, second = (shares.get(name) for name in PLACES[:2])
    return {} if first is None or second is None else {"gap": _figure(first - second)}


def _domain_means(messages: Sequence[Message], values: Scores) -> dict[str, float]:
    by_domain: dict[str, list[float]] = {}
    for message, parts in zip(messages, values, strict=True):
        for name, score in zip(message.names, parts, strict=True):
            by_domain.setdefault(name, []).append(score)
    return {name: round(float(np.mean(scores)), 4) for name, scores in by_domain.items()}


def is_right(score: float, single: float) -> bool:
    """Whether a part counts as right, by what its own expert scores when asked for it alone.

    Some tasks give full marks or none, others a share of them. One rule serves both: nine tenths of
    that expert's score, or full marks where it scores nothing.
    """
    return score >= (ENOUGH * single if single > 0 else FULL)


def _whole(messages: Sequence[Message], values: Scores, single: Scores) -> dict[str, list[float]]:
    """By size, of each message: 1.0 where all parts are right."""
    out: dict[str, list[float]] = {}
    for message, parts, alone in zip(messages, values, single, strict=True):
        right = all(is_right(score, one) for score, one in zip(parts, alone, strict=True))
        out.setdefault(SIZES[len(message.names)], []).append(float(right))
    return out


def _routing_figures(routing: Routing) -> dict[str, Any]:
    """Means over messages by place, of what `segment_routing` gives.

    prompt, answer: accuracy by place. switch: tokens until a part after another has its expert;
    switched: share of these parts that ever have it. Absent where no part follows another.
    """
    result: dict[str, Any] = {}
    for key in ("prompt", "answer"):
        at = [[row[key][place] for row in routing if len(row[key]) > place] for place in range(3)]
        result[key] = {
            name: round(float(np.mean(values)), 4)
            for name, values in zip(PLACES, at, strict=True)
            if values
        }
    for key in ("switch", "switched"):
        later = [value for row in routing for value in row[key][1:]]
        if later:
            result[key] = round(float(np.mean(later)), 4)
    return result
