"""The figures: what they name, colour and escape, and how large they are."""

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from spectr_demo import charts
from spectr_demo.trace import NOT_ROUTED, RoutingTrace
from tests.trace_samples import sample_trace

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


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return sample_trace(200)


@pytest.fixture(params=CHARTS)
def chart(request: pytest.FixtureRequest) -> Chart:
    return CHARTS[request.param]


def text_of(fig: go.Figure) -> str:
    """All that a figure holds, as JSON text with its characters unescaped."""
    return json.dumps(json.loads(fig.to_json()), ensure_ascii=False)


def rgb(color: str) -> tuple[int, ...]:
    """The channels of "#RRGGBB" or "rgba(...)"."""
    if color.startswith("#"):
        return tuple(int(color[at : at + 2], 16) for at in (1, 3, 5))
    return tuple(int(channel) for channel in re.findall(r"\d+", color)[:3])


def colors_in_legend(fig: go.Figure) -> dict[str, tuple[int, ...]]:
    """The colour of each named trace, or of each chip in the first line of the token strip."""
    if len(fig.data) == 1:
        (strip,) = fig.data
        names = [text.replace("\u00a0", " ").strip() for text in strip.text]
        chips = np.flatnonzero(np.asarray(strip.y) < 2)
        return {names[at]: rgb(strip.marker.color[at]) for at in chips}
    return {
        data.name: rgb(data.line.color if getattr(data, "stackgroup", None) else data.marker.color)
        for data in fig.data
        if data.name
    }


# Every chart


def test_every_chart_names_its_experts_in_one_colour(trace: RoutingTrace, chart: Chart) -> None:
    found = colors_in_legend(chart(trace))
    expected = {name: rgb(color) for name, color in charts.trace_colors(trace).items()}
    assert {name: found.get(name) for name in EXPERTS} == expected


@pytest.mark.parametrize("label", ["base", "single:sql", "uniform", "spectr"])
@pytest.mark.parametrize("num_tokens", [1, 2, 40, 120])
def test_every_chart_draws_every_column(chart: Chart, label: str, num_tokens: int) -> None:
    # 1, 2 and 40 tokens end inside the prompt: the answer is empty.
    trace = sample_trace(num_tokens, num_layers=3)
    fig = chart(trace, label)
    assert fig.layout.height > 0
    assert go.Figure(json.loads(fig.to_json())).layout.height == fig.layout.height
    assert ("base model only" in text_of(fig)) == (
        label == "base" or chart is CHARTS["expert_share"]
    )


def test_every_chart_is_small(chart: Chart) -> None:
    fig = chart(sample_trace(300, top_k=4))
    assert len(fig.to_json()) < 400_000


def test_every_chart_has_ink_for_both_themes(trace: RoutingTrace, chart: Chart) -> None:
    light, dark = chart(trace, theme="light").layout, chart(trace, theme="dark").layout
    assert light.paper_bgcolor == dark.paper_bgcolor == "rgba(0,0,0,0)"
    assert sum(rgb(light.font.color)) < 3 * 64
    assert sum(rgb(dark.font.color)) > 3 * 192


def test_every_chart_escapes_names(chart: Chart) -> None:
    names = ("<b>bold</b>", "%{x}", "$a$", "a&b")
    fig = chart(sample_trace(60, expert_names=names, num_layers=2))
    text = text_of(fig)
    assert "&lt;b&gt;bold" in text
    assert "<b>bold</b>" not in text
    assert "%&#123;x}" in text
    assert "&#36;a&#36;" in text
    assert "a&amp;b" in text


def test_every_chart_groups_the_small_experts_of_a_large_library(chart: Chart) -> None:
    names = tuple(f"expert {index}" for index in range(30))
    trace = sample_trace(100, expert_names=names, num_layers=3)
    found = colors_in_legend(chart(trace))
    shown = {name for name in found if name in names}
    assert found["others (18)"] == rgb(charts.OTHERS_COLOR)
    assert len(shown) <= 12
    colors = charts.trace_colors(trace)
    assert {name: found[name] for name in shown} == {name: rgb(colors[name]) for name in shown}
    largest = sum(trace.share(label) for label in trace.labels).argsort()[-12:]
    assert shown <= {names[index] for index in largest}


# Colours


def test_expert_colors_follow_the_order_and_repeat_after_twelve() -> None:
    colors = charts.expert_colors([f"e{index}" for index in range(13)])
    assert list(colors.values())[:12] == list(charts.PALETTE)
    assert colors["e12"] == colors["e0"]


# Machado, Oliveira & Fernandes (2009), severity 1.0, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
# Ottosson (2020): linear sRGB to cone responses, and their cube roots to OKLab.
TO_LMS = [
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
]
TO_LAB = [
    [0.2104542553, 0.7936177850, -0.0040720468],
    [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
]


@pytest.mark.parametrize("vision", VISION)
def test_colours_are_told_apart_by_every_vision(vision: str) -> None:
    srgb = np.array([rgb(color) for color in charts.PALETTE]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.transpose(VISION[vision]), 0, 1)
    lab = np.cbrt(seen @ np.transpose(TO_LMS)) @ np.transpose(TO_LAB)
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + np.eye(len(lab))
    # Okabe and Ito's own closest pair is at 0.076 (deuteranopia): the added five come no closer.
    assert distance.min() > 0.075


# Token strip


def words(fig: go.Figure, after_line: float = 2) -> list[str]:
    """The boxes of the strip below its legend, as plain text."""
    (strip,) = fig.data
    return [
        text.replace("\u00a0", " ").replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        for text, y in zip(strip.text, strip.y, strict=True)
        if y >= after_line
    ]


def test_the_strip_holds_the_whole_text_in_lines(trace: RoutingTrace) -> None:
    fig = charts.token_strip(trace, "spectr", line_chars=60)
    text = trace.column("spectr").text
    assert "".join(words(fig)) == text.replace("\n", "↵").replace("$", "&#36;")
    (strip,) = fig.data
    ends = np.asarray(strip.base) + np.asarray(strip.x)
    assert ends.max() <= 60
    lines = np.asarray(strip.y)
    for line in set(lines.tolist()):  # boxes of a line follow each other without overlap
        at = lines == line
        assert (np.asarray(strip.base)[at][1:] >= ends[at][:-1]).all()


def test_a_line_break_ends_a_line_of_the_strip(trace: RoutingTrace) -> None:
    (strip,) = charts.token_strip(trace, "spectr").data
    y = np.asarray(strip.y)
    breaks = [at for at, text in enumerate(strip.text[:-1]) if text.endswith("↵")]
    assert breaks
    assert all(y[at + 1] > y[at] for at in breaks)


def test_prompt_and_answer_of_the_strip_are_apart(trace: RoutingTrace) -> None:
    fig = charts.token_strip(trace, "spectr")
    assert [note.text for note in fig.layout.annotations] == ["<b>PROMPT</b>", "<b>ANSWER</b>"]
    prompt_only = sample_trace(trace.column("spectr").num_prompt)
    fig = charts.token_strip(prompt_only, "spectr")
    assert [note.text for note in fig.layout.annotations] == ["<b>PROMPT</b>"]


def test_the_strip_wraps_and_grows_with_its_width(trace: RoutingTrace) -> None:
    wide = charts.token_strip(trace, "spectr", line_chars=100)
    narrow = charts.token_strip(trace, "spectr", line_chars=40)
    assert narrow.layout.height > wide.layout.height
    assert narrow.layout.xaxis.range == (0, 40)
    with pytest.raises(ValueError, match="line_chars is 8, needed at least 16"):
        charts.token_strip(trace, "spectr", line_chars=8)


def test_tokens_appear_literally(trace: RoutingTrace) -> None:
    (strip,) = charts.token_strip(trace, "spectr").data
    assert "&lt;|im_start|&gt;" in strip.text
    assert not any("<" in text for text in strip.text)


def test_strange_tokens_have_a_visible_box() -> None:
    trace = sample_trace(6, num_layers=2)
    column = trace.column("spectr")
    tokens = ("", "\t", "\x00", "日本", "e\u0301", "x" * 300)
    strange = dataclasses.replace(column, tokens=tokens, spans=np.zeros((6, 2), np.int32))
    trace = dataclasses.replace(trace, columns=(strange,))
    fig = charts.token_strip(trace, "spectr", line_chars=60)
    assert words(fig)[:5] == ["·", "⇥   ", "␀", "日本", "e\u0301"]
    assert words(fig)[5].endswith("x…")
    np.testing.assert_allclose(np.asarray(fig.data[0].x)[-3:], [3.9, 0.9, 59.9], rtol=1e-5)
    assert fig.to_json()


def test_a_stronger_lead_has_a_stronger_colour_and_a_tie_none() -> None:
    trace = sample_trace(120, num_layers=4)
    column = trace.column("spectr")
    expert, margin = trace.dominant_tokens("spectr")
    (strip,) = charts.token_strip(trace, "spectr").data
    alpha = {}
    for text, color, hover in zip(strip.text, strip.marker.color, strip.hovertext, strict=True):
        if (match := re.match(r"token (\d+),", hover)) and "|" not in text:
            alpha[int(match[1])] = float(color.rsplit(",", 1)[1].rstrip(")"))
    routed = [t for t in alpha if expert[t] != NOT_ROUTED]
    assert len(routed) > 50
    by_margin = sorted(routed, key=lambda t: margin[t])
    alphas = [alpha[t] for t in by_margin]
    assert alphas == sorted(alphas)
    assert alphas[0] < alphas[-1]
    assert "last token is not read" in strip.hovertext[-1]
    assert column.num_tokens - 1 not in routed

    (tied,) = charts.token_strip(trace, "uniform").data
    assert set(tied.marker.color) == {"rgba(140,140,140,0.00)"}


def test_hover_of_the_strip_names_the_token_its_experts_and_measures(trace: RoutingTrace) -> None:
    (strip,) = charts.token_strip(trace, "spectr").data
    hover = next(text for text in strip.hovertext if text.startswith("token 7,"))
    column = trace.column("spectr")
    share = trace.token_share("spectr")[7]
    first = EXPERTS[share.argmax()]
    assert f"prompt: <b>“{column.tokens[7]}" in hover.replace("\u00a0", " ")
    assert f"expert <b>{first}</b>, weight {share.max():.1%}" in hover
    assert "mean of 30 layers, 7 projections" in hover
    assert f"log-prob {column.logprob[7]:.2f}" in hover
    assert f"KL {column.kl[7]:.2f} nats" in hover
    # Token 0 was not drawn from a distribution.
    assert not any("log-prob" in text for text in strip.hovertext if text.startswith("token 0,"))


# Routing map


@pytest.mark.parametrize("projection", [None, "q_proj"])
def test_the_map_has_a_cell_per_layer_and_token(
    trace: RoutingTrace, projection: str | None
) -> None:
    fig = charts.routing_map(trace, "spectr", projection=projection)
    heat = fig.data[0]
    cells = trace.dominant_cells("spectr", projection)
    assert np.shape(heat.z) == (30, 200)
    assert np.asarray(heat.z).dtype == np.uint8
    names = np.array([*EXPERTS, "not routed"])[cells.expert.T]
    names = np.where(cells.is_tied.T, np.char.add("tie, first: ", names), names)
    np.testing.assert_array_equal(np.array(heat.text), names)
    values = np.asarray(heat.customdata)
    np.testing.assert_array_equal(values[..., 1], cells.weight.T)
    np.testing.assert_array_equal(values[..., 2], cells.score.T)
    for word in ("token", "layer", "projection", "expert", "weight", "score"):
        assert word in heat.hovertemplate
    assert (projection or "mean of all 7") in heat.hovertemplate


def test_cells_of_the_map_are_painted_in_their_experts_colour(trace: RoutingTrace) -> None:
    heat = charts.routing_map(trace, "spectr").data[0]
    cells = trace.dominant_cells("spectr")
    span = heat.zmax - heat.zmin
    palette = [color for _, color in heat.colorscale[::2]]
    assert span == len(palette)
    colors = charts.trace_colors(trace)
    for t, layer in [(0, 0), (40, 29), (90, 12), (150, 3)]:
        painted = palette[int(heat.z[layer][t])]
        assert rgb(painted) == rgb(colors[EXPERTS[cells.expert[t, layer]]])


def test_the_map_leaves_out_scores_where_there_are_none(trace: RoutingTrace) -> None:
    heat = charts.routing_map(trace, "uniform").data[0]
    assert "score" not in heat.hovertemplate
    assert "weight" in heat.hovertemplate


def test_the_map_labels_tokens_and_opens_on_a_window(trace: RoutingTrace) -> None:
    axis = charts.routing_map(trace, "spectr", window=50).layout.xaxis
    assert axis.labelalias["0"] == "&lt;|im_start|&gt;"
    assert axis.labelalias["2"] == "↵"
    assert axis.range == (-0.5, 49.5)
    assert axis.rangeslider.visible
    whole = charts.routing_map(sample_trace(30), "spectr").layout.xaxis
    assert whole.range == (-0.5, 29.5)
    assert not whole.rangeslider.visible


def test_the_start_of_the_answer_is_marked(trace: RoutingTrace) -> None:
    start = trace.column("spectr").num_prompt - 0.5
    for fig in (charts.routing_map(trace, "spectr"), charts.share_along_text(trace, "spectr")):
        assert [shape.x0 for shape in fig.layout.shapes] == [start]
    prompt_only = sample_trace(10)
    assert not charts.routing_map(prompt_only, "spectr").layout.shapes


# Shares


def test_expert_share_shows_prompt_and_answer_of_every_column(trace: RoutingTrace) -> None:
    fig = charts.expert_share(trace)
    for part, axis in (("prompt", "y"), ("answer", "y2")):
        bars = {data.name: data for data in fig.data if data.yaxis == axis}
        assert tuple(bars["code"].y) == trace.labels
        for at, label in enumerate(trace.labels):
            shown = [bars[name].x[at] for name in EXPERTS]
            np.testing.assert_allclose(shown, trace.share(label, part), atol=1e-6)
        assert list(bars["base model only"].x) == [1, 0, 0, 0]
        assert f"the {part}'s %{{customdata}} routed tokens" in bars["code"].hovertemplate
    assert "no answer in this trace" in text_of(charts.expert_share(sample_trace(5)))


def test_share_by_layer_draws_the_layers_of_the_part(trace: RoutingTrace) -> None:
    for part in ("all", "prompt", "answer"):
        fig = charts.share_by_layer(trace, "spectr", part=part)
        drawn = np.stack([data.x for data in fig.data[: len(EXPERTS)]], axis=1)
        np.testing.assert_allclose(drawn, trace.layer_share("spectr", part), atol=1e-6)
        assert np.asarray(fig.data[0].y).tolist() == list(range(30))
    for word in ("layer", "expert", "weight", "routed tokens of the answer", "7 projections"):
        assert word in fig.data[0].hovertemplate


def test_share_along_text_draws_smoothed_shares_over_the_kl(trace: RoutingTrace) -> None:
    fig = charts.share_along_text(trace, "spectr", window=5)
    areas = {data.name: data for data in fig.data if data.stackgroup}
    drawn = np.stack([areas[name].y for name in EXPERTS], axis=1)
    np.testing.assert_allclose(drawn, trace.smoothed_share("spectr", 5), atol=1e-6)
    np.testing.assert_array_equal(fig.data[-1].y, trace.column("spectr").kl)
    assert fig.data[-1].yaxis == "y2"
    assert fig.layout.xaxis.matches == "x2"
    assert "mean of 5 tokens around" in fig.data[0].hovertemplate
    assert "im_start" in fig.data[0].text[0]
    assert len({charts.share_along_text(trace, "spectr", window=w).to_json() for w in (5, 9)}) == 2


def test_share_along_text_says_when_there_is_no_kl(trace: RoutingTrace) -> None:
    column = trace.column("spectr")
    bare = dataclasses.replace(column, kl=np.full(column.num_tokens, np.nan, np.float32))
    fig = charts.share_along_text(dataclasses.replace(trace, columns=(bare,)), "spectr")
    assert "no KL from base in this trace" in text_of(fig)
    assert "no KL from base in this trace" not in text_of(charts.share_along_text(trace, "spectr"))


@pytest.mark.parametrize("name", [name for name in CHARTS if name != "expert_share"])
def test_an_unknown_column_is_an_error(trace: RoutingTrace, name: str) -> None:
    with pytest.raises(ValueError, match="column 'nope' is not in the trace"):
        CHARTS[name](trace, "nope")


def test_an_unknown_projection_is_an_error(trace: RoutingTrace) -> None:
    options: dict[str, Any] = {"projection": "q_pro"}
    with pytest.raises(ValueError, match="did you mean 'q_proj'"):
        charts.routing_map(trace, "spectr", **options)
