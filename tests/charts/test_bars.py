"""Bars say what they were given, in the order that was asked for."""

import pytest

from spectr_demo.charts import Bar, bars, best_first, spectrum
from spectr_demo.charts.bars import MARKED, OTHER

ROWS = [
    Bar(name="a", value=0.2, low=0.1, high=0.4),
    Bar(name="<b>", value=0.9, is_marked=True),
    Bar(name="c", value=0.2),
]


def test_the_best_is_first_and_equal_ones_keep_their_order() -> None:
    assert [bar.name for bar in best_first(ROWS)] == ["<b>", "a", "c"]
    assert [bar.name for bar in best_first(ROWS, is_less_better=True)] == ["a", "c", "<b>"]


def test_bars_have_their_intervals_and_values() -> None:
    fig = bars(ROWS, axis="share", form=".1f", line=(0.5, "half"))
    (trace,) = fig.data
    assert list(trace.x) == [0.2, 0.9, 0.2]
    assert list(trace.error_x.array) == pytest.approx([0.2, 0, 0])
    assert list(trace.error_x.arrayminus) == pytest.approx([0.1, 0, 0])
    assert list(trace.marker.color) == [OTHER, MARKED, OTHER]
    assert list(trace.customdata) == ["a: 0.2 (0.1-0.4)", "&lt;b&gt;: 0.9", "c: 0.2"]
    assert list(fig.layout.yaxis.ticktext) == ["a", "<b>&lt;b&gt;</b>", "c"]
    # The first row is on top.
    assert fig.layout.yaxis.range == (2.5, -0.5)
    assert [note.text for note in fig.layout.annotations] == ["0.2", "0.9", "0.2", "half"]
    assert fig.layout.shapes[0].x0 == 0.5
    assert fig.layout.height == bars(ROWS[:1], axis="share").layout.height + 2 * 26


def test_without_an_interval_no_end_is_drawn() -> None:
    assert not bars(ROWS[1:], axis="share").data[0].error_x.visible
    assert bars(ROWS, axis="share").data[0].error_x.visible


def test_a_page_can_be_scrolled_over_a_figure() -> None:
    for fig in (bars(ROWS, axis="share"), spectrum([0.9, 0.1], axis="share")):
        assert fig.layout.dragmode is False
        assert fig.layout.xaxis.fixedrange and fig.layout.yaxis.fixedrange


def test_a_spectrum_counts_from_one() -> None:
    (trace,) = spectrum([0.7, 0.3], axis="share").data
    assert (list(trace.x), list(trace.y)) == ([1, 2], [0.7, 0.3])
