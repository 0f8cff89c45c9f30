"""The figures of a run: one function per chart, `RoutingTrace -> plotly.graph_objects.Figure`.

The only module that imports Plotly. An expert has one colour in all charts of a trace
(`trace_colors`); grey always means that no expert stands out or none was used. Backgrounds are
transparent; `theme` sets the colours of text and lines for a light or a dark page.
"""

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from spectr_demo.trace import NOT_ROUTED, ColumnTrace, Part, RoutingTrace

Theme = Literal["light", "dark"]

# The first seven are Okabe & Ito's (2008) without black, which a dark page would swallow. The other
# five were picked one by one from an sRGB grid as the colour farthest, in OKLab, from all before it
# and from grey, over normal vision and simulated protanopia, deuteranopia and tritanopia
# (Machado et al. 2009). `tests/test_charts.py` measures the distances.
PALETTE = (
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#960000",
    "#96F0F0",
    "#1E0FE1",
    "#782D69",
    "#B44BFF",
)
GREY = "#8C8C8C"
OTHERS_COLOR = "#5B6675"
BASE_NAME = "base model only"
TIE_NAME = "tie (equal weights)"
OTHERS_NAME = "others"

_SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
_MONO = "ui-monospace, SFMono-Regular, Menlo, 'DejaVu Sans Mono', 'Liberation Mono', monospace"
_SPECIAL_TOKEN = re.compile(r"<\|[^<>]*\|>|</?s>|<(?:pad|unk|bos|eos)>")

# The token strip is laid out in characters and lines of a fixed size.
_STRIP_FONT_PX = 13
_CHAR_PX = 0.602 * _STRIP_FONT_PX  # the advance of the usual monospaced fonts
_LINE_PX = 25
# How strongly the map paints a cell, by quarter of weight.
_MAP_ALPHAS = (0.3, 0.5, 0.75, 1.0)
_MAP_ROW_PX = 13
_TOP_PX, _BOTTOM_PX = 52, 44


class _Ink(NamedTuple):
    """The colours of everything that is not data."""

    text: str
    muted: str
    line: str
    hover: str
    token: str  # the strip's text, on a ground of at most `ground` opacity so that it stays legible
    ground: float


_INK = {
    "light": _Ink("#1F2328", "#667080", "rgba(110,118,129,0.25)", "#FFFFFF", "#000000", 0.62),
    "dark": _Ink("#E6E8EB", "#9BA3AF", "rgba(150,158,170,0.25)", "#1F2430", "#FFFFFF", 0.58),
}


@dataclass(frozen=True, kw_only=True)
class _Groups:
    """What is drawn by name: each expert, or the twelve largest and "others".

    names, colors: S entries. slots: (E,) the entry of each expert.
    """

    names: tuple[str, ...]
    colors: tuple[str, ...]
    slots: NDArray[np.intp]

    def reduce(self, share: NDArray[Any]) -> NDArray[Any]:
        """Sum (..., E) shares to (..., S)."""
        membership = self.slots[:, None] == np.arange(len(self.names))
        return share @ membership.astype(share.dtype)

    def slot_of(self, expert: NDArray[np.int16]) -> NDArray[np.intp]:
        """The entry of each expert id; meaningless where it is NOT_ROUTED."""
        if not len(self.slots):
            return np.zeros(expert.shape, np.intp)
        return self.slots[np.maximum(expert, 0)]


class _Box(NamedTuple):
    """A rectangle of the token strip, in characters and lines."""

    token: int
    text: str
    start: int
    width: int
    line: float


def expert_colors(expert_names: Sequence[str]) -> dict[str, str]:
    """One "#RRGGBB" colour per expert, in order; they repeat after twelve.

    Of a larger library at most twelve experts are drawn by name: see `trace_colors`.
    """
    return {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(expert_names)}


def trace_colors(trace: RoutingTrace) -> dict[str, str]:
    """The colour of every expert in the charts of this trace.

    Up to twelve experts: those of `expert_colors`. Beyond, the twelve with the largest share over
    all columns have a colour each and the rest share that of "others".
    """
    groups = _groups(trace)
    return {
        name: groups.colors[slot]
        for name, slot in zip(trace.expert_names, groups.slots, strict=True)
    }


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
    column, ink, groups = trace.column(label), _INK[theme], _groups(trace)
    expert, margin = trace.dominant_tokens(label)
    slot = groups.slot_of(expert)
    is_routed = expert != NOT_ROUTED
    is_tied = is_routed & (margin <= 1e-6)

    fills, inks = [], []
    for t, token in enumerate(column.tokens):
        if is_tied[t]:
            fill = (GREY, 0.0)
        elif is_routed[t]:
            # The square root keeps small leads visible.
            lead = float(np.sqrt(min(1.0, margin[t])))
            fill = (groups.colors[slot[t]], ink.ground * (0.2 + 0.8 * lead))
        else:
            fill = (GREY, 0.2)
        is_special = _SPECIAL_TOKEN.fullmatch(token) is not None
        fills.append(_rgba(fill[0], fill[1] * (0.4 if is_special else 1.0)))
        inks.append(ink.muted if is_special else ink.token)

    share = groups.reduce(trace.token_share(label))
    hovers = [_token_hover(trace, column, groups, share[t], t) for t in range(column.num_tokens)]

    # A first line of chips is the legend: laid out like the tokens it cannot push them around.
    chips = [
        (groups.names[s], _rgba(groups.colors[s], ink.ground))
        for s in sorted(set(slot[is_routed & ~is_tied].tolist()))
    ]
    if is_tied.any():
        chips.append((TIE_NAME, _rgba(GREY, 0.0)))
    if not is_routed.all():
        chips.append((_empty_name(column), _rgba(GREY, 0.2)))
    names = [f" {_shorten(_visible(name), line_chars - 2)} " for name, _ in chips]
    boxes, line = _lay_out(enumerate(names), line=0, line_chars=line_chars, gap=1)
    fills_of = [chips[box.token][1] for box in boxes]
    inks_of = [ink.token] * len(boxes)
    hover_of = [_escape(chips[box.token][0]) for box in boxes]

    headings = []
    parts: tuple[Part, ...] = ("prompt", "answer")
    for part in parts:
        where = column.part_slice(part)
        if where.start == where.stop:
            continue
        headings.append((line + 1.4, part.upper()))
        pieces = [
            (t, piece)
            for t in range(where.start, where.stop)
            for piece in _pieces(column.tokens[t])
        ]
        placed, line = _lay_out(pieces, line=line + 2.3, line_chars=line_chars, gap=0)
        boxes += placed
        fills_of += [fills[box.token] for box in placed]
        inks_of += [inks[box.token] for box in placed]
        hover_of += [hovers[box.token] for box in placed]

    fig = go.Figure(
        go.Bar(
            orientation="h",
            base=np.array([box.start + 0.05 for box in boxes], np.float32),
            x=np.array([box.width - 0.1 for box in boxes], np.float32),
            y=np.array([box.line for box in boxes], np.float32),
            width=0.84,
            marker={"color": fills_of, "line": {"width": 0}, "cornerradius": 3},
            text=[_label(box.text) for box in boxes],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            constraintext="none",
            cliponaxis=False,
            textfont={"family": _MONO, "size": _STRIP_FONT_PX, "color": inks_of},
            hovertext=hover_of,
            hovertemplate="%{hovertext}<extra></extra>",
            showlegend=False,
        )
    )
    for at, heading in headings:
        fig.add_annotation(x=0, y=at, text=f"<b>{heading}</b>", xanchor="left", **_note(ink.muted))
    _finish(fig, theme, height=round((line + 1) * _LINE_PX) + 12)
    fig.update_layout(margin={"l": 6, "r": 6, "t": 6, "b": 6}, dragmode=False, hovermode="closest")
    # Locked to the y axis, whose pixels follow from the height, a character keeps its width
    # however wide the page is.
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
    return fig


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
    stronger the colour, the larger the weight. The first `window` tokens are in view: drag the
    map, or the slider below it, to see the others.
    """
    column, ink, groups = trace.column(label), _INK[theme], _groups(trace)
    cells = trace.dominant_cells(label, projection)
    is_routed = cells.expert != NOT_ROUTED
    tie, base = len(groups.names), len(groups.names) + 1
    slot = np.where(is_routed, groups.slot_of(cells.expert), base)
    slot = np.where(cells.is_tied, tie, slot)
    steps = len(_MAP_ALPHAS)
    level = np.clip((cells.weight * steps).astype(int), 0, steps - 1)
    palette = [_rgba(color, alpha) for color in groups.colors for alpha in _MAP_ALPHAS]
    palette += [_rgba(GREY, 0.2)] * steps + [_rgba(GREY, 0.5)] * steps

    expert_names = np.array([*map(_escape, trace.expert_names), _empty_name(column)], dtype=object)
    names = expert_names[np.where(is_routed, cells.expert, len(trace.expert_names))]
    names = np.where(cells.is_tied, "tie, first: " + names, names)
    T = column.num_tokens
    where = f"mean of all {len(trace.projections)}" if projection is None else _escape(projection)
    has_scores = bool(np.isfinite(cells.score).any())
    hover = (
        "token %{customdata[0]} <b>%{x}</b><br>layer <b>%{y}</b><br>"
        f"projection <b>{where}</b><br>"
        "expert <b>%{text}</b><br>weight <b>%{customdata[1]:.3f}</b>"
    )
    values = [np.broadcast_to(np.arange(T, dtype=np.float32)[:, None], slot.shape), cells.weight]
    if has_scores:
        hover += "<br>score <b>%{customdata[2]:.4g}</b>"
        values.append(cells.score)

    fig = go.Figure(
        go.Heatmap(
            x=[str(t) for t in range(T)],
            y=np.arange(trace.num_layers, dtype=np.int16),
            z=np.ascontiguousarray((slot * steps + level).astype(np.uint8).T),
            zmin=-0.5,
            zmax=len(palette) - 0.5,
            colorscale=_discrete(palette),
            showscale=False,
            text=names.T.tolist(),
            customdata=np.stack([value.T for value in values], axis=-1),
            hovertemplate=hover + "<extra></extra>",
        )
    )
    entries = [*zip(groups.names, groups.colors, strict=True)]
    entries += [(TIE_NAME, _rgba(GREY, 0.2)), (_empty_name(column), _rgba(GREY, 0.5))]
    for used in sorted(set(slot.ravel().tolist())):
        name, color = entries[used]
        fig.add_trace(
            go.Scatter(
                x=[None],
                y=[None],
                mode="markers",
                name=_escape(name),
                marker={"color": color, "size": 11, "symbol": "square"},
            )
        )
    # Not lower: on a phone, the labels and the slider leave Plotly no room for the map itself.
    _finish(fig, theme, height=200 + _MAP_ROW_PX * max(12, trace.num_layers))
    _mark_answer(fig, column, ink)
    fig.update_layout(dragmode="pan", hovermode="closest", showlegend=True)
    fig.update_xaxes(
        type="category",
        # The ticks show the tokens; the categories stay unique, and are thinned to what fits.
        labelalias={str(t): _axis_label(token) for t, token in enumerate(column.tokens)},
        range=[-0.5, min(T, window) - 0.5],
        tickangle=-90,
        tickfont={"family": _MONO, "size": 10},
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
    fig.update_yaxes(**_layer_axis(trace), fixedrange=True, showgrid=False)
    return fig


def expert_share(trace: RoutingTrace, *, theme: Theme = "light") -> go.Figure:
    """How much each expert served in each column: the prompt's tokens and the answer's apart."""
    ink, groups = _INK[theme], _groups(trace)
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
            counts.append(num_tokens)
        about = (
            f"mean over the {part}'s %{{customdata}} routed tokens,<br>"
            f"{trace.num_layers} layers, {len(trace.projections)} projections"
        )
        _add_stacked_bars(
            fig,
            groups,
            np.array(shares).reshape(len(shares), len(groups.names) + 1),
            places=[_escape(label) for label in trace.labels],
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
            **_note(ink.muted),
        )
        if all(c.part_slice(part).start == c.part_slice(part).stop for c in trace.columns):
            fig.add_annotation(
                text=f"no {part} in this trace",
                x=0.5,
                xref="paper",
                y=0.5,
                yref="y domain" if row == 1 else "y2 domain",
                **_note(ink.muted),
            )
    _finish(fig, theme, height=170 + 2 * 34 * max(1, len(trace.columns)))
    fig.update_yaxes(autorange="reversed", type="category")
    return fig


def share_by_layer(
    trace: RoutingTrace, label: str, *, part: Part = "all", theme: Theme = "light"
) -> go.Figure:
    """How much each expert served in each layer (upwards), over a part's tokens."""
    column, groups = trace.column(label), _groups(trace)
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
            f"mean over {num_tokens} routed tokens{of_part},<br>"
            f"{len(trace.projections)} projections"
        ),
        row=1,
    )
    _finish(fig, theme, height=130 + _MAP_ROW_PX * max(6, trace.num_layers))
    fig.update_layout(bargap=0.12)
    fig.update_yaxes(**_layer_axis(trace), showgrid=False)
    return fig


def share_along_text(
    trace: RoutingTrace, label: str, *, window: int = 9, theme: Theme = "light"
) -> go.Figure:
    """Each expert's share along the tokens, and beneath it how far the routed model's next-token
    distribution is from the base model's, KL(routed || base) in nats.

    The shares are moving averages over `window` tokens; the KL is not averaged.
    """
    column, ink, groups = trace.column(label), _INK[theme], _groups(trace)
    share = groups.reduce(trace.smoothed_share(label, window))
    is_empty = share.sum(axis=1) == 0
    place = np.arange(column.num_tokens, dtype=np.int32)
    fig = make_subplots(
        rows=2, cols=1, shared_xaxes=True, row_heights=[0.68, 0.32], vertical_spacing=0.07
    )
    about = (
        f"<br>shares: mean of {window} tokens around,<br>{trace.num_layers} layers, "
        f"{len(trace.projections)} projections"
    )
    tokens = [
        f"<b>{_quoted(token)}</b> ({_part_of(column, t)})" for t, token in enumerate(column.tokens)
    ]
    # Invisible: it names the token at the top of the joint hover box.
    fig.add_trace(
        go.Scatter(
            x=place,
            y=np.ones(column.num_tokens, np.float32),
            mode="lines",
            line={"width": 0, "color": "rgba(0,0,0,0)"},
            showlegend=False,
            text=tokens,
            hovertemplate="%{text}" + about + "<extra></extra>",
        ),
        row=1,
        col=1,
    )
    series = [*zip(groups.names, groups.colors, share.T, strict=True)]
    series.append((_empty_name(column), GREY, is_empty.astype(np.float32)))
    for name, color, values in series:
        if values.any():
            fig.add_trace(
                go.Scatter(
                    x=place,
                    y=np.ascontiguousarray(values),
                    stackgroup="share",
                    mode="lines",
                    name=_escape(name),
                    line={"width": 0, "color": color, "shape": "hvh"},
                    fillcolor=_rgba(color, 0.88),
                    hovertemplate=f"expert {_escape(name)} <b>%{{y:.1%}}</b><extra></extra>"
                    if color != GREY
                    else f"{name}<extra></extra>",
                ),
                row=1,
                col=1,
            )
    fig.add_trace(
        go.Scatter(
            x=place,
            y=column.kl,
            mode="lines",
            line={"width": 1.5, "color": ink.text, "shape": "hvh"},
            fill="tozeroy",
            fillcolor=_rgba(GREY, 0.25),
            showlegend=False,
            text=tokens,
            hovertemplate="%{text}<br>KL from base <b>%{y:.3f}</b> nats<extra></extra>",
        ),
        row=2,
        col=1,
    )
    if not np.isfinite(column.kl).any():
        fig.add_annotation(
            text="no KL from base in this trace",
            x=0.5,
            xref="x domain",
            y=0.5,
            yref="y2 domain",
            **_note(ink.muted),
        )
    _finish(fig, theme, height=420)
    _mark_answer(fig, column, ink)
    fig.update_layout(hovermode="x unified", dragmode="pan")
    few = {"dtick": 1} if column.num_tokens < 8 else {}  # no ticks between tokens
    fig.update_xaxes(range=[-0.5, column.num_tokens - 0.5], showgrid=False, **few)
    fig.update_xaxes(title={"text": "token", "standoff": 4}, row=2, col=1)
    fig.update_yaxes(range=[0, 1], tickformat=".0%", fixedrange=True, row=1, col=1)
    fig.update_yaxes(
        title={"text": "KL (nats)", "standoff": 4},
        rangemode="tozero",
        nticks=4,
        fixedrange=True,
        row=2,
        col=1,
    )
    return fig


def _groups(trace: RoutingTrace) -> _Groups:
    """Which experts the charts name: all of up to twelve, else the twelve largest of the trace."""
    E = trace.num_experts
    if len(PALETTE) >= E:
        colors = expert_colors(trace.expert_names)
        return _Groups(
            names=tuple(colors), colors=tuple(colors.values()), slots=np.arange(E, dtype=np.intp)
        )
    total = sum((trace.share(label) for label in trace.labels), np.zeros(E, np.float32))
    # A stable sort, so that equal shares go to the lower ids; then back to the library's order.
    shown = np.sort(np.argsort(-total, kind="stable")[: len(PALETTE)])
    slots = np.full(E, len(shown), np.intp)
    slots[shown] = np.arange(len(shown))
    colors = expert_colors([trace.expert_names[index] for index in shown])
    return _Groups(
        names=(*colors, f"{OTHERS_NAME} ({E - len(shown)})"),
        colors=(*colors.values(), OTHERS_COLOR),
        slots=slots,
    )


def _add_stacked_bars(
    fig: go.Figure,
    groups: _Groups,
    values: NDArray[Any],
    *,
    places: Sequence[str] | NDArray[Any],
    place_name: str,
    about: str,
    row: int,
    customdata: list[int] | None = None,
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
            what = f"expert <b>{_escape(name)}</b>, weight <b>%{{x:.1%}}</b><br>{about}"
        fig.add_trace(
            go.Bar(
                orientation="h",
                x=np.ascontiguousarray(value, dtype=np.float32),
                y=places,
                name=_escape(name),
                legendgroup=_escape(name),
                showlegend=row == 1,
                marker={"color": color, "line": {"width": 0}},
                # Below a tenth a number does not fit its bar.
                text=None if is_thin else [f"{v:.0%}" if 0.1 <= v < 1 else "" for v in value],
                textposition="none" if is_thin else "inside",
                insidetextanchor="middle",
                textangle=0,
                textfont={"color": _ink_on(color), "size": 11},
                customdata=customdata,
                hovertemplate=f"{place_name} <b>%{{y}}</b><br>{what}<extra></extra>",
            ),
            row=row,
            col=1,
        )
    fig.update_layout(barmode="stack", bargap=0.25, hovermode="closest")
    fig.update_xaxes(range=[0, 1], tickformat=".0%", fixedrange=True, row=row, col=1)
    fig.update_yaxes(fixedrange=True, automargin=True, row=row, col=1)


def _layer_axis(trace: RoutingTrace) -> dict[str, Any]:
    """Whole layers only, however few there are."""
    dtick = 5 if trace.num_layers > 12 else 1
    return {"title": {"text": "layer", "standoff": 6}, "dtick": dtick}


def _finish(fig: go.Figure, theme: Theme, *, height: int) -> None:
    """What all figures share: transparent ground, quiet axes, legend above, explicit height."""
    ink = _INK[theme]
    fig.update_layout(
        template="none",
        height=height,
        margin={"l": 52, "r": 14, "t": _TOP_PX, "b": _BOTTOM_PX},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": _SANS, "size": 12, "color": ink.text},
        hoverlabel={
            "bgcolor": ink.hover,
            "bordercolor": ink.muted,
            "align": "left",
            "font": {"family": _SANS, "size": 12, "color": ink.text},
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


def _mark_answer(fig: go.Figure, column: ColumnTrace, ink: _Ink) -> None:
    """A line where the answer starts, across all rows of the figure."""
    if not 0 < column.num_prompt < column.num_tokens:
        return
    x = column.num_prompt - 0.5
    line = {"color": ink.text, "width": 1.5, "dash": "dot"}
    fig.add_shape(type="line", x0=x, x1=x, y0=0, y1=1, yref="paper", line=line)
    for text, anchor in (("prompt ", "right"), (" answer", "left")):
        fig.add_annotation(
            text=text, x=x, xanchor=anchor, y=1, yref="paper", yanchor="bottom", **_note(ink.muted)
        )


def _note(color: str) -> dict[str, Any]:
    """A small annotation without an arrow."""
    return {"showarrow": False, "borderpad": 0, "font": {"size": 11, "color": color}}


def _token_hover(
    trace: RoutingTrace, column: ColumnTrace, groups: _Groups, share: NDArray[Any], t: int
) -> str:
    """The hover text of token `t` of the strip; `share` is its (S,) row."""
    lines = [f"token {t}, {_part_of(column, t)}: <b>{_quoted(column.tokens[t])}</b>"]
    largest = [s for s in np.argsort(-share, kind="stable")[:4] if share[s] > 0]
    lines += [f"expert <b>{_escape(groups.names[s])}</b>, weight {share[s]:.1%}" for s in largest]
    if largest:
        lines.append(f"mean of {trace.num_layers} layers, {len(trace.projections)} projections")
    else:
        is_unread = column.is_routed and t == column.num_tokens - 1
        why = "the last token is not read" if is_unread else "no expert was used"
        lines.append(f"{_empty_name(column)}: {why}")
    measures = (("log-prob", column.logprob), ("entropy", column.entropy), ("KL", column.kl))
    known = [f"{name} {values[t]:.2f}" for name, values in measures if np.isfinite(values[t])]
    if known:
        lines.append(", ".join(known) + " nats")
    return "<br>".join(lines)


def _empty_name(column: ColumnTrace) -> str:
    """What a place without an expert is called: everywhere in the base column, or just there."""
    return "not routed" if column.is_routed else BASE_NAME


def _part_of(column: ColumnTrace, t: int) -> str:
    return "prompt" if t < column.num_prompt else "answer"


def _lay_out(
    pieces: Iterable[tuple[int, str]], *, line: float, line_chars: int, gap: int
) -> tuple[list[_Box], float]:
    """Place pieces of text on lines of `line_chars`; one that ends in ↵ ends its line.

    Returns the boxes and the last line used.
    """
    boxes: list[_Box] = []
    at, is_broken = 0, False
    for index, piece in pieces:
        text = _shorten(piece, line_chars)
        width = max(1, _num_cells(text))
        if is_broken or at + width > line_chars:
            line, at = line + 1, 0
        boxes.append(_Box(index, text, at, width, line))
        at += width + gap
        is_broken = text.endswith("↵")
    return boxes, line


def _pieces(token: str) -> list[str]:
    """The visible text of a token, one piece per line that it touches."""
    pieces: list[str] = re.findall(r"[^\n]*\n+|[^\n]+", token)
    # Bytes of an unfinished character have no text of their own.
    return [_visible(piece) for piece in pieces] or ["·"]


def _visible(text: str) -> str:
    """Text with its line breaks, tabs and other control characters made visible."""
    text = text.replace("\n", "↵").replace("\t", "⇥   ")
    return "".join(
        chr(0x2400 + ord(c)) if ord(c) < 32 else "\ufffd" if 0xD800 <= ord(c) < 0xE000 else c
        for c in text
    )


def _num_cells(text: str) -> int:
    """The width of a text in a monospaced font: wide characters take two cells."""
    cells = 0
    for c in text:
        if unicodedata.category(c) not in {"Mn", "Me", "Cf"}:
            cells += 2 if unicodedata.east_asian_width(c) in "WF" else 1
    return cells


def _shorten(text: str, max_chars: int) -> str:
    """Text cut to a number of cells, the cut shown by "…"; a final line break is kept."""
    if _num_cells(text) <= max_chars:
        return text
    tail = "…↵" if text.endswith("↵") else "…"
    cut = text[: max_chars - len(tail)]
    while _num_cells(cut) > max_chars - len(tail):
        cut = cut[:-1]
    return cut + tail


def _axis_label(token: str) -> str:
    """A token as a tick label: short, and never blank."""
    text = _visible(token).strip(" ") or "␣" * min(3, max(1, len(token)))
    return _label(_shorten(text, 14))


def _quoted(token: str) -> str:
    return f"“{_label(_shorten(_visible(token), 40))}”"


def _label(text: str) -> str:
    """Text that Plotly draws as it is, its spaces included."""
    return _escape(text).replace(" ", "\u00a0")


def _escape(text: str) -> str:
    """Text safe in Plotly's labels, which read <tags>, &entities; and, with MathJax, $formulas$.

    "%{" is split too: Plotly reads it as a variable in a hover template.
    """
    return html.escape(text, quote=False).replace("$", "&#36;").replace("{", "&#123;")


def _discrete(colors: Sequence[str]) -> list[list[Any]]:
    """A colour scale of equal steps."""
    n = len(colors)
    return [[edge / n, color] for i, color in enumerate(colors) for edge in (i, i + 1)]


def _channels(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def _rgba(color: str, alpha: float) -> str:
    red, green, blue = _channels(color)
    return f"rgba({red},{green},{blue},{alpha:.2f})"


def _ink_on(color: str) -> str:
    """Dark or light text, whichever has more contrast (WCAG 2.2) on an opaque colour."""
    ground, dark = _luminance(color), _INK["light"].text
    contrast_dark = (ground + 0.05) / (_luminance(dark) + 0.05)
    return dark if contrast_dark >= 1.05 / (ground + 0.05) else "#FFFFFF"


def _luminance(color: str) -> float:
    """Relative luminance of an sRGB colour (WCAG 2.2)."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (channel / 255 for channel in _channels(color))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
