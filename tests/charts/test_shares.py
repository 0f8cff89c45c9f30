"""The charts of shares: of each column, and of each layer."""

import numpy as np

from spectr_demo import charts
from spectr_demo.trace import RoutingTrace
from tests.charts.samples import EXPERTS, text_of
from tests.trace_samples import sample_trace


def test_expert_share_shows_prompt_and_answer_of_every_column(trace: RoutingTrace) -> None:
    fig = charts.expert_share(trace)
    for part, axis in (("prompt", "y"), ("answer", "y2")):
        bars = {data.name: data for data in fig.data if data.yaxis == axis}
        assert tuple(bars["code"].y) == trace.labels
        for at, label in enumerate(trace.labels):
            shown = [bars[name].x[at] for name in EXPERTS]
            np.testing.assert_allclose(shown, trace.share(label, part), atol=1e-6)
        assert list(bars["base model only"].x) == [1, 0, 0, 0]
        assert f"mean over the {part}'s %{{customdata}},<br>" in bars["code"].hovertemplate
        num = trace.is_token_routed("spectr")[trace.column("spectr").part_slice(part)].sum()
        assert list(bars["code"].customdata)[3] == f"{num} routed tokens"
    assert "no answer in this trace" in text_of(charts.expert_share(sample_trace(5)))


def test_share_by_layer_draws_the_layers_of_the_part(trace: RoutingTrace) -> None:
    for part in ("all", "prompt", "answer"):
        fig = charts.share_by_layer(trace, "spectr", part=part)
        drawn = np.stack([data.x for data in fig.data[: len(EXPERTS)]], axis=1)
        np.testing.assert_allclose(drawn, trace.layer_share("spectr", part), atol=1e-6)
        assert np.asarray(fig.data[0].y).tolist() == list(range(30))
    for word in ("layer", "expert", "weight", "routed tokens of the answer", "7 projections"):
        assert word in fig.data[0].hovertemplate
