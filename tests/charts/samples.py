"""The charts by name, and how the tests look into a figure."""

import json
import re
from collections.abc import Callable

import plotly.graph_objects as go

from spectr_demo import charts

EXPERTS = ("chat", "code", "math", "sql")

Chart = Callable[..., go.Figure]


def by_column(chart: Chart) -> Chart:
    return lambda trace, label="spectr", **options: chart(trace, label, **options)


CHARTS: dict[str, Chart] = {
    "token_strip": by_column(charts.token_strip),
    "routing_map": by_column(charts.routing_map),
    "expert_share": lambda trace, label="spectr", **options: charts.expert_share(trace, **options),
    "share_by_layer": by_column(charts.share_by_layer),
    "share_along_text": by_column(charts.share_along_text),
}


def text_of(fig: go.Figure) -> str:
    """All that a figure holds, as JSON text with its characters unescaped."""
    return json.dumps(json.loads(fig.to_json()), ensure_ascii=False)


def rgb(color: str) -> tuple[int, ...]:
    """The channels of "#RRGGBB" or "rgba(...)"."""
    if color.startswith("#"):
        return tuple(int(color[at : at + 2], 16) for at in (1, 3, 5))
    return tuple(int(channel) for channel in re.findall(r"\d+", color)[:3])
