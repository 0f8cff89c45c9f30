"""The routing map: the dominant expert of every layer and token of a column."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from spectr_demo.charts.colors import GREY, TIE_NAME, Groups, groups_of, rgba
from spectr_demo.charts.style import (
    INK,
    LAYER_PX,
    MONO,
    Theme,
    empty_name,
    finish,
    layer_axis,
    mark_answer,
)
from spectr_demo.charts.text import axis_label, escape
from spectr_demo.trace import NOT_ROUTED, ColumnTrace, DominantExperts, RoutingTrace

# What a router calls its scores, where it has a word for them.
_SCORES = {"spectr-context": "certainty"}
# How strongly the map paints a cell, by quarter of weight.
_ALPHAS = (0.3, 0.5, 0.75, 1.0)
_TIED, _EMPTY = rgba(GREY, 0.2), rgba(GREY, 0.5)


def routing_map(
    trace: RoutingTrace,
    label: str,
    *,
    projection: str | None = None,
    theme: Theme = "light",
    window: int = 72,
) -> go.Figure:
    """The dominant expert of every layer (upwards) and token (along the text).

    `projection` picks one projection; without it a cell shows the mean over all of them. The
    stronger the colour, the larger the weight. The first `window` tokens are in view; a slider
    below them moves to the others.
    """
    column, groups = trace.column(label), groups_of(trace)
    cells = trace.dominant_cells(label, projection)
    slot = _slots(cells, groups)
    where = f"mean of all {len(trace.projections)}" if projection is None else escape(projection)
    score = _SCORES.get(column.router.get("name", ""), "score")
    names = _names(trace, column, cells)
    fig = go.Figure(_heatmap(cells, slot, groups, names=names, where=where, score=score))
    entries = [*zip(groups.names, groups.colors, strict=True)]
    entries += [(TIE_NAME, _TIED), (empty_name(column), _EMPTY)]
    for used in sorted(set(slot.ravel().tolist())):
        fig.add_trace(_legend_entry(*entries[used]))
    # Not lower: on a phone, the labels and the slider leave Plotly no room for the map itself.
    finish(fig, theme, height=200 + LAYER_PX * max(12, trace.num_layers))
    mark_answer(fig, column, INK[theme])
    # No drag of the map itself: past an end, Plotly shows blank space, or squeezes what is shown.
    fig.update_layout(dragmode=False, hovermode="closest", showlegend=True)
    _show_tokens(fig, column, window)
    fig.update_yaxes(**layer_axis(trace), fixedrange=True, showgrid=False)
    return fig


def _slots(cells: DominantExperts, groups: Groups) -> NDArray[np.intp]:
    """(T, L) entries of the legend: an expert's of the S groups, S for a tie, S + 1 for none."""
    tie, empty = len(groups.names), len(groups.names) + 1
    slot = np.where(cells.expert != NOT_ROUTED, groups.slot_of(cells.expert), empty)
    return np.where(cells.is_tied, tie, slot)


def _names(trace: RoutingTrace, column: ColumnTrace, cells: DominantExperts) -> NDArray[Any]:
    """(T, L) what the hover text calls each cell's expert."""
    names = np.array([*map(escape, trace.expert_names), empty_name(column)], dtype=object)
    named = names[np.where(cells.expert != NOT_ROUTED, cells.expert, len(trace.expert_names))]
    return np.where(cells.is_tied, "tie, first: " + named, named)


def _heatmap(
    cells: DominantExperts,
    slot: NDArray[np.intp],
    groups: Groups,
    *,
    names: NDArray[Any],
    where: str,
    score: str,
) -> go.Heatmap:
    """The cells, each a step of a colour scale: one step for each entry and quarter of weight."""
    steps = len(_ALPHAS)
    level = np.clip((cells.weight * steps).astype(int), 0, steps - 1)
    palette = [rgba(color, alpha) for color in groups.colors for alpha in _ALPHAS]
    palette += [_TIED] * steps + [_EMPTY] * steps
    T, L = slot.shape
    hover = (
        "token %{customdata[0]} <b>%{x}</b><br>layer <b>%{y}</b><br>"
        f"projection <b>{where}</b><br>"
        "expert <b>%{text}</b><br>weight <b>%{customdata[1]:.3f}</b>"
    )
    values = [np.broadcast_to(np.arange(T, dtype=np.float32)[:, None], slot.shape), cells.weight]
    if np.isfinite(cells.score).any():
        hover += f"<br>{score} <b>%{{customdata[2]:.4g}}</b>"
        values.append(cells.score)
    return go.Heatmap(
        x=[str(t) for t in range(T)],
        y=np.arange(L, dtype=np.int16),
        z=np.ascontiguousarray((slot * steps + level).astype(np.uint8).T),
        zmin=-0.5,
        zmax=len(palette) - 0.5,
        colorscale=_discrete(palette),
        showscale=False,
        text=names.T.tolist(),
        customdata=np.stack([value.T for value in values], axis=-1),
        hovertemplate=hover + "<extra></extra>",
    )


def _legend_entry(name: str, color: str) -> go.Scatter:
    """A trace of no points: a heat map has no legend of its own."""
    return go.Scatter(
        x=[None],
        y=[None],
        mode="markers",
        name=escape(name),
        marker={"color": color, "size": 11, "symbol": "square"},
    )


def _show_tokens(fig: go.Figure, column: ColumnTrace, window: int) -> None:
    """The tokens along the x axis, `window` of them in view, and a slider to the others."""
    T = column.num_tokens
    fig.update_xaxes(
        type="category",
        # The ticks show the tokens; the categories stay unique, and are thinned to what fits.
        labelalias={str(t): axis_label(token) for t, token in enumerate(column.tokens)},
        range=[-0.5, min(T, window) - 0.5],
        fixedrange=window >= T,
        tickangle=-90,
        tickfont={"family": MONO, "size": 10},
        automargin=True,
        showgrid=False,
    )
    if window < T:
        fig.update_layout(margin={"b": 14})  # the labels make room for themselves
        fig.update_xaxes(
            minallowed=-0.5,
            maxallowed=T - 0.5,
            rangeslider={"visible": True, "thickness": 0.1, "bgcolor": "rgba(0,0,0,0)"},
        )


def _discrete(colors: Sequence[str]) -> list[list[Any]]:
    """A colour scale of equal steps."""
    n = len(colors)
    return [[edge / n, color] for i, color in enumerate(colors) for edge in (i, i + 1)]
