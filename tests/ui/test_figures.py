"""The files to take away."""

import re
from pathlib import Path

import numpy as np
import pytest

from spectr_demo.trace import RoutingTrace
from spectr_demo.ui import figures
from tests.trace_samples import sample_trace


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return sample_trace(80, num_layers=3)


def test_the_views_file_needs_no_network(trace: RoutingTrace, tmp_path: Path) -> None:
    path = figures.views_file(trace, "what is <b>this</b>?", str(tmp_path))
    page = Path(path).read_text(encoding="utf-8")
    assert Path(path).is_relative_to(tmp_path)
    assert "&lt;b&gt;this" in page
    for label in trace.labels:
        assert f'data-column="{label}"' in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    assert len(page) < 400_000


def test_the_trace_file_is_the_trace(trace: RoutingTrace, tmp_path: Path) -> None:
    loaded = RoutingTrace.load(figures.trace_file(trace, str(tmp_path)))
    assert loaded.labels == trace.labels
    np.testing.assert_array_equal(loaded.column("spectr").experts, trace.column("spectr").experts)
