"""A column beside itself: what the form asks for, and what is told of the two."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from spectr_demo import ui
from spectr_demo.config import GenerationSettings, Intervention, RouterConfig
from spectr_demo.engine.model import SpectrModel
from spectr_demo.trace import Reading, RoutingTrace
from spectr_demo.ui import what_if
from spectr_demo.ui.run import Frame
from spectr_demo.ui.runner import Session
from tests.trace_samples import make_column, make_trace
from tests.ui.test_page import runner_of

BAN = {"expert": "red", "kind": "ban", "from_token": "", "layers": ""}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Intervention(kind="ban", expert="red")),
        ({"from_token": " 3 "}, Intervention(kind="ban", expert="red", from_token=3)),
        ({"layers": "12"}, Intervention(kind="ban", expert="red", layers=(12, 12))),
        ({"layers": "3 – 20"}, Intervention(kind="ban", expert="red", layers=(3, 20))),
    ],
)
def test_what_the_form_asks_for(changes: dict[str, str], expected: Intervention) -> None:
    assert what_if.intervention(**BAN | changes) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert": None}, "no expert is chosen"),
        ({"from_token": "-1"}, "from answer token '-1'"),
        ({"from_token": "1.5"}, "whole number"),
        ({"layers": "top"}, "in layers 'top'"),
        ({"layers": "5-3"}, "layers is"),
        ({"layers": "9" * 400}, "in layers '9999"),
        ({"kind": "kill"}, "intervention is 'kill'"),
    ],
)
def test_what_the_form_may_not_ask_for(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        what_if.intervention(**BAN | changes)


def test_a_token_of_a_lane_is_counted_in_its_own_answer() -> None:
    routed = np.zeros((8, 1, 1, 1)), np.ones((8, 1, 1, 1))
    reading = Reading(
        lanes=np.array([0, 1, 0, 0, 0, 1, 1, 1], np.int16),
        standing=np.zeros((2, 3), np.float32),
        certainty=np.zeros((2, 1, 3), np.float32),
    )
    plain = make_trace(make_column(*routed, num_prompt=2))
    lanes = make_trace(make_column(*routed, num_prompt=2, reading=reading))
    starts = [what_if.start_in_lane(plain, "spectr", t) for t in (1, 2, 7, 8)]
    assert starts == [None, 0, 5, None]
    starts = [what_if.start_in_lane(lanes, "spectr", t) for t in (1, 2, 4, 5, 7)]
    assert starts == [None, 0, 2, 0, 2]
    picked = what_if.picked(lanes, "spectr", json.dumps({"expert": "sql", "t": 7}))
    assert picked == ("sql", 2)
    assert what_if.picked(lanes, "spectr", json.dumps({"expert": "sql", "t": None}))[1] is None


def frame_of(one: Any, other: Any, texts: tuple[str, str], model: SpectrModel) -> Frame:
    """A frame of two columns with these (T, L, P, K) experts and token ids."""
    step = model.compare("hi", ["spectr", "spectr"], max_new_tokens=2)
    changed = RouterConfig(
        name="spectr", top_k=1, intervention=Intervention(kind="ban", expert="b", layers=(0, 1))
    )
    columns = [
        make_column(experts, np.ones(np.shape(experts)), label=label, token_ids=ids, num_prompt=1)
        for label, (experts, ids) in zip(("spectr", "spectr, ban b"), (one, other), strict=True)
    ]
    outputs = tuple(
        replace(column, label=label, text=text)
        for column, label, text in zip(
            step.columns, ("spectr", "spectr, ban b"), texts, strict=True
        )
    )
    return Frame(
        columns=outputs,
        routers=(replace(changed, intervention=None), changed),
        status="finished",
        trace=make_trace(*columns),
    )


def ids(*values: int) -> Any:
    return np.array(values, np.int32)


def experts(*by_token: tuple[int, int]) -> Any:
    """(T, 2, 1, 1) from the two layers' experts."""
    return np.array(by_token, np.int16)[:, :, None, None]


def test_what_is_told_of_two_that_part(routed_model: SpectrModel) -> None:
    one = experts((0, 1), (0, 1), (0, 1), (0, 1)), ids(5, 6, 7, 8)
    other = experts((0, 2), (0, 2), (2, 0), (0, 0)), ids(5, 6, 9, 8)
    frame = frame_of(one, other, ("a <b> c", "a <b> d"), routed_model)
    trace = frame.trace
    assert isinstance(trace, RoutingTrace)
    assert what_if.parting(trace) == 2
    told = what_if.drawn(frame)
    assert "Without <b>b</b>, in layers 0 to 1, the answer parts at answer token 1: " in told
    assert "“c” becomes “c”" in told  # `make_column` names tokens by their places
    assert "a &lt;b&gt; <del>c</del>" in told
    assert "a &lt;b&gt; <ins>d</ins>" in told
    # Before they part, two tokens, of which the upper layer gave both to another expert.
    assert "1 layer of 2 used another expert for some of the 2 tokens that both read alike" in told
    assert "<tr><td>1<td>2<td>" in told
    assert "The routing of the changed column" in told


def test_two_that_are_alike(routed_model: SpectrModel) -> None:
    same = experts((0, 1), (0, 1), (0, 1)), ids(5, 6, 7)
    frame = frame_of(same, same, ("a", "a"), routed_model)
    told = what_if.drawn(frame)
    assert "the answer stays the same" in told
    assert "No layer used another expert for any of the 3 tokens" in told
    assert "<del>" not in told and "<ins>" not in told
    assert "the end" in what_if.drawn(
        frame_of(same, (same[0][:2], same[1][:2]), ("a b", "a"), routed_model)
    )
    stopped = replace(frame, trace=None, status="stopped")
    assert "stopped before the first token" in what_if.drawn(stopped)
    assert "being written" in what_if.drawn(replace(frame, status="running"))


def test_a_column_runs_again_beside_itself(routed_model: SpectrModel) -> None:
    runner = runner_of(ui.build(routed_model))
    panel = runner.layout.what_if
    prompt, settings = "paint it red", GenerationSettings(max_new_tokens=8, temperature=1.5, seed=3)
    *_, step = routed_model.stream(prompt, ["base", "spectr"], settings, record=True)
    frame = Frame(columns=step.columns, routers=(), status="finished", trace=step.trace)
    now = Session(frame=frame, prompt=prompt)
    updates = list(runner.what_if(now, "spectr", **BAN | {"expert": "green"}))
    assert updates[0][panel.run]["interactive"] is False
    last = updates[-1]
    assert last[panel.run]["interactive"]
    assert not last[runner.layout.stop]["interactive"]
    names = routed_model.library.names
    config = RouterConfig(**step.trace.column("spectr").router)  # type: ignore[union-attr]
    changed = replace(config, intervention=Intervention(kind="ban", expert=names[1]))
    *_, expected = routed_model.stream(prompt, [config, changed], settings)
    assert expected.columns[0].text == step.columns[1].text, "the settings are those of the run"
    for column in expected.columns:
        assert (
            what_if.word_diff(*(c.text for c in expected.columns))[expected.columns.index(column)]
            in last[panel.answer]
        )


def test_a_wrong_form_is_a_message(routed_model: SpectrModel) -> None:
    runner = runner_of(ui.build(routed_model))
    step = routed_model.compare("hi", ["base", "spectr"], max_new_tokens=4)
    frame = Frame(columns=step.columns, routers=(), status="finished", trace=step.trace)
    for changes, message in (
        ({"layers": "0-7"}, "tiny has 0 to 1"),
        ({"expert": "grey"}, "unknown expert"),
        ({"from_token": "x"}, "whole number"),
    ):
        *_, last = runner.what_if(Session(frame=frame, prompt="hi"), "spectr", **BAN | changes)
        assert message in last[runner.layout.what_if.answer]
        assert last[runner.layout.what_if.run]["interactive"]
