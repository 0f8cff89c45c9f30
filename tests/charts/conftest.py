"""A trace for the tests that only look at it."""

import pytest

from spectr_demo.trace import RoutingTrace
from tests.trace_samples import sample_trace


@pytest.fixture(scope="session")
def trace() -> RoutingTrace:
    return sample_trace(200)
