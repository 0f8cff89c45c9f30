"""The routing map: its cells, its tokens, and the part in view."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from spectr_demo import charts
from spectr_demo.trace import RoutingTrace
from tests.charts.samples import EXPERTS, rgb
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
