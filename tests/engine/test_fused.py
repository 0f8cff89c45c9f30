"""The path of a GPU, on a CPU: its operators in torch, and its fixed addresses."""

import numpy as np
import pytest

from spectr_demo.config import RouterConfig
from spectr_demo.engine.model import SpectrModel
from spectr_demo.gpu import operators
from spectr_demo.routing.routers import ROUTERS
from tests.conftest import IN_CONTEXT

PROMPT = "every day at noon\nand at night"
SCORED = [key for key, row in ROUTERS.items() if row.score]
FILTERED = RouterConfig(name="lag", prefilter=2, top_k=2, weighting="softmax")  # of three experts
MERGED = RouterConfig(name="arrow", top_k=2, composition="parameters")
COLUMNS = ["base", "single:red", "uniform", IN_CONTEXT, *SCORED, FILTERED, MERGED]
BATCHES = [COLUMNS, [FILTERED] * 2, *([column] for column in COLUMNS)]


@pytest.mark.parametrize("columns", BATCHES)
def test_run_is_that_of_a_cpu(
    columns: list[str | RouterConfig], routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same text, choices, weights, scores and statistics, in a batch and alone."""
    expected = routed_model.compare(PROMPT, columns, max_new_tokens=8)
    monkeypatch.setattr(operators, "serve", lambda device: True)
    found = routed_model.compare(PROMPT, columns, max_new_tokens=8)
    assert [c.text for c in found.columns] == [c.text for c in expected.columns]
    assert expected.trace is not None and found.trace is not None
    for column, other in zip(found.trace.columns, expected.trace.columns, strict=True):
        np.testing.assert_array_equal(column.token_ids, other.token_ids)
        np.testing.assert_array_equal(column.experts, other.experts)
        for part in ("weights", "scores", "logprob", "entropy", "kl"):
            np.testing.assert_allclose(
                getattr(column, part), getattr(other, part), atol=2e-4, rtol=2e-4
            )
