"""The figures for a screen, and the files to take away."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spectr_demo.trace import RoutingTrace
from spectr_demo.ui import figures
from spectr_demo.ui.figures import ALL_PROJECTIONS, View
from tests.trace_samples import sample_trace


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return sample_trace(60, num_layers=3)


@pytest.mark.parametrize(
    ("text", "view"),
    [
        ("dark 44", View(theme="dark", line_chars=44)),
        ("light 100000", View(theme="light", line_chars=140)),
        ("light 3", View(theme="light", line_chars=24)),
        ("", View()),
        (None, View()),
        ("neon 44", View()),
        ("dark wide", View()),
    ],
)
def test_a_page_reports_its_theme_and_width(text: str | None, view: View) -> None:
    assert View.parse(text) == view


def test_the_view_and_the_projection_change_the_figures(trace: RoutingTrace) -> None:
    light, dark = (figures.draw(trace, "spectr", "all", View(theme=t)) for t in ("light", "dark"))
    assert len(light) == 5
    assert light[0].layout.font.color != dark[0].layout.font.color
    narrow = figures.draw(trace, "spectr", "all", View(line_chars=30))
    assert narrow[0].layout.height > light[0].layout.height
    one = figures.draw_map(trace, "spectr", trace.projections[0], View())
    assert not np.array_equal(one.data[0].z, light[1].data[0].z)


def test_shares_of_whole_requests_are_not_averaged_along_the_text(trace: RoutingTrace) -> None:
    def shares(name: str) -> list[np.ndarray]:
        column = trace.column("spectr")
        column = replace(column, router={**column.router, "name": name})
        along = figures.draw(replace(trace, columns=(column,)), "spectr", "all", View())[4]
        return [data.y for data in along.data if data.stackgroup]

    of_token = trace.token_share("spectr").T
    used = [share for share in of_token if share.any()]
    for drawn, share in zip(shares("spectr-context"), used, strict=False):
        np.testing.assert_allclose(drawn, share, atol=1e-6)
    assert not np.allclose(shares("spectr")[0], used[0], atol=1e-3)


def test_the_charts_file_needs_no_network(trace: RoutingTrace, tmp_path: Path) -> None:
    path = figures.charts_file(trace, "what is <b>this</b>?", str(tmp_path))
    page = Path(path).read_text(encoding="utf-8")
    assert Path(path).is_relative_to(tmp_path)
    assert "&lt;b&gt;this" in page
    assert len(re.findall(r"Plotly\.newPlot\(", page)) >= 1 + 4 * len(trace.columns)
    assert page.count("plotly.js v") == 1  # inside, and once
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)


def test_the_trace_file_is_the_trace(trace: RoutingTrace, tmp_path: Path) -> None:
    loaded = RoutingTrace.load(figures.trace_file(trace, str(tmp_path)))
    assert loaded.labels == trace.labels
    np.testing.assert_array_equal(loaded.column("spectr").experts, trace.column("spectr").experts)


def test_an_unknown_projection_shows_the_mean(trace: RoutingTrace) -> None:
    unknown = figures.draw_map(trace, "spectr", "nonsense", View())
    mean = figures.draw_map(trace, "spectr", ALL_PROJECTIONS, View())
    np.testing.assert_array_equal(unknown.data[0].z, mean.data[0].z)
