"""Values side by side: horizontal bars with their intervals, the best first; and a spectrum."""

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from spectr_demo.charts.colors import GREY, PALETTE
from spectr_demo.charts.style import INK, finish, note
from spectr_demo.charts.text import escape, literal, shorten

# At least 3:1 against a light and a dark page.
MARKED, OTHER = PALETTE[4], GREY
_BAR_PX, _AROUND_PX = 26, 52
_NAME_CELLS = 26


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A value with its interval, if it has one. is_marked: what the reader should find first."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    is_marked: bool = False

    def words(self, form: str) -> str:
        """Such as "0.52 (0.48-0.55)". form: of a number, as `format` takes it."""
        mean = format(self.value, form)
        if self.low is None or self.high is None:
            return mean
        return f"{mean} ({format(self.low, form)}-{format(self.high, form)})"


def best_first(rows: Sequence[Bar], *, is_less_better: bool = False) -> list[Bar]:
    """Sorted by value; equal ones keep their order."""
    return sorted(rows, key=lambda bar: bar.value if is_less_better else -bar.value)


def bars(
    rows: Sequence[Bar], *, axis: str, form: str = ".2f", line: tuple[float, str] | None = None
) -> go.Figure:
    """One bar a row, from the top. Ink is that of a light page; a page of another theme has CSS.

    axis: what is measured, with its unit. line: a value to compare with, and its name.
    """
    names = [literal(shorten(bar.name, _NAME_CELLS)) for bar in rows]
    names = [f"<b>{n}</b>" if bar.is_marked else n for n, bar in zip(names, rows, strict=True)]
    fig = go.Figure(
        go.Bar(
            x=[bar.value for bar in rows],
            y=list(range(len(rows))),
            orientation="h",
            width=0.62,
            marker={"color": [MARKED if bar.is_marked else OTHER for bar in rows]},
            error_x={
                "visible": any(bar.high is not None for bar in rows),
                "type": "data",
                "symmetric": False,
                "array": [0 if bar.high is None else bar.high - bar.value for bar in rows],
                "arrayminus": [0 if bar.low is None else bar.value - bar.low for bar in rows],
                "color": INK["light"].text,
                "thickness": 1.5,
                "width": 3,
            },
            customdata=[escape(f"{bar.name}: {bar.words(form)}") for bar in rows],
            hovertemplate="%{customdata}<extra></extra>",
            showlegend=False,
        )
    )
    finish(fig, "light", height=_AROUND_PX + _BAR_PX * len(rows))
    fig.update_layout(margin={"l": 10, "r": 8, "t": 8, "b": 44}, dragmode=False)
    fig.update_yaxes(
        tickmode="array",
        tickvals=list(range(len(rows))),
        ticktext=names,
        range=[len(rows) - 0.5, -0.5],
        fixedrange=True,
        showgrid=False,
        automargin=True,
        ticks="",
    )
    # The values stand in a column of their own, where no interval can cross them.
    fig.update_xaxes(
        title={"text": escape(axis), "standoff": 8},
        domain=[0, 0.8],
        rangemode="tozero",
        fixedrange=True,
        nticks=5,
    )
    for number, bar in enumerate(rows):
        fig.add_annotation(
            text=format(bar.value, form),
            x=1,
            xref="paper",
            xanchor="right",
            y=number,
            **note(INK["light"].text),
        )
    if line is not None:
        _mark(fig, *line)
    return fig


def spectrum(values: Sequence[float], *, axis: str) -> go.Figure:
    """One upright bar for each direction, from the first."""
    numbers = list(range(1, len(values) + 1))
    fig = go.Figure(
        go.Bar(
            x=numbers,
            y=list(values),
            marker={"color": MARKED},
            hovertemplate="direction %{x}: %{y:.1%}<extra></extra>",
            showlegend=False,
        )
    )
    finish(fig, "light", height=240)
    fig.update_layout(margin={"l": 10, "r": 8, "t": 8, "b": 44}, dragmode=False)
    fig.update_xaxes(
        title={"text": "direction, by singular value", "standoff": 8},
        fixedrange=True,
        showgrid=False,
        dtick=1 if len(values) <= 16 else None,
    )
    fig.update_yaxes(
        title={"text": escape(axis)},
        tickformat=".0%",
        rangemode="tozero",
        fixedrange=True,
        automargin=True,
        nticks=5,
    )
    return fig


def _mark(fig: go.Figure, value: float, name: str) -> None:
    line = {"color": INK["light"].text, "width": 1.5, "dash": "dot"}
    fig.add_shape(type="line", x0=value, x1=value, y0=0, y1=1, yref="paper", line=line)
    fig.add_annotation(
        text=escape(name),
        x=value,
        xanchor="right",
        xshift=-4,
        y=0,
        yref="paper",
        yanchor="bottom",
        **note(INK["light"].text),
    )
