"""How the tests look into a figure."""

import json
import re

import plotly.graph_objects as go

EXPERTS = ("chat", "code", "math", "sql")


def text_of(fig: go.Figure) -> str:
    """All that a figure holds, as JSON text with its characters unescaped."""
    return json.dumps(json.loads(fig.to_json()), ensure_ascii=False)


def rgb(color: str) -> tuple[int, ...]:
    """The channels of "#RRGGBB" or "rgba(...)"."""
    if color.startswith("#"):
        return tuple(int(color[at : at + 2], 16) for at in (1, 3, 5))
    return tuple(int(channel) for channel in re.findall(r"\d+", color)[:3])
