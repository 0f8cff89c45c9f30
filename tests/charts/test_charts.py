"""What all charts have in common: names, colours, escapes, themes, sizes."""

import json
import re
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest

from spectr_demo import charts
from spectr_demo.trace import RoutingTrace
from tests.charts.samples import CHARTS, EXPERTS, Chart, rgb, text_of
from tests.trace_samples import sample_trace


@pytest.fixture(params=CHARTS)
def chart(request: pytest.FixtureRequest) -> Chart:
    return CHARTS[request.param]


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


@pytest.mark.parametrize("name", [name for name in CHARTS if name != "expert_share"])
def test_an_unknown_column_is_an_error(trace: RoutingTrace, name: str) -> None:
    with pytest.raises(ValueError, match="unknown column 'nope'"):
        CHARTS[name](trace, "nope")


def test_no_chart_can_be_dragged_into_blank_space(chart: Chart) -> None:
    for num_tokens in (1, 12, 200):
        layout = chart(sample_trace(num_tokens, num_layers=2)).layout
        axes = [layout[name] for name in layout if re.fullmatch(r"[xy]axis\d*", name)]
        slides = [axis for axis in axes if not axis.fixedrange]
        assert layout.dragmode is False or not slides
        assert len(slides) == (chart is CHARTS["routing_map"] and num_tokens == 200)
        for axis in slides:  # by the slider alone
            assert axis.rangeslider.visible
            assert (axis.minallowed, axis.maxallowed) == (-0.5, num_tokens - 0.5)


def test_charts_of_one_layer_and_projection_say_so(chart: Chart) -> None:
    trace = sample_trace(60, num_layers=1)
    kept = {
        name: (slice(None), slice(None), slice(0, 1)) for name in ("experts", "weights", "scores")
    }
    columns = tuple(
        replace(c, **{name: getattr(c, name)[where] for name, where in kept.items()})
        for c in trace.columns
    )
    shown = text_of(chart(replace(trace, projections=("q_proj",), columns=columns)))
    assert not re.search(r"\b1 (layers|projections|routed tokens)", shown)


def test_the_start_of_the_answer_is_marked(trace: RoutingTrace) -> None:
    start = trace.column("spectr").num_prompt - 0.5
    for fig in (charts.routing_map(trace, "spectr"), charts.share_along_text(trace, "spectr")):
        assert [shape.x0 for shape in fig.layout.shapes] == [start]
    prompt_only = sample_trace(10)
    assert not charts.routing_map(prompt_only, "spectr").layout.shapes
