"""The routing map: its cells, its tokens, and the part in view."""

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from spectr_demo import charts
from spectr_demo.trace import RoutingTrace
from tests.charts.samples import EXPERTS, rgb, text_of
from tests.trace_samples import sample_trace


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


def test_the_map_calls_a_score_what_its_router_calls_it(trace: RoutingTrace) -> None:
    column = trace.column("spectr")
    column = replace(column, router={**column.router, "name": "spectr-context"})
    heat = charts.routing_map(replace(trace, columns=(column,)), "spectr").data[0]
    assert "certainty <b>" in heat.hovertemplate
    assert "score" not in heat.hovertemplate


def test_the_map_labels_tokens_and_opens_on_a_window(trace: RoutingTrace) -> None:
    axis = charts.routing_map(trace, "spectr", window=50).layout.xaxis
    assert axis.labelalias["0"] == "&lt;|im_start|&gt;"
    assert axis.labelalias["2"] == "↵"
    assert axis.range == (-0.5, 49.5)
    assert axis.rangeslider.visible
    whole = charts.routing_map(sample_trace(30), "spectr").layout.xaxis
    assert whole.range == (-0.5, 29.5)
    assert not whole.rangeslider.visible


def test_an_unknown_projection_is_an_error(trace: RoutingTrace) -> None:
    options: dict[str, Any] = {"projection": "q_pro"}
    with pytest.raises(ValueError, match="Did you mean 'q_proj'"):
        charts.routing_map(trace, "spectr", **options)


def colors_in_legend(fig: go.Figure) -> dict[str, tuple[int, ...]]:
    return {data.name: rgb(data.marker.color) for data in fig.data if data.name}


def test_the_map_names_its_experts_in_one_colour(trace: RoutingTrace) -> None:
    found = colors_in_legend(charts.routing_map(trace, "spectr"))
    expected = {name: rgb(color) for name, color in charts.trace_colors(trace).items()}
    assert {name: found.get(name) for name in EXPERTS} == expected


@pytest.mark.parametrize("label", ["base", "single:sql", "uniform", "spectr"])
@pytest.mark.parametrize("num_tokens", [1, 2, 40, 120])
def test_the_map_draws_every_column(label: str, num_tokens: int) -> None:
    fig = charts.routing_map(sample_trace(num_tokens, num_layers=3), label)
    assert fig.layout.height > 0
    assert go.Figure(json.loads(fig.to_json())).layout.height == fig.layout.height
    assert ("base model only" in text_of(fig)) == (label == "base")


def test_the_map_is_small() -> None:
    assert len(charts.routing_map(sample_trace(300, top_k=4), "spectr").to_json()) < 400_000


def test_the_map_has_ink_for_both_themes(trace: RoutingTrace) -> None:
    light, dark = (
        charts.routing_map(trace, "spectr", theme=theme).layout for theme in ("light", "dark")
    )
    assert light.paper_bgcolor == dark.paper_bgcolor == "rgba(0,0,0,0)"
    assert sum(rgb(light.font.color)) < 3 * 64
    assert sum(rgb(dark.font.color)) > 3 * 192


def test_the_map_escapes_names() -> None:
    names = ("<b>bold</b>", "%{x}", "$a$", "a&b")
    fig = charts.routing_map(sample_trace(60, expert_names=names, num_layers=2), "spectr")
    text = text_of(fig)
    assert "&lt;b&gt;bold" in text
    assert "<b>bold</b>" not in text
    assert "%&#123;x}" in text
    assert "&#36;a&#36;" in text
    assert "a&amp;b" in text


def test_the_map_groups_the_small_experts_of_a_large_library() -> None:
    names = tuple(f"expert {index}" for index in range(30))
    trace = sample_trace(100, expert_names=names, num_layers=3)
    found = colors_in_legend(charts.routing_map(trace, "spectr"))
    shown = {name for name in found if name in names}
    assert found["others (18)"] == rgb(charts.OTHERS_COLOR)
    assert len(shown) <= 12
    colors = charts.trace_colors(trace)
    assert {name: found[name] for name in shown} == {name: rgb(colors[name]) for name in shown}
    largest = sum(trace.share(label) for label in trace.labels).argsort()[-12:]
    assert shown <= {names[index] for index in largest}


def test_an_unknown_column_is_an_error(trace: RoutingTrace) -> None:
    with pytest.raises(ValueError, match="unknown column 'nope'"):
        charts.routing_map(trace, "nope")


@pytest.mark.parametrize("num_tokens", [1, 12, 200])
def test_the_map_cannot_be_dragged_into_blank_space(num_tokens: int) -> None:
    layout = charts.routing_map(sample_trace(num_tokens, num_layers=2), "spectr").layout
    axes = [layout[name] for name in layout if re.fullmatch(r"[xy]axis\d*", name)]
    slides = [axis for axis in axes if not axis.fixedrange]
    assert layout.dragmode is False or not slides
    assert len(slides) == (num_tokens == 200)
    for axis in slides:  # by the slider alone
        assert axis.rangeslider.visible
        assert (axis.minallowed, axis.maxallowed) == (-0.5, num_tokens - 0.5)


def test_the_start_of_the_answer_is_marked(trace: RoutingTrace) -> None:
    start = trace.column("spectr").num_prompt - 0.5
    fig = charts.routing_map(trace, "spectr")
    assert [shape.x0 for shape in fig.layout.shapes] == [start]
    assert not charts.routing_map(sample_trace(10), "spectr").layout.shapes
