"""A picture's words are escaped, and its table has its numbers."""

import plotly.graph_objects as go

from spectr_demo.charts import Picture


def test_words_and_table() -> None:
    picture = Picture(
        title="<one> leads",
        figure=go.Figure(),
        header=("who", "score"),
        rows=[("<one>", "0.9"), ("two & three", "0.1")],
        note="of <all>",
    )
    assert picture.heading == (
        '<div class="finding"><h3>&lt;one&gt; leads</h3><p>of &lt;all&gt;</p></div>'
    )
    assert '<th scope="col">score</th>' in picture.twin
    assert '<th scope="row">&lt;one&gt;</th><td>0.9</td>' in picture.twin
    assert '<th scope="row">two &amp; three</th><td>0.1</td>' in picture.twin
    assert 'tabindex="0"' in picture.twin, "what scrolls can be scrolled by keyboard"
