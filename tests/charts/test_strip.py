"""The token strip: what it holds, where, and how it is coloured."""

import dataclasses
import re

import numpy as np
import plotly.graph_objects as go
import pytest

from spectr_demo import charts
from spectr_demo.trace import NOT_ROUTED, RoutingTrace
from tests.charts.samples import EXPERTS
from tests.trace_samples import sample_trace


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
