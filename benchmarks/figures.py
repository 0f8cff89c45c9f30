"""The figure of docs/performance.md, drawn from a benchmark's JSON file.

    python benchmarks/figures.py

Reads `benchmarks/results/decode.json`, writes `docs/figures/decode.svg`. Needs `pip install
kaleido` and a Chrome or Chromium.
"""

from typing import Any

import plotly.graph_objects as go
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


def main() -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    decode_figure().write_image(FIGURES / "decode.svg")


if __name__ == "__main__":
    main()
