"""The token strip: the text of a column, each token on the colour of its dominant expert.

Plotly draws no running text, so the strip is a bar chart: a bar for each piece of a token, laid out
in characters and lines of a fixed size.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from spectr_demo.charts.colors import GREY, TIE_NAME, Groups, groups_of, rgba
from spectr_demo.charts.style import (
    INK,
    MONO,
    Ink,
    Theme,
    empty_name,
    finish,
    layers_of,
    note,
    part_of,
)
from spectr_demo.charts.text import escape, literal, num_cells, pieces_of, quoted, shorten, visible
from spectr_demo.trace import NOT_ROUTED, TIE_MARGIN, ColumnTrace, Part, RoutingTrace

_SPECIAL_TOKEN = re.compile(r"<\|[^<>]*\|>|</?s>|<(?:pad|unk|bos|eos)>")

_FONT_PX = 13
_CHAR_PX = 0.602 * _FONT_PX  # the advance of the usual monospaced fonts
_LINE_PX = 25

_PARTS: tuple[Part, ...] = ("prompt", "answer")
_EMPTY = rgba(GREY, 0.2)  # the fill of a token without an expert
_TIED = rgba(GREY, 0.0)


class _Look(NamedTuple):
    """How a token is shown: its ground, the colour of its letters, its hover text."""

    fill: str
    ink: str
    hover: str


class _Box(NamedTuple):
    """A rectangle of the strip, in characters and lines."""

    look: _Look
    text: str
    start: int
    width: int
    line: float


class _Leaders(NamedTuple):
    """Who leads each token: (T,) arrays. slot: the entry in the groups, where routed."""

    slot: NDArray[np.intp]
    lead: NDArray[np.float32]
    is_routed: NDArray[np.bool_]
    is_tied: NDArray[np.bool_]


def token_strip(
    trace: RoutingTrace, label: str, *, theme: Theme = "light", line_chars: int = 88
) -> go.Figure:
    """The text of a column, each token on the colour of its dominant expert.

    The stronger the colour, the larger the expert's lead over the second; a tie has no colour.
    `line_chars` is the length of a line in characters of about 8 px (44 suits a phone): the lines
    do not follow the width of the page.
    """
    if line_chars < 16:
        raise ValueError(f"line_chars is {line_chars}, needed at least 16 characters")
    column, ink, groups = trace.column(label), INK[theme], groups_of(trace)
    leaders = _leaders(trace, label, groups)
    # A first line of chips is the legend: laid out like the tokens it cannot push them around.
    chips = [
        (look, f" {shorten(visible(name), line_chars - 2)} ")
        for name, look in _legend(column, groups, leaders, ink)
    ]
    boxes, line = _lay_out(chips, line=0, line_chars=line_chars, gap=1)
    looks = _token_looks(trace, column, groups, leaders, ink)
    headings = []
    for part in _PARTS:
        tokens = range(column.num_tokens)[column.part_slice(part)]
        if not tokens:
            continue
        headings.append((line + 1.4, part.upper()))
        pieces = ((looks[t], piece) for t in tokens for piece in pieces_of(column.tokens[t]))
        placed, line = _lay_out(pieces, line=line + 2.3, line_chars=line_chars, gap=0)
        boxes += placed
    fig = go.Figure(_bars(boxes))
    for at, heading in headings:
        fig.add_annotation(x=0, y=at, text=f"<b>{heading}</b>", xanchor="left", **note(ink.muted))
    finish(fig, theme, height=round((line + 1) * _LINE_PX) + 12)
    fig.update_layout(margin={"l": 6, "r": 6, "t": 6, "b": 6}, dragmode=False, hovermode="closest")
    _fix_axes(fig, line=line, line_chars=line_chars)
    return fig


def _leaders(trace: RoutingTrace, label: str, groups: Groups) -> _Leaders:
    expert, lead = trace.dominant_tokens(label)
    is_routed = expert != NOT_ROUTED
    is_tied = is_routed & (lead <= TIE_MARGIN)
    return _Leaders(groups.slot_of(expert), lead, is_routed, is_tied)


def _legend(
    column: ColumnTrace, groups: Groups, leaders: _Leaders, ink: Ink
) -> Iterator[tuple[str, _Look]]:
    """The names of what the strip shows, and their looks."""
    leading = leaders.slot[leaders.is_routed & ~leaders.is_tied]
    fills = {groups.names[s]: rgba(groups.colors[s], ink.ground) for s in sorted({*leading})}
    if leaders.is_tied.any():
        fills[TIE_NAME] = _TIED
    if not leaders.is_routed.all():
        fills[empty_name(column)] = _EMPTY
    for name, fill in fills.items():
        yield name, _Look(fill, ink.token, escape(name))


def _token_looks(
    trace: RoutingTrace, column: ColumnTrace, groups: Groups, leaders: _Leaders, ink: Ink
) -> list[_Look]:
    """One look a token. Special tokens, such as <|im_start|>, step back."""
    share = groups.reduce(trace.token_share(column.label))
    looks = []
    for t, token in enumerate(column.tokens):
        is_special = _SPECIAL_TOKEN.fullmatch(token) is not None
        color, alpha = GREY, 0.2
        if leaders.is_tied[t]:
            alpha = 0.0
        elif leaders.is_routed[t]:
            # The square root keeps small leads visible.
            lead = float(np.sqrt(min(1.0, leaders.lead[t])))
            color, alpha = groups.colors[leaders.slot[t]], ink.ground * (0.2 + 0.8 * lead)
        looks.append(
            _Look(
                fill=rgba(color, alpha * (0.4 if is_special else 1.0)),
                ink=ink.muted if is_special else ink.token,
                hover=_token_hover(trace, column, groups, share[t], t),
            )
        )
    return looks


def _token_hover(
    trace: RoutingTrace, column: ColumnTrace, groups: Groups, share: NDArray[Any], t: int
) -> str:
    """The hover text of token `t` of the strip; `share` is its (S,) row."""
    lines = [f"token {t}, {part_of(column, t)}: <b>{quoted(column.tokens[t])}</b>"]
    largest = [s for s in np.argsort(-share, kind="stable")[:4] if share[s] > 0]
    lines += [f"expert <b>{escape(groups.names[s])}</b>, weight {share[s]:.1%}" for s in largest]
    if largest:
        lines.append(f"mean of {layers_of(trace)}")
    else:
        is_unread = column.is_routed and t == column.num_tokens - 1
        why = "the last token is not read" if is_unread else "no expert was used"
        lines.append(f"{empty_name(column)}: {why}")
    measures = (("log-prob", column.logprob), ("entropy", column.entropy), ("KL", column.kl))
    known = [f"{name} {values[t]:.2f}" for name, values in measures if np.isfinite(values[t])]
    if known:
        lines.append(", ".join(known) + " nats")
    return "<br>".join(lines)


def _lay_out(
    pieces: Iterable[tuple[_Look, str]], *, line: float, line_chars: int, gap: int
) -> tuple[list[_Box], float]:
    """Place pieces of text on lines of `line_chars`; one that ends in ↵ ends its line.

    Returns the boxes and the last line used.
    """
    boxes: list[_Box] = []
    at, is_broken = 0, False
    for look, piece in pieces:
        text = shorten(piece, line_chars)
        width = max(1, num_cells(text))
        if is_broken or at + width > line_chars:
            line, at = line + 1, 0
        boxes.append(_Box(look, text, at, width, line))
        at += width + gap
        is_broken = text.endswith("↵")
    return boxes, line


def _bars(boxes: list[_Box]) -> go.Bar:
    """The boxes as bars, a little apart."""
    return go.Bar(
        orientation="h",
        base=np.array([box.start + 0.05 for box in boxes], np.float32),
        x=np.array([box.width - 0.1 for box in boxes], np.float32),
        y=np.array([box.line for box in boxes], np.float32),
        width=0.84,
        marker={
            "color": [box.look.fill for box in boxes],
            "line": {"width": 0},
            "cornerradius": 3,
        },
        text=[literal(box.text) for box in boxes],
        textposition="inside",
        insidetextanchor="middle",
        textangle=0,
        constraintext="none",
        cliponaxis=False,
        textfont={"family": MONO, "size": _FONT_PX, "color": [box.look.ink for box in boxes]},
        hovertext=[box.look.hover for box in boxes],
        hovertemplate="%{hovertext}<extra></extra>",
        showlegend=False,
    )


def _fix_axes(fig: go.Figure, *, line: float, line_chars: int) -> None:
    """Axes in characters and lines, without zoom.

    Locked to the y axis, whose pixels follow from the height, a character keeps its width however
    wide the page is.
    """
    fig.update_xaxes(
        visible=False,
        range=[0, line_chars],
        fixedrange=True,
        scaleanchor="y",
        scaleratio=_CHAR_PX / _LINE_PX,
        constrain="domain",
        constraintoward="left",
    )
    fig.update_yaxes(
        visible=False,
        range=[line + 0.5, -0.5],
        fixedrange=True,
        constrain="domain",
        constraintoward="top",
    )
