"""What all charts share: the colours of what is not data, fonts, axes, legend and notes.

Backgrounds are transparent; a theme sets the colours of text and lines for a light or dark page.
"""

from typing import Any, Literal, NamedTuple

import plotly.graph_objects as go

from spectr_demo.charts.colors import BASE_NAME
from spectr_demo.trace import ColumnTrace, RoutingTrace

Theme = Literal["light", "dark"]

SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, 'DejaVu Sans Mono', 'Liberation Mono', monospace"
LAYER_PX = 13  # the height of a layer in the charts that show layers
_TOP_PX, _BOTTOM_PX = 52, 44


class Ink(NamedTuple):
    """The colours of everything that is not data."""

    text: str
    muted: str
    line: str
    hover: str


INK = {
    "light": Ink("#1F2328", "#667080", "rgba(110,118,129,0.25)", "#FFFFFF"),
    "dark": Ink("#E6E8EB", "#9BA3AF", "rgba(150,158,170,0.25)", "#1F2430"),
}


def finish(fig: go.Figure, theme: Theme, *, height: int) -> None:
    """What all figures share: transparent ground, quiet axes, legend above, explicit height."""
    ink = INK[theme]
    fig.update_layout(
        template="none",
        height=height,
        margin={"l": 52, "r": 14, "t": _TOP_PX, "b": _BOTTOM_PX},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": SANS, "size": 12, "color": ink.text},
        hoverlabel={
            "bgcolor": ink.hover,
            "bordercolor": ink.muted,
            "align": "left",
            "font": {"family": SANS, "size": 12, "color": ink.text},
        },
        legend={
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            # Above the notes; a legend of several lines widens the margin by itself.
            "y": 1 + 18 / (height - _TOP_PX - _BOTTOM_PX),
            "yanchor": "bottom",
            "traceorder": "normal",
            "itemclick": False,
            "itemdoubleclick": False,
        },
        modebar={
            "bgcolor": "rgba(0,0,0,0)",
            "color": ink.muted,
            "activecolor": ink.text,
            # What is left fits beside the legend on a phone: save the picture, reset the axes.
            "remove": ["zoom", "pan", "select", "lasso", "zoomin", "zoomout", "autoscale"],
        },
    )
    fig.update_xaxes(gridcolor=ink.line, zeroline=False, linecolor=ink.line, tickcolor=ink.line)
    fig.update_yaxes(gridcolor=ink.line, zeroline=False, linecolor=ink.line, tickcolor=ink.line)


def layer_axis(trace: RoutingTrace) -> dict[str, Any]:
    """Whole layers only, however few there are."""
    dtick = 5 if trace.num_layers > 12 else 1
    return {"title": {"text": "layer", "standoff": 6}, "dtick": dtick}


def mark_answer(fig: go.Figure, column: ColumnTrace, ink: Ink) -> None:
    """A line where the answer starts, across all rows of the figure."""
    if not 0 < column.num_prompt < column.num_tokens:
        return
    x = column.num_prompt - 0.5
    line = {"color": ink.text, "width": 1.5, "dash": "dot"}
    fig.add_shape(type="line", x0=x, x1=x, y0=0, y1=1, yref="paper", line=line)
    for text, anchor in (("prompt ", "right"), (" answer", "left")):
        fig.add_annotation(
            text=text, x=x, xanchor=anchor, y=1, yref="paper", yanchor="bottom", **note(ink.muted)
        )


def note(color: str) -> dict[str, Any]:
    """A small annotation without an arrow."""
    return {"showarrow": False, "borderpad": 0, "font": {"size": 11, "color": color}}


def empty_name(column: ColumnTrace) -> str:
    """What a place without an expert is called: everywhere in the base column, or just there."""
    return "not routed" if column.is_routed else BASE_NAME
