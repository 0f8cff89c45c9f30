"""What was measured, as pictures: one sorted chart for each question, of one domain or of all.

The numbers are those of `assets/results/`. docs/results.md and docs/performance.md say how they
were measured.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spectr_demo.charts import Bar, Picture, bars, best_first, grid
from spectr_demo.config import ASSETS, DEFAULT_ROUTER
from spectr_demo.evaluation.tasks import TASKS
from spectr_demo.routing.routers import ROUTERS

DECODE = ASSETS / "results" / "decode.json"
ALL = ""  # the filter that leaves all domains in
_NUM_EXPERTS = 8  # of the libraries that were timed, the one nearest to the shipped ones
# Rows of the results that are no routers of the table, and rows of the measurements of speed.
_NAMES = {
    "oracle": "its own expert, given",
    "uniform (outputs)": "Uniform merge, outputs",
    "uniform (parameters)": "Uniform merge, factors",
    "TIES": "TIES merge",
    "context, always an expert": "In context, never none",
    "bare base": "Base, without routing code",
}
_NOT_TIMED_HERE = ("torch's layers",)


def pictures(results: Mapping[str, Any], domain: str = ALL) -> dict[str, Picture | None]:
    """By the question that each answers. domain: a task's name, or `ALL`."""
    return {
        "right": _right(results["scores"], domain),
        "finds": _finds(results.get("decisions"), domain),
        "chat": _chat(results),
        "cost": _cost(json.loads(DECODE.read_text(encoding="utf-8"))),
        "confusion": _confusion((results.get("ordinary") or {}).get("chosen"), domain),
    }


def domains(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the filter offers: title and name of each domain, all of them first."""
    names = next(iter(results["scores"].values()))["domains"]
    titled = [(TASKS[name].title if name in TASKS else name, name) for name in names]
    return [("all domains", ALL), *titled]


def _name(label: str) -> str:
    """Of a row, for people."""
    if label in ROUTERS:
        return ROUTERS[label].display_name
    return _NAMES.get(label, label.replace("DARE, seed", "DARE merge, seed"))


def _of(rows: Mapping[str, Any], domain: str) -> list[Bar]:
    """The mean of a domain, or of all, for each row."""
    means = {
        label: row["domains"][domain] if domain else row["macro"] for label, row in rows.items()
    }
    return best_first(
        [
            Bar(
                name=_name(label),
                value=mean["mean"],
                low=mean["low"],
                high=mean["high"],
                is_marked=label == DEFAULT_ROUTER,
            )
            for label, mean in means.items()
        ]
    )


def _place(domain: str) -> str:
    """Where it was measured, at the end of a sentence."""
    return f" in {domain}" if domain else ""


def _right(scores: Mapping[str, Any], domain: str) -> Picture:
    rows = _of(scores, domain)
    values = {label: _mean(row, domain) for label, row in scores.items()}
    title = f"{rows[0].name} scores most{_place(domain)}: {rows[0].value:.2f}"
    if {DEFAULT_ROUTER, "oracle", "spectr-paper"} <= values.keys():
        title = (
            f"{_name(DEFAULT_ROUTER)} scores {values[DEFAULT_ROUTER]:.2f}{_place(domain)}; a "
            f"prompt’s own expert {values['oracle']:.2f}, SpectR as in the paper "
            f"{values['spectr-paper']:.2f}"
        )
    num = next(iter(next(iter(scores.values()))["domains"].values()))["num"]
    return Picture(
        title=title,
        note=f"Score of the answers, by each task’s own scorer; {num} held-out prompts a domain",
        figure=bars(rows, axis="mean score, 1 is right"),
        header=("router", "score (95% interval)"),
        rows=[(bar.name, bar.words(".3f")) for bar in rows],
    )


def _mean(row: Mapping[str, Any], domain: str) -> float:
    mean: float = (row["domains"][domain] if domain else row["macro"])["mean"]
    return mean


def _finds(decisions: Mapping[str, Any] | None, domain: str) -> Picture | None:
    if not decisions:
        return None
    rows = _of(decisions, domain)
    own = next((bar for bar in rows if bar.is_marked), rows[0])
    by_token = [label for label in decisions if label in ROUTERS and ROUTERS[label].score]
    other = max(by_token, key=lambda label: _mean(decisions[label], domain), default=None)
    best = (
        f"; of those that look at single tokens, {_name(other)} is best with "
        f"{_mean(decisions[other], domain):.0%}"
        if other
        else ""
    )
    return Picture(
        title=f"{own.name} takes the right expert in {own.value:.0%} of its "
        f"decisions{_place(domain)}{best}",
        note="A decision is one answer token in one linear layer, while the reference answer is "
        "read; its first choice counts",
        figure=bars(rows, axis="share of decisions", form=".0%"),
        header=("router", "share right (95% interval)"),
        rows=[(bar.name, bar.words(".1%")) for bar in rows],
    )


def _chat(results: Mapping[str, Any]) -> Picture | None:
    rows = best_first(
        [
            Bar(
                name=_name(label),
                value=row["kl"],
                low=row["kl_interval"]["low"],
                high=row["kl_interval"]["high"],
                is_marked=label == DEFAULT_ROUTER,
            )
            for label, row in results["offdomain"].items()
        ],
        is_less_better=True,
    )
    if not rows:
        return None
    own = next((bar for bar in rows if bar.is_marked), rows[0])
    num = results["meta"]["settings"]["num_offdomain"]
    return Picture(
        title=f"{own.name} moves the base’s chat by {own.value:.2f} nats a token; the others "
        f"that choose, by {_least(rows, own):.2f} or more",
        note=f"How far answers to {num} prompts that no expert fits are moved (KL to the base, of "
        f"no domain): less is better.{_taken(results.get('ordinary'))}",
        figure=bars(rows, axis="nats a token"),
        header=("router", "KL in nats a token (95% interval)"),
        rows=[(bar.name, bar.words(".3f")) for bar in rows],
    )


def _taken(ordinary: Mapping[str, Any] | None) -> str:
    """How many ordinary prompts get an expert all the same."""
    if not ordinary:
        return ""
    lengths = ordinary["ordinary"]["lengths"].values()
    num = sum(each["num"] for each in lengths)
    share = sum(each["mean"] * each["num"] for each in lengths) / num
    return f" Of {num} other ordinary prompts it gave an expert to {share:.0%}."


def _least(rows: Sequence[Bar], own: Bar) -> float:
    """Of the other routers that choose; merges and the base choose nothing."""
    choosing = {row.display_name for row in ROUTERS.values() if row.chooses}
    others = [bar.value for bar in rows if bar is not own and bar.name in choosing]
    return min(others, default=own.value)


def _cost(decode: Mapping[str, Any]) -> Picture:
    """Speed of decoding; the ends are those of the rounds, not an interval of the mean."""
    rows = best_first(
        [
            Bar(
                name=_name(row["case"]),
                value=1 / row["seconds_per_token"],
                low=1 / row["max"],
                high=1 / row["min"],
                is_marked=row["case"] == DEFAULT_ROUTER,
            )
            for row in decode["results"]
            if row["experts"] == _NUM_EXPERTS and row["case"] not in _NOT_TIMED_HERE
        ]
    )
    values = {bar.name: bar.value for bar in rows}
    base, own, peft = (values[_name(case)] for case in ("base", DEFAULT_ROUTER, "PEFT Arrow"))
    return Picture(
        title=f"{_name(DEFAULT_ROUTER)} makes {own:.0f} tokens a second where the base makes "
        f"{base:.0f}, and PEFT’s Arrow {peft:.0f}",
        note=f"The embedded base with {_NUM_EXPERTS} experts on {decode['device']}, "
        f"{decode['threads']} threads: median of the rounds, and their slowest and fastest. "
        f"{_name(DEFAULT_ROUTER)} reads each request once more before it answers; that is not in "
        "it",
        figure=bars(rows, axis="tokens a second", form=".1f"),
        header=("router", "tokens a second (slowest-fastest round)"),
        rows=[(bar.name, bar.words(".1f")) for bar in rows],
    )


def _confusion(chosen: Mapping[str, Mapping[str, int]] | None, domain: str) -> Picture | None:
    """Whom requests of each domain went to."""
    if not chosen:
        return None
    names = [name for name in chosen if name != "ordinary"]
    shown = (
        [domain] if domain in names else [*names, *(["ordinary"] if "ordinary" in chosen else [])]
    )
    went = [*names, "base", "several"]
    counts = np.array([[chosen[row].get(column, 0) for column in went] for row in shown], float)
    percent = 100 * counts / counts.sum(1, keepdims=True)
    right = sum(chosen[name].get(name, 0) for name in shown if name in names)
    of = sum(sum(chosen[name].values()) for name in shown if name in names)
    lost = {
        (row, column): num
        for row in shown
        for column, num in chosen[row].items()
        if row != column and row in names
    }
    most = max(lost, key=lambda pair: lost[pair], default=None)
    where = f"; {most[0]} lost most, {lost[most]} to {_whom(most[1])}" if most else ""
    percent[counts == 0] = np.nan
    return Picture(
        title=f"{right} of {of} requests{_place(domain if domain in names else ALL)} found their "
        f"own expert{where}",
        note=f"{_name(DEFAULT_ROUTER)}, held-out prompts as they are served, in percent. "
        "“ordinary”: prompts that no expert fits, best left to the base; “several”: cut into "
        "several requests",
        figure=grid(
            percent,
            x=went,
            y=shown,
            x_title="went to",
            y_title="request of",
            form=".0f",
        ),
        header=("request of", *went),
        rows=[(row, *(str(chosen[row].get(column, 0)) for column in went)) for row in shown],
    )


def _whom(column: str) -> str:
    return {"base": "the base", "several": "several experts at once"}.get(column, column)
