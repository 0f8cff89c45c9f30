"""The chart along the text: each expert's share, and beneath it the KL from the base model.

KL(routed || base) is how far the routed model's next-token distribution is from the base model's,
in nats. A run measures it (`engine/tracing.py`), and its trace holds it.
"""

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from spectr_demo.charts.colors import GREY, groups_of, rgba
from spectr_demo.charts.style import (
    INK,
    Ink,
    Theme,
    empty_name,
    finish,
    layers_of,
    mark_answer,
    note,
    part_of,
)
from spectr_demo.charts.text import escape, quoted
from spectr_demo.trace import ColumnTrace, RoutingTrace

_SHARES = {"row": 1, "col": 1}
_KL = {"row": 2, "col": 1}


def share_along_text(
    trace: RoutingTrace, label: str, *, window: int = 9, theme: Theme = "light"
) -> go.Figure:
    """Each expert's share along the tokens, and beneath it how far the routed model's next-token
    distribution is from the base model's, KL(routed || base) in nats.

    The shares are moving averages over `window` tokens; the KL is not averaged.
    """
    column, ink = trace.column(label), INK[theme]
    fig = make_subplots(
        rows=2, cols=1, shared_xaxes=True, row_heights=[0.68, 0.32], vertical_spacing=0.1
    )
    tokens = [
        f"<b>{quoted(token)}</b> ({part_of(column, t)})" for t, token in enumerate(column.tokens)
    ]
    around = f"{window} tokens around,<br>" if window > 1 else ""
    about = f"<br>shares: mean of {around}{layers_of(trace)}"
    _add_tokens(fig, tokens, about)
    _add_shares(fig, trace, column, window)
    _add_kl(fig, column, tokens, ink)
    finish(fig, theme, height=420)
    mark_answer(fig, column, ink)
    fig.update_layout(hovermode="x unified", dragmode=False)
    few = {"dtick": 1} if column.num_tokens < 8 else {}  # no ticks between tokens
    fig.update_xaxes(range=[-0.5, column.num_tokens - 0.5], fixedrange=True, showgrid=False, **few)
    fig.update_xaxes(title={"text": "token", "standoff": 4}, **_KL)
    fig.update_yaxes(range=[0, 1], tickformat=".0%", fixedrange=True, **_SHARES)
    fig.update_yaxes(rangemode="tozero", nticks=4, fixedrange=True, automargin=True, **_KL)
    # Above its axis: beside it, a title stands on ticks that are wide.
    fig.add_annotation(
        text="KL from the base, in nats",
        x=0,
        xref="paper",
        xanchor="left",
        y=1,
        yref="y2 domain",
        yanchor="bottom",
        **note(ink.muted),
    )
    return fig


def _add_tokens(fig: go.Figure, tokens: list[str], about: str) -> None:
    """An invisible line, which names the token at the top of the joint hover box."""
    fig.add_trace(
        go.Scatter(
            x=_places(len(tokens)),
            y=np.ones(len(tokens), np.float32),
            mode="lines",
            line={"width": 0, "color": "rgba(0,0,0,0)"},
            showlegend=False,
            text=tokens,
            hovertemplate="%{text}" + about + "<extra></extra>",
        ),
        **_SHARES,
    )


def _add_shares(fig: go.Figure, trace: RoutingTrace, column: ColumnTrace, window: int) -> None:
    """One area for each expert that is used, and one where none is."""
    groups = groups_of(trace)
    share = groups.reduce(trace.smoothed_share(column.label, window))
    is_empty = share.sum(axis=1) == 0
    series = [*zip(groups.names, groups.colors, share.T, strict=True)]
    series.append((empty_name(column), GREY, is_empty.astype(np.float32)))
    for name, color, values in series:
        if not values.any():
            continue
        what = f"expert {escape(name)} <b>%{{y:.1%}}</b>" if color != GREY else name
        fig.add_trace(
            go.Scatter(
                x=_places(column.num_tokens),
                y=np.ascontiguousarray(values),
                stackgroup="share",
                mode="lines",
                name=escape(name),
                line={"width": 0, "color": color, "shape": "hvh"},
                fillcolor=rgba(color, 0.88),
                hovertemplate=what + "<extra></extra>",
            ),
            **_SHARES,
        )


def _add_kl(fig: go.Figure, column: ColumnTrace, tokens: list[str], ink: Ink) -> None:
    """The KL of each token as a line over its area, or a note that the trace has none."""
    fig.add_trace(
        go.Scatter(
            x=_places(column.num_tokens),
            y=column.kl,
            mode="lines",
            line={"width": 1.5, "color": ink.text, "shape": "hvh"},
            fill="tozeroy",
            fillcolor=rgba(GREY, 0.25),
            showlegend=False,
            text=tokens,
            hovertemplate="%{text}<br>KL from base <b>%{y:.3f}</b> nats<extra></extra>",
        ),
        **_KL,
    )
    if not np.isfinite(column.kl).any():
        fig.add_annotation(
            text="no KL from base in this trace",
            x=0.5,
            xref="x domain",
            y=0.5,
            yref="y2 domain",
            **note(ink.muted),
        )


def _places(num_tokens: int) -> NDArray[np.int32]:
    return np.arange(num_tokens, dtype=np.int32)
