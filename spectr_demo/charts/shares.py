"""The charts of shares: of each column, and of each layer of one column."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from spectr_demo.charts.colors import BASE_NAME, GREY, Groups, groups_of
from spectr_demo.charts.style import (
    INK,
    LAYER_PX,
    Theme,
    finish,
    ink_on,
    layer_axis,
    layers_of,
    note,
)
from spectr_demo.charts.text import counted, escape
from spectr_demo.trace import Part, RoutingTrace


def expert_share(trace: RoutingTrace, *, theme: Theme = "light") -> go.Figure:
    """How much each expert served in each column: the prompt's tokens and the answer's apart."""
    ink, groups = INK[theme], groups_of(trace)
    fig = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.18)
    parts: tuple[Part, ...] = ("prompt", "answer")
    for row, part in enumerate(parts, start=1):
        shares, counts = [], []
        for column in trace.columns:
            where = column.part_slice(part)
            num_tokens = int(trace.is_token_routed(column.label)[where].sum())
            share = groups.reduce(trace.share(column.label, part))
            is_base = not column.is_routed and where.start < where.stop
            shares.append(np.append(share, np.float32(is_base)))
            counts.append(counted(num_tokens, "routed token"))
        about = f"mean over the {part}'s %{{customdata}},<br>{layers_of(trace)}"
        _add_stacked_bars(
            fig,
            groups,
            np.array(shares).reshape(len(shares), len(groups.names) + 1),
            places=[escape(label) for label in trace.labels],
            place_name="column",
            about=about,
            row=row,
            customdata=counts,
        )
        fig.add_annotation(
            text=f"<b>{part.upper()}</b>",
            x=0,
            xref="paper",
            xanchor="left",
            y=1,
            yref="y domain" if row == 1 else "y2 domain",
            yanchor="bottom",
            **note(ink.muted),
        )
        if all(c.part_slice(part).start == c.part_slice(part).stop for c in trace.columns):
            fig.add_annotation(
                text=f"no {part} in this trace",
                x=0.5,
                xref="paper",
                y=0.5,
                yref="y domain" if row == 1 else "y2 domain",
                **note(ink.muted),
            )
    finish(fig, theme, height=170 + 2 * 34 * max(1, len(trace.columns)))
    fig.update_yaxes(autorange="reversed", type="category")
    return fig


def share_by_layer(
    trace: RoutingTrace, label: str, *, part: Part = "all", theme: Theme = "light"
) -> go.Figure:
    """How much each expert served in each layer (upwards), over a part's tokens."""
    column, groups = trace.column(label), groups_of(trace)
    share = groups.reduce(trace.layer_share(label, part))
    where = column.part_slice(part)
    is_empty = np.full(trace.num_layers, where.start < where.stop) & (share.sum(axis=1) == 0)
    num_tokens = int(trace.is_token_routed(label)[where].sum())
    of_part = "" if part == "all" else f" of the {part}"
    fig = make_subplots(rows=1, cols=1)
    _add_stacked_bars(
        fig,
        groups,
        np.column_stack([share, is_empty]),
        places=np.arange(trace.num_layers),
        place_name="layer",
        about=(
            f"mean over {counted(num_tokens, 'routed token')}{of_part},<br>"
            f"{counted(len(trace.projections), 'projection')}"
        ),
        row=1,
    )
    finish(fig, theme, height=130 + LAYER_PX * max(6, trace.num_layers))
    fig.update_layout(bargap=0.12)
    fig.update_yaxes(**layer_axis(trace), showgrid=False)
    return fig


def _add_stacked_bars(
    fig: go.Figure,
    groups: Groups,
    values: NDArray[Any],
    *,
    places: Sequence[str] | NDArray[Any],
    place_name: str,
    about: str,
    row: int,
    customdata: list[str] | None = None,
) -> None:
    """One stacked bar per place; `values` is (n, S + 1), the last column the base model's."""
    names, colors = (*groups.names, BASE_NAME), (*groups.colors, GREY)
    is_thin = len(values) > 12
    for name, color, value in zip(names, colors, values.T, strict=True):
        if name == BASE_NAME:
            if not value.any():
                continue
            what = f"{BASE_NAME}: no expert was used"
        else:
            what = f"expert <b>{escape(name)}</b>, weight <b>%{{x:.1%}}</b><br>{about}"
        fig.add_trace(
            go.Bar(
                orientation="h",
                x=np.ascontiguousarray(value, dtype=np.float32),
                y=places,
                name=escape(name),
                legendgroup=escape(name),
                showlegend=row == 1,
                marker={"color": color, "line": {"width": 0}},
                # Below a tenth a number does not fit its bar.
                text=None if is_thin else [f"{v:.0%}" if 0.1 <= v < 1 else "" for v in value],
                textposition="none" if is_thin else "inside",
                insidetextanchor="middle",
                textangle=0,
                textfont={"color": ink_on(color), "size": 11},
                customdata=customdata,
                hovertemplate=f"{place_name} <b>%{{y}}</b><br>{what}<extra></extra>",
            ),
            row=row,
            col=1,
        )
    fig.update_layout(barmode="stack", bargap=0.25, hovermode="closest")
    fig.update_xaxes(range=[0, 1], tickformat=".0%", fixedrange=True, row=row, col=1)
    fig.update_yaxes(fixedrange=True, automargin=True, row=row, col=1)
