"""The form and the frames: no page, and mostly no model."""

import threading
from collections.abc import Generator
from typing import Any

import gradio as gr
import pytest

from spectr_demo.config import GenerationSettings
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.run import ColumnOutput, Step
from spectr_demo.routing.routers import parse_router
from spectr_demo.trace import RoutingTrace
from spectr_demo.ui.run import FRAME_SECONDS, Form, frames, gpu_seconds, model_steps
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
    assert threading.active_count() == before

    cut = frames(model_steps(routed_model), "hello", routers, settings, threading.Event())
    next(cut), next(cut)
    cut.close()
    assert threading.active_count() == before


def test_an_input_error_keeps_its_words(routed_model: SpectrModel) -> None:
    settings = GenerationSettings(max_new_tokens=10_000)
    routers = [parse_router("spectr", routed_model.library.names)]
    with pytest.raises(gr.Error, match="shorten one of them"):
        next(model_steps(routed_model)("hello", routers, settings))


def test_a_form_left_alone_gives_each_router_its_preset() -> None:
    form = Form(**FORM | {"columns": ["base", "single", "uniform", "arrow", "spectr-paper"]})
    expected = ["base", "single:sql", "uniform", "arrow", "spectr-paper"]
    assert form.routers(NAMES) == [parse_router(spec, NAMES) for spec in expected]
    assert form.settings() == GenerationSettings(max_new_tokens=16)


@pytest.mark.parametrize(
    ("choice", "field", "value"),
    [
        ({"top_k": 3}, "top_k", 3),
        ({"weighting": "softmax"}, "weighting", "softmax"),
        ({"composition": "outputs"}, "composition", "outputs"),
        ({"router_temperature": 0.5}, "temperature", 0.5),
    ],
)
def test_a_choice_reaches_the_routers(choice: dict[str, Any], field: str, value: Any) -> None:
    chosen = Form(**FORM | choice).routers(NAMES)[-1]
    preset = Form(**FORM).routers(NAMES)[-1]
    assert getattr(chosen, field) == value != getattr(preset, field)


def test_untouched_settings_are_each_routers_own() -> None:
    columns = ["spectr-context", "arrow", "spectr-paper"]
    assert Form(**FORM | {"columns": columns}).routers(NAMES) == [
        parse_router(name, NAMES) for name in columns
    ]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"columns": ["spectr"]}, "has 1 columns; it takes 2 to 6"),
        ({"columns": ["base"] * 7}, "has 7 columns"),
        ({"top_k": 9}, "only 4 experts"),
        ({"expert": "sq"}, "Did you mean 'sql'"),
        ({"router_temperature": -1.0}, "router temperature"),
    ],
)
def test_a_wrong_choice_says_what_is_wrong(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Form(**FORM | choice).routers(NAMES)


@pytest.mark.parametrize("choice", [{"temperature": -0.1}, {"seed": None}, {"max_new_tokens": 0}])
def test_wrong_generation_settings_are_refused(choice: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(choice))):
        Form(**FORM | choice).settings()


def test_a_longer_answer_asks_for_more_gpu_time() -> None:
    short, long = (gpu_seconds("", [], GenerationSettings(max_new_tokens=n)) for n in (8, 128))
    assert 10 < short < long < 60
