"""The path of a GPU, on a CPU: its operators in torch, and its fixed addresses."""

from typing import Any

import numpy as np
import pytest
from transformers import MistralConfig, MistralForCausalLM

from spectr_demo.config import RouterConfig
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.static import TokenStep, static_cache
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


def test_a_base_without_a_place_for_each_token_has_a_cache_that_grows(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is spread over devices, and one whose windows are shorter than the text."""
    model = routed_model.model
    assert static_cache(model, 20) is not None
    monkeypatch.setattr(model, "hf_device_map", {"a": 0, "b": "cpu"}, raising=False)
    assert static_cache(model, 20) is None
    config = MistralConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=16,
        sliding_window=8,
    )
    windowed = MistralForCausalLM(config).eval()
    assert static_cache(windowed, 9) is None
    assert static_cache(windowed, 8) is not None


def test_a_step_that_cannot_be_captured_is_read_as_usual(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record has its token once."""
    expected = routed_model.compare(PROMPT, ["spectr"], max_new_tokens=6)
    monkeypatch.setattr(operators, "serve", lambda device: True)

    def call(self: TokenStep, **inputs: Any) -> Any:
        is_first = not self._inputs
        if not is_first and not self._has_failed:
            assert self._plan.recorder is not None
            self._plan.begin_pass(inputs["input_ids"])  # as the hooks do while it is captured
            self._plan.recorder.forget_token()
            self._has_failed = True
        return read(self, **inputs)

    read = TokenStep.__call__
    monkeypatch.setattr(TokenStep, "__call__", call)
    found = routed_model.compare(PROMPT, ["spectr"], max_new_tokens=6)
    assert found.columns[0].text == expected.columns[0].text
    assert found.trace is not None and expected.trace is not None
    np.testing.assert_array_equal(found.trace.columns[0].experts, expected.trace.columns[0].experts)
