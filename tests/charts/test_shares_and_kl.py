"""The chart along the text: shares, and the KL from the base beneath."""

import dataclasses

import numpy as np

from spectr_demo import charts
from spectr_demo.trace import RoutingTrace
from tests.charts.samples import EXPERTS, text_of


def test_share_along_text_draws_smoothed_shares_over_the_kl(trace: RoutingTrace) -> None:
    fig = charts.share_along_text(trace, "spectr", window=5)
    areas = {data.name: data for data in fig.data if data.stackgroup}
    drawn = np.stack([areas[name].y for name in EXPERTS], axis=1)
    np.testing.assert_allclose(drawn, trace.smoothed_share("spectr", 5), atol=1e-6)
    np.testing.assert_array_equal(fig.data[-1].y, trace.column("spectr").kl)
    assert fig.data[-1].yaxis == "y2"
    assert fig.layout.xaxis.matches == "x2"
    assert "mean of 5 tokens around" in fig.data[0].hovertemplate
    alone = charts.share_along_text(trace, "spectr", window=1)
    assert "shares: mean of 30 layers" in alone.data[0].hovertemplate
    assert "im_start" in fig.data[0].text[0]
    assert len({charts.share_along_text(trace, "spectr", window=w).to_json() for w in (5, 9)}) == 2


def test_the_title_of_the_kl_stands_above_its_axis(trace: RoutingTrace) -> None:
    fig = charts.share_along_text(trace, "spectr")
    assert fig.layout.yaxis2.title.text is None
    (title,) = (a for a in fig.layout.annotations if a.text == "KL from the base, in nats")
    assert (title.yref, title.y, title.yanchor) == ("y2 domain", 1, "bottom")


def test_share_along_text_says_when_there_is_no_kl(trace: RoutingTrace) -> None:
    column = trace.column("spectr")
    bare = dataclasses.replace(column, kl=np.full(column.num_tokens, np.nan, np.float32))
    fig = charts.share_along_text(dataclasses.replace(trace, columns=(bare,)), "spectr")
    assert "no KL from base in this trace" in text_of(fig)
    assert "no KL from base in this trace" not in text_of(charts.share_along_text(trace, "spectr"))
