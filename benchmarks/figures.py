"""The figures of docs/performance.md, drawn from JSON files of `benchmarks/results`.

    python benchmarks/figures.py

`decode.svg` is of `decode.json`, `library.svg` of `packed.json` and, for who is chosen, of
`distractors.json` and `synthetic_experts.json`. Needs `pip install kaleido` and a Chrome or
Chromium.
"""

import json
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from speed_tables import RESULTS, rows_of

FIGURES = RESULTS.parent.parent / "docs" / "figures"
LAYOUT = {
    "template": "plotly_white",
    "font": {"family": "sans-serif", "size": 14},
    "margin": {"l": 10, "r": 20, "t": 10, "b": 10},
    "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
}


def decode_figure() -> go.Figure:
    figure = go.Figure()
    by_number: dict[int, list[dict[str, Any]]] = {}
    for row in rows_of("decode", "amx"):
        by_number.setdefault(row["experts"], []).append(row)
    for (num, rows), color in zip(by_number.items(), ("#4C78A8", "#F58518"), strict=True):
        figure.add_bar(
            y=[row["case"] for row in rows],
            x=[row["ratio"] for row in rows],
            text=[f"{row['ratio']:.2f}" for row in rows],
            name=f"{num} experts",
            orientation="h",
            marker_color=color,
        )
    figure.update_layout(**LAYOUT, barmode="group", height=620, width=760)
    figure.update_xaxes(title="decode speed, bare base = 1", rangemode="tozero")
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure


COLORS = {"spectr-context": "#4C78A8", "lag": "#54A24B", "spectr": "#F58518"}


def found_by_number(router: str) -> dict[int, float]:
    """The share of requests that a router gives an expert of their domain, by the number of
    experts; trained ones up to 37, beyond them `mixed` synthetic ones too."""
    trained, synthetic = (
        json.loads((RESULTS / f"{name}.json").read_text("utf-8"))["experts"]
        for name in ("distractors", "synthetic_experts")
    )
    rows = {number: of_router.get(router) for number, of_router in trained.items()}
    if router == "spectr-context":
        rows |= synthetic["mixed"]
    return {int(number): row["own"] + row["sibling"] for number, row in rows.items() if row}


def library_figure() -> go.Figure:
    """From 10 to 1,000 experts: who is chosen, and how fast a token is."""
    figure = make_subplots(
        rows=2,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.08,
        subplot_titles=("requests that find an expert of their domain", "decode speed, base = 1"),
    )
    rows = [row for row in rows_of("packed", "amx") if row["shape"] == "SmolLM2-135M"]
    for router, color in COLORS.items():
        found = found_by_number(router)
        lines = [found, {row["experts"]: row[router] for row in rows}]
        for place, line in enumerate(lines, start=1):
            figure.add_scatter(
                x=list(line),
                y=list(line.values()),
                mode="lines+markers",
                name=router,
                legendgroup=router,
                showlegend=place == 2,
                line_color=color,
                row=place,
                col=1,
            )
    figure.update_layout(**{**LAYOUT, "margin": {"l": 10, "r": 20, "t": 60, "b": 10}})
    figure.update_layout(height=620, width=760, legend_y=1.07)
    figure.update_xaxes(type="log", tickvals=[10, 30, 100, 300, 1000])
    figure.update_xaxes(title="experts", row=2, col=1)
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(tickformat=".0%", row=1, col=1)
    return figure


def main() -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    decode_figure().write_image(FIGURES / "decode.svg")
    library_figure().write_image(FIGURES / "library.svg")


if __name__ == "__main__":
    main()
