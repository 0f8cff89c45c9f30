"""Text for Plotly: escaped, visible, and cut to a width."""

import pytest

from spectr_demo.charts.text import axis_label, counted, escape, num_cells, shorten


def test_nothing_that_plotly_reads_as_markup_is_left() -> None:
    assert escape("<b> & %{x} $a$") == "&lt;b&gt; &amp; %&#123;x} &#36;a&#36;"


@pytest.mark.parametrize(
    ("text", "cells"), [("abc", 3), ("日本", 4), ("e\u0301", 1), ("", 0), ("\u200b", 0)]
)
def test_a_text_is_as_wide_as_its_cells(text: str, cells: int) -> None:
    assert num_cells(text) == cells


def test_a_text_is_cut_to_its_cells_and_keeps_a_final_line_break() -> None:
    assert shorten("abcdef", 6) == "abcdef"
    assert shorten("abcdefg", 6) == "abcde…"
    assert shorten("abcdefg↵", 6) == "abcd…↵"
    assert shorten("日本語日本語", 6) == "日本…"


def test_a_tick_label_is_never_blank() -> None:
    assert axis_label(" the ") == "the"
    assert axis_label("  ") == "␣␣"
    assert axis_label("") == "␣"


def test_one_of_a_thing_is_not_several() -> None:
    assert [counted(n, "layer") for n in (0, 1, 2)] == ["0 layers", "1 layer", "2 layers"]
