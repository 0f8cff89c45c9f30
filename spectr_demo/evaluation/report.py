"""The results as Markdown: `docs/results.md` and the page show the same tables of one JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from spectr_demo.config import ASSETS
from spectr_demo.evaluation.composition import SEGMENTS, SINGLE
from spectr_demo.evaluation.composition_figures import ENOUGH, PLACES, SIZES, TARGETS
from spectr_demo.evaluation.findings import HEAD, LEVEL, SUBJECT, in_words, judged_claims
from spectr_demo.evaluation.messages import FORMATS
from spectr_demo.evaluation.ordinary import TARGETS as LIMITS

RESULTS = ASSETS / "results" / "evaluation.json"

# What is claimed of two rows, by the figure that one has more of.
CLAIMS = {
    "scores": "One request: `{more}` scores more than `{less}`",
    "likelihood": "The reference answer gains more likelihood with `{more}` than with `{less}`",
    "decisions": "`{more}` takes the right expert in more decisions than `{less}`",
    "chat": "Ordinary chat is moved further by `{more}` than by `{less}` (KL in nats a token)",
    "requests": "The right expert is named more often by {more} than by {less}",
    "messages": "Two and three requests: `{more}` scores more than `{less}`",
    "places": f"Two and three requests, `{SUBJECT}`: the {{more}} scores more than the {{less}}",
}


def load_results(path: Path = RESULTS) -> dict[str, Any] | None:
    """The shipped results, or None where there are none."""
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return results


def to_markdown(results: Mapping[str, Any]) -> str:
    """The whole report, headings included."""
    sections = [HEAD.format(findings=in_words(results), conditions=conditions(results["meta"]))]
    if judged_claims(results):
        sections.append("## Claims\n\n" + claims_table(results))
    if "scores" in results:  # else the messages were measured alone
        sections += [
            "## Overview\n\n" + overview_table(results),
            "## Task scores\n\n" + scores_table(results),
            "## Likelihood of the reference answers\n\n" + likelihood_table(results),
            "## Routing accuracy\n\n" + accuracy_table(results),
            "## Where in the model\n\n" + depth_table(results),
        ]
    if results.get("whom"):
        sections.append("## Whom a request is for\n\n" + whom_table(results["whom"]))
    if results.get("ordinary"):
        title = "## Ordinary prompts, where no expert fits\n\n"
        sections.append(title + ordinary_tables(results["ordinary"]))
    if results.get("offdomain"):
        sections.append("## Ordinary chat: how far it is moved\n\n" + offdomain_table(results))
    if composition := results.get("composition"):
        title = "## Messages with two and three requests\n\n"
        sections.append(title + composition_tables(composition))
    if results.get("stress"):
        sections.append(
            "## Weak and alike experts, and many of them\n\n" + stress_tables(results["stress"])
        )
    if results.get("retrained"):
        sections.append("## Experts trained again\n\n" + retrained_tables(results["retrained"]))
    return "\n".join(sections)


def claims_table(results: Mapping[str, Any]) -> str:
    """One line for each claim, with its paired test."""
    claims = judged_claims(results)
    rows = [
        [
            CLAIMS[claim["figure"]].format(more=claim["more"], less=claim["less"]),
            f"{claim['of_more']:.3f}",
            f"{claim['of_less']:.3f}",
            _interval(claim["difference"], " to "),
            f"{claim['p']:.4f}",
            str(claim["num"]),
            claim["shown"],
        ]
        for claim in claims
    ]
    header = ["claim", "first", "second", "difference", "p", "n", "shown"]
    return _table(header, rows) + (
        "\nAll rows answer the same prompts, so two of them are compared prompt by prompt. `first` "
        "and `second` are their figures, as the tables below have them. `difference`: with a 95% "
        "interval, a bootstrap over the prompts of each domain, or over whole messages. The "
        "oracle's scores are taken as they are. `p`: two-sided, of a permutation test, in which "
        "the two rows exchange their results for single prompts, or for whole messages, at random. "
        "With more than 13 of them it is drawn, and 0.0002 is the least it can be. "
        "`n`: prompts or messages. `shown`: whether p, times the number of claims "
        f"({len(claims)}), is below {LEVEL} (Bonferroni's correction).\n"
    )


def overview_table(results: Mapping[str, Any]) -> str:
    """One line for each router: what it scores, where it sends tokens, what it does to chat."""
    rows = []
    for label, row in results["scores"].items():
        accuracy = results["accuracy"].get(label)
        chat = results["offdomain"].get(label)
        likelihood = results["likelihood"][label]
        rows.append(
            [
                label,
                _interval(row["of_oracle"]) if "of_oracle" in row else "-",
                f"{likelihood['way']:.1%}" if "way" in likelihood else "-",
                _mean(part["all"]["answer"] for part in accuracy.values()) if accuracy else "-",
                f"{chat['kl']:.2f}" if chat else "-",
            ]
        )
    header = [
        *("router", "of the oracle's task score", "of the way in likelihood"),
        *("routing accuracy, answer", "KL to the base on ordinary chat"),
    ]
    num = results["meta"]["settings"]["num_examples"]
    return _table(header, rows) + (
        f"\n{num} held-out prompts a domain. `oracle` answers each with its own domain's expert, "
        "`base` with none. The likelihood is that of the reference answers: 0% is the base's, "
        "100% the oracle's.\n"
    )


def scores_table(results: Mapping[str, Any]) -> str:
    """Share of the oracle's score, and the score itself by domain."""
    scores = results["scores"]
    names = list(next(iter(scores.values()))["domains"])
    rows = [
        [
            label,
            _interval(row["of_oracle"]) if "of_oracle" in row else "-",
            _interval(row["macro"]),
            *(f"{row['domains'][name]['mean']:.2f}" for name in names),
        ]
        for label, row in scores.items()
    ]
    num = results["meta"]["settings"]["num_examples"]
    return (
        _table(["router", "of the oracle's", "mean of domains", *names], rows)
        + f"\n{num} held-out prompts a domain. Half of them have wordings never trained on. `of "
        "the oracle's`: each domain's score divided by the oracle's, then the mean over domains.\n"
    )


def likelihood_table(results: Mapping[str, Any]) -> str:
    """NLL of an answer token, and the share of the way from base to oracle."""
    likelihood = results["likelihood"]
    names = list(next(iter(likelihood.values()))["domains"])
    rows = [
        [
            label,
            f"{row['way']:.1%}" if "way" in row else "-",
            f"{row['macro']:.3f}",
            *(f"{row['domains'][name]:.2f}" for name in names),
        ]
        for label, row in likelihood.items()
    ]
    return (
        _table(["router", "of the way to the oracle", "mean of domains", *names], rows)
        + "\nMean negative log-likelihood of a token of the reference answer, in nats.\n"
    )


def accuracy_table(results: Mapping[str, Any]) -> str:
    """Share of decisions for the right expert."""
    rows = []
    for label, row in results["accuracy"].items():
        groups = {
            group: [part[group] for part in row.values() if group in part]
            for group in ("all", "seen wording", "held-out wording")
        }
        keys = ("answer", "prompt", "among_top_k", "majority")
        rows.append(
            [
                label,
                *(_mean(part[key] for part in groups["all"]) for key in keys),
                *(
                    _mean(part["answer"] for part in groups[group])
                    for group in ("seen wording", "held-out wording")
                ),
            ]
        )
    header = ["router", "answer", "prompt", "among first K", "majority vote"]
    return (
        _table([*header, "answer, seen wordings", "answer, held-out wordings"], rows)
        + "\nA decision is one token in one layer and projection. The columns give the share of "
        "decisions whose first choice is the right expert, as the mean over domains. `majority "
        "vote`: share of texts whose commonest choice is the right expert. A router that reads the "
        "request chooses once for all decisions of a text.\n"
    )


def accuracy_by_layer(results: Mapping[str, Any]) -> dict[str, list[float]]:
    """Accuracy on answer tokens in each layer (L), by router: mean over the domains."""
    return {
        label: np.mean([part["all"]["by_layer"] for part in row.values()], axis=0).tolist()
        for label, row in results["accuracy"].items()
    }


def depth_table(results: Mapping[str, Any]) -> str:
    """Accuracy on answer tokens by depth, in up to five parts, and by projection."""
    rows: list[list[str]] = []
    edges: list[int] = []
    layers = accuracy_by_layer(results)
    for label, row in results["accuracy"].items():
        parts = [part["all"] for part in row.values()]
        by_layer = layers[label]
        num_parts = min(5, len(by_layer))
        edges = [round(i * len(by_layer) / num_parts) for i in range(num_parts + 1)]
        by_depth = [by_layer[a:b] for a, b in pairwise(edges)]
        by_projection = zip(*(part["by_projection"] for part in parts), strict=True)
        rows.append([label, *map(_mean, by_depth), *map(_mean, by_projection)])
    depths = [f"layers {a}-{b - 1}" for a, b in pairwise(edges)]
    header = ["router", *depths, *results["meta"]["projections"]]
    return _table(header, rows) + "\nRouting accuracy on answer tokens by depth and projection.\n"


def whom_table(whom: Mapping[str, Any]) -> str:
    """What one choice for all layers gives, and the metric."""
    keys = {"one": "one choice", "vote": "vote of the layers", "layers": "each layer for itself"}
    header = ["metric", "wordings", *keys.values()]
    lines = [
        [metric, group, *(f"{row[key]:.1%}" for key in keys)]
        for metric, groups in whom.items()
        for group, row in groups.items()
    ]
    return _table(header, lines) + (
        "\nShare of held-out single requests for which the right expert is named. One is named for "
        "each of them. Means over the domains. `one choice`: that of `spectr-context`, from the "
        "mean over the layers. `vote of the layers`: the commonest choice of the layers. `each "
        "layer for itself`: share of the layers whose own choice is right. `raw metric`: SpectR's "
        "score, standardised by ordinary text, without the metric of that text.\n"
    )


def ordinary_tables(ordinary: Mapping[str, Any]) -> str:
    """How many ordinary prompts get an expert, how many requests lose theirs, and the trade-off."""
    of = ordinary["ordinary"]
    requests = ordinary["requests"]
    lost = {group: row["base"] + row["wrong"] for group, row in requests.items()}
    measured = [
        *(
            (f"{length} ordinary prompts with an expert", row["mean"], row["num"], "ordinary")
            for length, row in of["lengths"].items()
        ),
        *(
            (f"requests lost, {group}", lost[group], row["num"], "lost")
            for group, row in requests.items()
        ),
    ]
    targets = [
        [
            *(what, str(num), f"{share:.1%}", f"<= {LIMITS[key]:.0%}"),
            "yes" if share <= LIMITS[key] else "no",
        ]
        for what, share, num, key in measured
    ]
    curve = [
        [
            *(f"{float(level):.2f}", *(f"{row[length]:.1%}" for length in of["lengths"])),
            *(f"{row[key]:.1%}" for key in ("base", "wrong")),
        ]
        for level, row in ordinary["curve"].items()
    ]
    domains = [
        [name, str(row["num"]), *(f"{row[key]:.1%}" for key in ("base", "wrong"))]
        for name, row in ordinary["domains"].items()
    ]

    def taken(name: str, key: str) -> str:
        rows = [
            [group, str(row["num"]), f"{row['mean']:.1%} ({row['low']:.1%}-{row['high']:.1%})"]
            for group, row in of[key].items()
        ]
        return _table([name, "prompts", "with an expert"], rows)

    ends = ["requests left to the base", "requests given to a wrong expert"]
    lengths = [f"{length} prompts with an expert" for length in of["lengths"]]
    return "\n".join(
        (
            f"`{SUBJECT}` as it is served, with its confidence of {ordinary['confidence']}. A "
            "prompt has an expert if one of its lanes has. A request is lost if it is not one lane "
            "for its own expert. The ordinary prompts are the list `test` of "
            "`evaluation/ordinary.json`; the router was tuned on another list.\n",
            _table(["what", "prompts", "measured", "target", "met"], targets),
            "The trade-off, by confidence:\n",
            _table(["confidence", *lengths, *ends], curve),
            "Requests by domain:\n",
            _table(["domain", "requests", *ends], domains),
            "Ordinary prompts by kind and by language, short and longer ones together. A near miss "
            "is about an expert's domain without being a request to it:\n",
            taken("kind", "kinds"),
            taken("language", "languages"),
        )
    )


def offdomain_table(results: Mapping[str, Any]) -> str:
    """How far each router moves the base where it should not."""
    rows = [
        [
            label,
            f"{row['kl']:.3f}",
            f"{row['agreement']:.1%}",
            f"{row['nll_rise']:.3f}",
            f"{row['unrouted']:.1%}" if "unrouted" in row else "-",
        ]
        for label, row in results["offdomain"].items()
    ]
    header = ["router", "KL to the base", "same likeliest token", "rise of NLL", "no expert"]
    return _table(header, rows) + (
        "\nMeasured on the base's own answers to prompts of no domain. KL(router || base) is in "
        "nats a token. `same likeliest token`: share of tokens whose likeliest choice stays. `rise "
        "of NLL`: of the answers' negative log-likelihood, in nats a token. `no expert`: share of "
        "decisions for none.\n"
    )


def composition_tables(composition: Mapping[str, Any]) -> str:
    """Messages with several requests: targets, scores by place and format, choices by segment."""
    num, rows = composition["num"], composition["rows"]
    measured = f" {conditions(composition['meta'])}" if "meta" in composition else ""
    return "\n".join(
        (
            f"{num['two']} messages with two held-out requests of different domains and "
            f"{num['three']} with three, in five formats (`bulleted` was never trained). A router "
            "answers a message as a whole. Line i of the answer is part i, and its domain's own "
            f"metric scores it. A list mark before it costs nothing.{measured}\n",
            targets_table(rows),
            "Share of the score that each request's own expert reaches when it is asked alone "
            "(`single-request oracle`). The `segment oracle` has each part read and answered by "
            "its own expert, by hand. A message is right if each part reaches "
            f"{ENOUGH:.0%} of what its own expert scores alone, or full marks where that scores "
            "nothing:\n",
            places_table(rows),
            "The same share by format:\n",
            _shares_table(rows, FORMATS),
            "Mean score of a domain's parts:\n",
            _table(
                ["router", *next(iter(rows.values()))["domains"]],
                (
                    [label, *(f"{score:.2f}" for score in row["domains"].values())]
                    for label, row in rows.items()
                ),
            ),
            "Routing accuracy, as a router reads a message and its reference answer: share of the "
            "decisions in a part's request, and in its answer, for the part's own expert. `tokens "
            "until the switch`: in a second or third answer, before most decisions of a token are "
            "for its own expert. `switched`: share of these answers where that happens. "
            f"`{SUBJECT}` has one expert for all of a lane: it switches at once or never, and "
            "where there are more or fewer lanes than requests all answers count as wrong:\n",
            segments_table(rows),
        )
    )


def targets_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """What was aimed at, and what was measured."""
    subject, segments = rows.get(SUBJECT, {}), rows[SEGMENTS]["of_single"].get("all")
    lines = [
        ("the segment oracle's share of the single-request oracle", ">=", "segments", segments),
        (f"`{SUBJECT}`: share of the segment oracle", ">=", "subject", subject.get("of_segments")),
        (f"`{SUBJECT}`: first place less second", "<=", "gap", subject.get("gap")),
    ]
    cells = []
    for what, sign, key, value in lines:
        target = TARGETS[key]
        met = "-"
        if value is not None:
            reached = value["mean"] >= target if sign == ">=" else value["mean"] <= target
            met = "yes" if reached else "no"
        cells.append([what, f"{sign} {target:.2f}", _interval_or_dash(value), met])
    return _table(["what", "target", "measured", "met"], cells)


def places_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each router: share of the single-request oracle by place, whole messages."""
    header = ["router", "all parts", "of the segment oracle", *PLACES, "first less second"]
    sizes = list(SIZES.values())
    return _table(
        [*header, *(f"messages of {size} right" for size in sizes)],
        (
            [
                label,
                _interval_or_dash(row["of_single"].get("all")),
                _interval_or_dash(row.get("of_segments")),
                *_shares(row, PLACES),
                _interval_or_dash(row.get("gap")),
                *(_interval_or_dash(row["whole"].get(size)) for size in sizes),
            ]
            for label, row in rows.items()
        ),
    )


def segments_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each router; `-` for one that does not choose, or answers the parts apart."""
    header = [f"{segment}, {place}" for segment in ("request", "answer") for place in PLACES]
    lines = []
    for label, row in rows.items():
        if label in (SEGMENTS, SINGLE):
            continue
        routing = row["routing"] or {}
        shares = [
            routing.get(key, {}).get(place) for key in ("prompt", "answer") for place in PLACES
        ]
        switch = f"{routing['switch']:.1f}" if "switch" in routing else "-"
        cells = [*map(_percent, shares), switch, _percent(routing.get("switched"))]
        lines.append([label, *cells])
    return _table(["router", *header, "tokens until the switch", "switched"], lines)


def _shares_table(rows: Mapping[str, Mapping[str, Any]], groups: Sequence[str]) -> str:
    lines = ([label, *_shares(row, groups)] for label, row in rows.items())
    return _table(["router", *groups], lines)


def _shares(row: Mapping[str, Any], groups: Sequence[str]) -> list[str]:
    means = [row["of_single"].get(group) for group in groups]
    return ["-" if mean is None else f"{mean['mean']:.2f}" for mean in means]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _interval_or_dash(value: Mapping[str, float] | None) -> str:
    return "-" if value is None else _interval(value)


def stress_tables(stress: Mapping[str, Any]) -> str:
    """Routing accuracy as the library gets worse, and what foretells it."""
    methods = stress["methods"]
    num_texts = sum(stress["num_texts"].values())

    def table(name: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
        return _table(
            [name, *methods],
            [
                [key, *(f"{row[method]['decisions']:.1%}" for method in methods)]
                for key, row in rows.items()
            ],
        )

    alike = {
        f"{sigma} ({row['overlap']:.2f})": row["own"] for sigma, row in stress["alike"].items()
    }
    number = {n: row["mean"] for n, row in stress["number"].items()}
    spearman = [
        [name, *("-" if row[m] is None else f"{row[m]:+.2f}" for m in methods)]
        for name, row in stress["diagnostics"]["spearman"].items()
    ]
    return "\n".join(
        (
            f"Routing accuracy on the answer tokens of {num_texts} texts, scored on the "
            "activations of each text's own expert. `spectr in context` chooses once for a text, "
            "as the bare base reads its prompt, and always takes an expert here. Nothing is "
            "trained again.\n",
            "Experts cut to a lower rank (truncated SVD):\n",
            table("rank", stress["rank"]),
            "An expert against its noisy twin. The noise is relative to the LoRA factors; in "
            "brackets is the mean subspace overlap of the two. Guessing gives 50%:\n",
            table("noise (overlap)", alike),
            "The text's own expert spoiled by noise. Noise makes its update longer, which `norm` "
            "likes:\n",
            table("noise", stress["undertrained"]),
            "More experts. The further ones are made of the experts' own weights at other layers. "
            "Figures are the mean of three seeds. The further experts are drawn anew at each "
            "layer. Real ones would be harder for routers that sum over layers:\n",
            table("experts", number),
            "Which diagnostic goes with accuracy (Spearman, over all cut and spoiled experts):\n",
            _table(["diagnostic", *methods], spearman),
        )
    )


def retrained_tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Routing accuracy with experts of another seed or of fewer steps."""
    routers = list(rows[0]["before"])

    def lines(key: str) -> list[list[str]]:
        return [
            [row["expert"], row["retrained"], *(f"{row[key][r]:.1%}" for r in routers)]
            for row in rows
        ]

    facts = [
        [
            *(row["expert"], row["retrained"], f"{row['overlap']:.2f}"),
            *(
                f"{row['update_norm']:.2f}",
                f"{row['nll']['own']:.2f}",
                f"{row['nll']['other']:.2f}",
            ),
            "yes" if row["warnings"] else "no",
        ]
        for row in rows
    ]
    beside = [
        [
            *(row["expert"], row["retrained"]),
            *(f"{b['own']:.1%} / {b['other']:.1%}" for b in map(row["beside"].get, routers)),
        ]
        for row in rows
    ]
    return "\n".join(
        (
            "Experts of the same domain were trained again and put into the library. `overlap` is "
            "that of their subspace with the shipped expert's. `update` is the length of the "
            "update relative to the shipped one's. `NLL` is that of the domain's answers under "
            "each alone. `warned`: whether `inspect` warns of the new expert:\n",
            _table(
                ["expert", "trained again", *("overlap", "update", "NLL", "NLL again", "warned")],
                facts,
            ),
            "Routing accuracy on the domain's answer tokens with the library as it is:\n",
            _table(["expert", "trained again", *routers], lines("before")),
            "With the other one in its place:\n",
            _table(["expert", "trained again", *routers], lines("instead")),
            "With both in the library, decisions for the shipped one / for the other:\n",
            _table(["expert", "trained again", *routers], beside),
        )
    )


def conditions(meta: Mapping[str, Any]) -> str:
    """When, at which commit and on what the results were measured."""
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    return (
        f"Measured on {meta['date']} at commit `{meta['commit']}`, split seed {meta['seed']}, on "
        f"{meta['device']}: {meta['base']}, {meta['quantization']}, computed in "
        f"{meta['compute_dtype']}; {versions}."
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _interval(value: Mapping[str, float], to: str = "-") -> str:
    return f"{value['mean']:.3f} ({value['low']:.3f}{to}{value['high']:.3f})"


def _mean(values: Iterable[float]) -> str:
    values = list(values)
    return f"{sum(values) / len(values):.1%}"
