"""A grid leaves empty what is empty, and numbers in it stay readable on any page."""

import re

import numpy as np

from spectr_demo.charts import grid
from spectr_demo.charts.bars import MARKED
from spectr_demo.charts.style import INK

VALUES = np.array([[1.0, np.nan, 4.0], [0.0, 2.0, 3.0]])
NAMES = {"x": ["p", "q", "<r>"], "y": ["up", "down"], "x_title": "expert", "y_title": "domain"}


def test_cells_have_their_values_and_names() -> None:
    fig = grid(VALUES, **NAMES)  # type: ignore[arg-type]
    (trace,) = fig.data
    assert [list(row) for row in trace.z] == [[1, None, 4], [0, 2, 3]]
    assert list(trace.customdata[0]) == ["up, p", "up, q", "up, &lt;r&gt;"]
    assert fig.layout.yaxis.range == (1.5, -0.5)
    assert grid(VALUES, **NAMES, is_falling=False).layout.yaxis.range == (-0.5, 1.5)  # type: ignore[arg-type]
    assert trace.texttemplate == "%{z:.3g}"
    assert grid(VALUES, **NAMES, is_written=False).data[0].texttemplate is None  # type: ignore[arg-type]


def test_a_grid_of_nothing_can_be_drawn() -> None:
    fig = grid(np.full((1, 2), np.nan), x=["a", "b"], y=["c"], x_title="", y_title="")
    assert [list(row) for row in fig.data[0].z] == [[None, None]]


def test_of_many_names_some_are_shown() -> None:
    fig = grid(np.zeros((1, 100)), x=[f"e{i}" for i in range(100)], y=["a"], x_title="", y_title="")
    assert len(fig.layout.xaxis.tickvals) <= 16
    assert fig.layout.xaxis.ticktext[1] == f"e{fig.layout.xaxis.tickvals[1]}"
    assert fig.layout.xaxis.tickangle == 0


def luminance(channels: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def channels(color: str) -> list[float]:
    return [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def test_ink_stands_out_on_every_cell() -> None:
    fig = grid(VALUES, **NAMES)  # type: ignore[arg-type]
    alphas = [float(re.findall(r"[\d.]+", color)[-1]) for _, color in fig.data[0].colorscale]
    for theme, page in (("light", "#ffffff"), ("dark", "#161a22")):
        for alpha in np.linspace(min(alphas), max(alphas), 5):
            pairs = zip(channels(MARKED), channels(page), strict=True)
            ground = luminance([alpha * a + (1 - alpha) * b for a, b in pairs])
            ink = luminance(channels(INK[theme].text))  # type: ignore[index]
            darker, lighter = sorted((ground, ink))
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5
