"""The seam: a run in compiled code against the same run in torch."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from spectr_demo.config import RouterConfig
from spectr_demo.cpu import token as compiled
from spectr_demo.engine import token as seam
from spectr_demo.engine.layers import routed
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.plan import RoutingPlan
from spectr_demo.engine.recorder import Recorder
from spectr_demo.engine.run import Step
from spectr_demo.routing.routers import ROUTERS, parse_router
from spectr_demo.routing.spectr import spectr_scores

PROMPT = "every day at noon"
COLUMNS: list[list[str | RouterConfig]] = [
    *([key] for key in ROUTERS if key not in ("base", "single")),
    ["single:red"],
    [RouterConfig(name="lag", prefilter=2)],
    [RouterConfig(name="lag", prefilter=2, top_k=2)],
    [RouterConfig(name="uniform", composition="parameters")],
    [RouterConfig(name="spectr", top_k=2, composition="outputs", weighting="softmax")],
    [RouterConfig(name="arrow", calibrated=True)],
    ["base", "single:green"],
    ["base", "spectr"],
    ["spectr", "arrow", "spectr", "single:red"],
    ["base", "spectr-context", "single:red", "spectr-paper", "lag", "uniform", "norm", "arrow"],
]


def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "can_route", lambda x, y: False)


def assert_same(one: Step, other: Step) -> None:
    assert one.trace and other.trace
    assert [c.text for c in one.columns] == [c.text for c in other.columns]
    for a, b in zip(one.trace.columns, other.trace.columns, strict=True):
        assert np.array_equal(a.experts, b.experts)
        for name in ("weights", "scores", "logprob"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("columns", COLUMNS, ids=str)
def test_a_run_is_the_same_in_both(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch, columns: list[str | RouterConfig]
) -> None:
    monkeypatch.setattr(seam, "RECORDED_AT_ONCE", 3)  # filled once, and begun again
    in_compiled_code = routed_model.compare(PROMPT, columns, max_new_tokens=6)
    in_torch(monkeypatch)
    assert_same(in_compiled_code, routed_model.compare(PROMPT, columns, max_new_tokens=6))


@pytest.mark.parametrize("routers", [["spectr-paper"], ["arrow", "base", "arrow", "lag"]], ids=str)
def test_tokens_and_texts_are_recorded_in_the_order_of_reading(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch, routers: list[str]
) -> None:
    """A prompt, tokens with looks between them, more of a prompt, a token; memory is filled."""
    monkeypatch.setattr(seam, "RECORDED_AT_ONCE", 2)
    names, bank = routed_model.library.names, routed_model.library.banks[0]
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(len(routers), T, 64, generator=generator) for T in (5, 1, 1, 1, 1, 4, 1)]

    def choices() -> list[torch.Tensor]:
        recorder = Recorder()
        plan = RoutingPlan([parse_router(router, names) for router in routers], names, recorder)
        num_read = 0
        for x in parts:
            plan.begin_pass(torch.zeros(x.shape[:2], dtype=torch.long))
            for place, B in enumerate(bank.B):
                plan.add(torch.zeros(*x.shape[:2], B.shape[1]), bank, place, x)
            num_read += x.shape[1]
            if num_read in (7, 8):
                assert len(recorder.choices(bank, 0)[0]) == num_read
        rows = [row for row, router in enumerate(routers) if router != "base"]
        return [part for row in rows for part in recorder.choices(bank, row)]

    in_compiled_code = choices()
    in_torch(monkeypatch)
    for found, expected in zip(in_compiled_code, choices(), strict=True):
        assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_router_without_a_compiled_measure_is_left_to_torch(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new router is one function and one row; here SpectR's under another name."""
    row = replace(ROUTERS["spectr"], key="new", preset=RouterConfig(name="new", calibrated=True))
    monkeypatch.setitem(ROUTERS, "new", replace(row, score=twice_spectr, measure=None))
    monkeypatch.setattr(compiled, "route_and_add_at", pytest.fail)
    step = routed_model.compare(PROMPT, ["new"], max_new_tokens=4)
    monkeypatch.undo()
    expected = routed_model.compare(PROMPT, ["spectr-calibrated"], max_new_tokens=4)
    assert step.columns[0].text == expected.columns[0].text


def twice_spectr(
    z: torch.Tensor, singular_values: torch.Tensor, config: RouterConfig
) -> torch.Tensor:
    return 2 * spectr_scores(z, singular_values, config)


def test_a_run_leaves_nothing_behind(routed_model: SpectrModel) -> None:
    """Its tensors are freed with it, not when Python looks for circles."""
    names = routed_model.library.names
    recorder = Recorder()
    plan = RoutingPlan([parse_router("spectr", names)], names, recorder)
    with torch.inference_mode(), routed(plan):
        for ids in ([[5, 6, 7]], [[8]]):
            routed_model.model(torch.tensor(ids))
    assert len(recorder.choices(routed_model.library.banks[0], 0)[0]) == 4
    gone = weakref.ref(recorder)
    gc.disable()
    try:
        del plan, recorder
        assert gone() is None
    finally:
        gc.enable()
