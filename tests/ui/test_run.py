"""The form and the frames: no page, and mostly no model."""

import threading
from collections.abc import Generator
from typing import Any

import gradio as gr
import pytest
import torch

from spectr_demo.config import GenerationSettings
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.reading import Lane
from spectr_demo.engine.run import ColumnOutput, Step
from spectr_demo.engine.snapshot import Snapshot
from spectr_demo.routing.routers import parse_router
from spectr_demo.trace import RoutingTrace
from spectr_demo.ui.run import (
    FITTING,
    FRAME_SECONDS,
    Form,
    fitting_expert,
    frames,
    gpu_seconds,
    model_steps,
)
from tests.conftest import wait_until
from tests.trace_samples import sample_trace

NAMES = ("chat", "code", "math", "sql")
FORM = {
    "prompt": "hello",
    "columns": ["base", "single", "uniform", "spectr"],
    "expert": "sql",
    "top_k": 0,
    "weighting": "",
    "composition": "",
    "router_temperature": 0,
    "temperature": 0.0,
    "max_new_tokens": 16,
    "seed": 0,
}


class FakeSteps:
    """An engine that writes a letter a step, and says whether it was closed."""

    def __init__(self, num_steps: int, trace_at: int | None = None) -> None:
        self.num_steps, self.trace_at = num_steps, trace_at
        self.trace = sample_trace(40, num_layers=2)
        self.is_closed = False
        self.num_made = 0

    def __call__(self, prompt: str, routers: Any, settings: Any) -> Generator[Step, None, None]:
        try:
            for n in range(1, self.num_steps + 1):
                self.num_made = n
                is_last = n == self.num_steps
                column = ColumnOutput(
                    label="spectr",
                    text="x" * n,
                    num_settled=0,
                    num_tokens=n,
                    is_finished=is_last,
                    tokens_per_second=1.0,
                )
                has_trace = is_last or n == self.trace_at
                trace = self.trace if has_trace else None
                yield Step(columns=(column,), is_last=is_last, trace=trace)
        finally:
            self.is_closed = True


def run(steps: Any, stop: threading.Event | None = None, **kwargs: Any) -> Any:
    routers = [parse_router("spectr", NAMES)]
    stop = stop or threading.Event()
    return frames(steps, "hello", routers, GenerationSettings(), stop, **kwargs)


def ticking(seconds: float) -> Any:
    """A clock that moves on by some seconds every time it is read."""
    now = iter(range(1_000_000))
    return lambda: next(now) * seconds


def test_frames_wait_then_run_then_finish() -> None:
    shown = list(run(FakeSteps(5, trace_at=2), clock=ticking(1.0)))
    assert [frame.status for frame in shown] == ["waiting", *["running"] * 4, "finished"]
    assert [frame.columns[0].text for frame in shown] == ["", "x", "xx", "xxx", "xxxx", "xxxxx"]
    assert shown[0].columns[0].label == "spectr"


def test_a_partial_trace_stays_until_the_next_one() -> None:
    shown = list(run(FakeSteps(4, trace_at=2), clock=ticking(1.0)))
    assert [frame.trace is not None for frame in shown] == [False, False, True, True, True]


def test_frames_are_throttled_and_the_last_always_comes() -> None:
    # The clock is read once a step, and twice when a frame is shown: 0.02 s a reading.
    shown = list(run(FakeSteps(100), clock=ticking(FRAME_SECONDS / 4)))
    assert 100 / 5 <= len(shown) <= 100 / 3 + 2
    assert shown[-1].columns[0].num_tokens == 100


def test_stop_keeps_the_text_and_closes_the_engine() -> None:
    steps, stop = FakeSteps(1_000_000, trace_at=2), threading.Event()
    shown = []
    for frame in run(steps, stop, clock=ticking(1.0)):
        shown.append(frame)
        if frame.columns[0].num_tokens == 3:
            stop.set()
    assert shown[-1].status == "stopped"
    assert shown[-1].columns[0].text == "xxxx"
    assert shown[-1].trace is steps.trace
    assert steps.is_closed
    assert steps.num_made == 4


def test_closing_the_frames_closes_the_engine() -> None:
    steps = FakeSteps(1_000_000)
    shown = run(steps, clock=ticking(1.0))
    next(shown), next(shown)
    assert not steps.is_closed
    shown.close()
    assert steps.is_closed


def test_the_model_answers_and_leaves_no_thread(routed_model: SpectrModel) -> None:
    names = routed_model.library.names
    routers = [parse_router(name, names) for name in ("base", "single:red", "spectr")]
    settings = GenerationSettings(max_new_tokens=12, temperature=1.0)
    before = threading.active_count()
    shown = list(frames(model_steps(routed_model), "hello", routers, settings, threading.Event()))
    assert shown[-1].status == "finished"
    assert isinstance(shown[-1].trace, RoutingTrace)
    assert [c.label for c in shown[-1].columns] == ["base", "single:red", "spectr"]
    wait_until(lambda: threading.active_count() == before)

    cut = frames(model_steps(routed_model), "hello", routers, settings, threading.Event())
    next(cut), next(cut)
    cut.close()
    wait_until(lambda: threading.active_count() == before)


def test_an_input_error_keeps_its_words(routed_model: SpectrModel) -> None:
    settings = GenerationSettings(max_new_tokens=10_000)
    routers = [parse_router("spectr", routed_model.library.names)]
    with pytest.raises(gr.Error, match="shorten one of them"):
        next(model_steps(routed_model)("hello", routers, settings))


def test_a_form_left_alone_gives_each_router_its_preset() -> None:
    form = Form(**FORM | {"columns": ["base", "single", "uniform", "arrow", "spectr-paper"]})
    expected = ["base", "single:sql", "uniform", "arrow", "spectr-paper"]  # the table's order
    assert form.routers(NAMES) == [parse_router(spec, NAMES) for spec in expected]
    assert form.settings() == GenerationSettings(max_new_tokens=16)


@pytest.mark.parametrize(
    ("choice", "field", "value"),
    [
        ({"top_k": 3}, "top_k", 3),
        ({"weighting": "softmax"}, "weighting", "softmax"),
        ({"composition": "outputs"}, "composition", "outputs"),
        ({"weighting": "softmax", "router_temperature": 0.5}, "temperature", 0.5),
    ],
)
def test_a_choice_reaches_the_routers(choice: dict[str, Any], field: str, value: Any) -> None:
    form = FORM | {"columns": ["base", "spectr-paper"]}
    chosen = Form(**form | choice).routers(NAMES)[-1]
    preset = Form(**form).routers(NAMES)[-1]
    assert getattr(chosen, field) == value != getattr(preset, field)


def test_untouched_settings_are_each_routers_own() -> None:
    columns = ["arrow", "spectr-paper", "spectr-context"]
    assert Form(**FORM | {"columns": columns}).routers(NAMES) == [
        parse_router(name, NAMES) for name in columns
    ]


def test_columns_stand_in_the_order_of_the_table_whatever_was_ticked_first() -> None:
    ticked = ["spectr-context", "uniform", "single", "base"]
    routers = Form(**FORM | {"columns": ticked}).routers(NAMES)
    assert [r.name for r in routers] == ["base", "single", "uniform", "spectr-context"]


def test_a_router_temperature_is_set_only_where_it_does_something() -> None:
    columns = ["uniform", "arrow", "spectr", "spectr-paper"]
    form = Form(**FORM | {"columns": columns, "router_temperature": 0.5})
    assert [r.temperature for r in form.routers(NAMES)] == [1.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("choice", "columns", "what"),
    [
        ({"router_temperature": 0.5}, ["base", "spectr-paper"], "router temperature is 0.5"),
        ({"router_temperature": 0.5, "top_k": 1}, ["base", "arrow"], "router temperature"),
        ({"weighting": "softmax"}, ["base", "spectr"], "weights is softmax"),
        ({"composition": "outputs"}, ["base", "single", "spectr"], "composition is outputs"),
        ({"top_k": 2}, ["base", "uniform"], "experts at once"),
    ],
)
def test_a_setting_that_no_column_uses_is_refused(
    choice: dict[str, Any], columns: list[str], what: str
) -> None:
    form = FORM | {"columns": columns}
    Form(**form).routers(NAMES)
    with pytest.raises(ValueError, match=f"{what}.* none of the columns uses it"):
        Form(**form | choice).routers(NAMES)


@pytest.mark.parametrize("expert", ["", None])
def test_the_single_expert_is_the_one_that_fits(
    routed_model: SpectrModel, expert: str | None
) -> None:
    names = routed_model.library.names
    form = Form(**FORM | {"expert": expert, "columns": ["single", "base"]})
    assert form.routers(names) == [parse_router("base", names), FITTING]
    shown = list(
        frames(
            model_steps(routed_model),
            "hello",
            form.routers(names),
            form.settings(),
            threading.Event(),
        )
    )
    assert shown[0].routers[1] == FITTING
    choice = fitting_expert(routed_model, "hello")
    assert choice.expert in names
    assert shown[-1].routers[1] == parse_router(f"single:{choice.expert}", names)
    assert shown[-1].why == choice.why
    assert shown[-1].columns[1].label == f"single:{choice.expert}"


@pytest.mark.parametrize(
    ("experts", "chosen", "why"),
    [
        ([2], "blue", "the expert that fits"),
        ([None, 1, 2], "green", "the expert of request 2 of 3"),
        ([None], "green", "none stands out; this one is nearest"),
    ],
)
def test_the_choice_says_why(
    routed_model: SpectrModel,
    monkeypatch: pytest.MonkeyPatch,
    experts: list[int | None],
    chosen: str,
    why: str,
) -> None:
    def lane(expert: int | None) -> Lane:
        standing = torch.tensor([0.1, 0.3, 0.2]) if expert is None else torch.eye(3)[expert]
        weights = torch.zeros(3) if expert is None else torch.eye(3)[expert]
        return Lane(start=0, stop=1, ids=[0], weights=weights, standing=standing)

    monkeypatch.setattr(Snapshot, "lanes_of", lambda *asked: [list(map(lane, experts))])
    choice = fitting_expert(routed_model, "hello")
    assert (choice.expert, choice.why) == (chosen, why)
    assert len(choice.requests) == len(experts)


def test_without_experts_none_fits(build_model: Any) -> None:
    with pytest.raises(gr.Error, match="load at least one"):
        next(model_steps(build_model([]))("hello", [FITTING], GenerationSettings()))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"columns": ["spectr"]}, "has 1 column; it takes 2 to 6: tick more"),
        ({"columns": ["base"] * 7}, "has 7 columns"),
        ({"top_k": 9}, "only 4 experts"),
        ({"expert": "sq"}, "Did you mean 'sql'"),
        ({"router_temperature": -1.0, "weighting": "softmax", "top_k": 2}, "router temperature"),
        ({"top_k": 2.5}, "top_k is 2.5"),
    ],
)
def test_a_wrong_choice_says_what_is_wrong(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Form(**FORM | choice).routers(NAMES)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 8.5}, "max_new_tokens is 8.5; it must be a whole number"),
        ({"seed": 3.7}, "seed is 3.7; it must be a whole number"),
        ({"seed": -1}, "seed is -1"),
        # A field that was emptied
        ({"seed": None}, "seed: no number is given"),
        ({"temperature": None, "max_new_tokens": None}, "max_new_tokens, temperature: no number"),
    ],
)
def test_wrong_generation_settings_are_refused(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Form(**FORM | choice).settings()


def test_a_whole_number_may_come_with_a_point() -> None:
    settings = Form(**FORM | {"seed": 3.0, "max_new_tokens": 8.0}).settings()
    assert settings == GenerationSettings(max_new_tokens=8, seed=3)


def test_a_longer_answer_asks_for_more_gpu_time() -> None:
    short, long = (gpu_seconds("", [], GenerationSettings(max_new_tokens=n)) for n in (8, 128))
    assert 10 < short < long < 60
