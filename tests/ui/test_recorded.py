"""Recorded runs: what a file keeps, whose they are, and what the shipped model says today."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spectr_demo.config import DEFAULT_ROUTER, PAGE_COLUMNS, shipped_experts
from spectr_demo.engine.model import SpectrModel, load
from spectr_demo.experts.adapters import read_adapter
from spectr_demo.trace import RoutingTrace
from spectr_demo.ui import cards, recorded
from spectr_demo.ui.examples import EXAMPLES, Example
from spectr_demo.ui.grades import grade, overall
from spectr_demo.ui.recorded import FOLDER, SETTINGS, Recording
from tests.trace_samples import sample_trace
from tests.ui.conftest import FRANCE

ORDINARY = ("hello", "What is the capital of France?", "Who wrote Hamlet?")
# A text may change where bfloat16 rounds otherwise: other kernels, or other neighbours.
MAY_CHANGE = 0.1


def recording_of(example: Example) -> Recording:
    return recorded.load(FOLDER / f"{example.key}.npz")


@pytest.fixture(scope="module")
def shipped_hashes() -> dict[str, str]:
    adapters = map(read_adapter, shipped_experts())
    return {adapter.name: adapter.sha256 for adapter in adapters}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.key)
def test_each_example_has_a_recording_of_the_shipped_experts(
    example: Example, shipped_hashes: dict[str, str]
) -> None:
    recording = recording_of(example)
    assert recording.trace.meta["experts"] == shipped_hashes, (
        "the experts have changed: run python scripts/record_examples.py"
    )
    assert [router.name for router in recording.frame.routers] == list(PAGE_COLUMNS)
    assert recording.settings == SETTINGS
    assert all(column.is_finished for column in recording.frame.columns)
    fitting = recording.frame.routers[1].expert
    assert fitting == (example.experts or (fitting,))[0]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.key)
def test_the_default_router_answers_each_example(example: Example) -> None:
    frame = recording_of(example).frame
    (answer,) = (c.text for c in frame.columns if c.label == DEFAULT_ROUTER)
    assert overall(grade(example, answer)) == "right"
    assert frame.trace is not None
    card = cards.answers(frame, frame.trace.expert_names, example.prompt)
    named = {name for name in frame.trace.expert_names if f"<b>{name}</b>" in card}
    assert named == set(example.experts)
    assert ("the base answers" in card) == (not example.experts)


def test_the_recordings_are_small_and_all_are_shown() -> None:
    files = sorted(FOLDER.glob("*"))
    assert {file.stem for file in files} == {example.key for example in EXAMPLES}
    assert sum(file.stat().st_size for file in files) < 3_000_000


def test_a_recording_keeps_the_run(recording: Recording, routed_model: SpectrModel) -> None:
    again = recorded.record(FRANCE, routed_model, date="", commit="")
    assert recording.frame.routers == again.frame.routers
    assert recording.frame.why == again.frame.why != ""
    assert recording.frame.columns == again.frame.columns
    assert {column.tokens_per_second for column in recording.frame.columns} == {0.0}
    step = routed_model.compare(FRANCE.prompt, recording.frame.routers, **SETTINGS.to_json())
    assert [c.text for c in step.columns] == [c.text for c in recording.frame.columns]
    assert step.trace is not None
    for label in step.trace.labels:
        full, kept = step.trace.column(label), recording.trace.column(label)
        np.testing.assert_array_equal(kept.experts, full.experts)
        np.testing.assert_array_equal(kept.weights, full.weights)
        np.testing.assert_array_equal(kept.kl, full.kl)
        np.testing.assert_allclose(kept.scores, full.scores, rtol=2**-8)
    scores = recording.trace.column("spectr-paper").scores
    assert not (np.ascontiguousarray(scores).view(np.uint32) & 0xFFFF).any()


def test_a_recording_is_of_one_base_and_its_experts(
    recording: Recording, routed_model: SpectrModel
) -> None:
    assert recorded.find(FRANCE, routed_model) is recording
    assert recorded.find(EXAMPLES[0], routed_model) is None  # not recorded
    base, library = routed_model.base, routed_model.library
    routed_model.base = replace(base, fingerprint="another")
    assert recorded.find(FRANCE, routed_model) is None
    routed_model.base = base
    for adapters in (
        library.adapters[1:],
        (replace(library.adapters[0], sha256="another"), *library.adapters[1:]),
    ):
        other = replace(library, adapters=adapters)
        routed_model.snapshot = replace(routed_model.snapshot, library=other)
        assert recorded.find(FRANCE, routed_model) is None


def test_a_trace_alone_is_no_recording(tmp_path: Path) -> None:
    trace: RoutingTrace = sample_trace(20, num_layers=2)
    trace.save(tmp_path / "trace.npz")
    with pytest.raises(ValueError, match="the trace has no answers"):
        recorded.load(tmp_path / "trace.npz")


@pytest.fixture(scope="module")
def shipped() -> Iterator[SpectrModel]:
    model = load(experts=shipped_experts())
    yield model
    model.detach()


@pytest.mark.slow
@pytest.mark.embedded
def test_the_recordings_are_what_the_model_says(shipped: SpectrModel) -> None:
    num, changed = 0, []
    for example in EXAMPLES:
        old = recorded.find(example, shipped)
        assert old is not None
        new = recorded.record(example, shipped, date="", commit="")
        assert [r.name for r in new.frame.routers] == [r.name for r in old.frame.routers]
        # A base without an expert is nearest to some expert; which one may be close.
        assert new.frame.routers == old.frame.routers or not example.experts
        for then, now in zip(old.frame.columns, new.frame.columns, strict=True):
            num += 1
            if then.text != now.text or then.label != now.label:
                changed.append((example.key, now.label, then.text, now.text))
                continue
            np.testing.assert_allclose(
                new.trace.share(now.label, "answer"),
                old.trace.share(now.label, "answer"),
                atol=0.02,
                err_msg=f"{example.key}, {now.label}",
            )
        (answer,) = (c.text for c in new.frame.columns if c.label == DEFAULT_ROUTER)
        assert overall(grade(example, answer)) == "right", example.key
    assert len(changed) <= MAY_CHANGE * num, changed


@pytest.mark.slow
@pytest.mark.embedded
@pytest.mark.parametrize("prompt", ORDINARY)
def test_an_ordinary_prompt_is_answered_as_the_base_answers(
    shipped: SpectrModel, prompt: str
) -> None:
    example = replace(FRANCE, prompt=prompt)
    frame = recorded.record(example, shipped, date="", commit="").frame
    by_label = {column.label: column.text for column in frame.columns}
    assert by_label[DEFAULT_ROUTER] == by_label["base"] != ""
    assert frame.why == "none stands out; this one is nearest"
    assert "No expert stands out; the base answers" in cards.answers(frame, shipped.library.names)
