"""The examples fit the experts that are loaded, and the shipped ones answer them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from spectr_demo.config import DEFAULT_ROUTER, PAGE_COLUMNS, shipped_experts
from spectr_demo.engine.model import SpectrModel, load
from spectr_demo.routing.routers import parse_router
from spectr_demo.ui import cards
from spectr_demo.ui.examples import EXAMPLES, examples_for
from spectr_demo.ui.run import Frame

SHIPPED = tuple(Path(folder).name for folder in shipped_experts())
ANSWERS = {
    "sql": "SELECT genre, COUNT(*) FROM books GROUP BY genre;",
    "cron": "30 7 * * 1-5",
    "smart_home": '{"intent": "TurnOff", "domain": "light", "area": "kitchen"}',
    "kjv": "Thou hast seen that the light is good, and he hath given it unto thee.",
    "to_es": "La integración MQTT no está configurada",
    "sentiment": "negative",
    "category": "animal",
    "arpabet": "F L AA T S AH M",
    "chords": "Eb G Bb D",
    "icd10": "ear (H60-H95)",
    "sql + cron": "SELECT genre, COUNT(*) FROM books GROUP BY genre;\n0 6 * * 1",
    "cron + to_es": "30 13 * * 5\nLa integración MQTT no está configurada",
    "chords + arpabet": "G B D F#\nF L AA T S AH M",
    "smart_home + cron": '{"intent": "TurnOff", "domain": "light", "area": "kitchen"}\n'
    "15 23 * * 1-5",
    "sql + chords + cron": "SELECT COUNT(*) FROM students WHERE major = 'biology';\n"
    "Eb G Bb D\n0 6 * * 1",
}
ORDINARY = ("hello", "What is the capital of France?", "Who wrote Hamlet?")


def test_each_shipped_expert_has_an_example_and_some_need_several_or_none() -> None:
    shown = examples_for(SHIPPED)
    assert shown == EXAMPLES
    assert {e.experts[0] for e in shown if len(e.experts) == 1} == set(SHIPPED)
    assert {len(e.experts) for e in shown} == {0, 1, 2, 3}
    assert {e.label for e in shown if e.experts} == set(ANSWERS)
    assert {e.prompt for e in shown if not e.experts} <= set(ORDINARY)


def test_only_examples_whose_experts_are_loaded_are_shown() -> None:
    assert [e.label for e in examples_for(["sql", "cron", "poetry"])] == [
        "sql",
        "cron",
        "sql + cron",
        "no expert",
    ]


def test_other_experts_get_the_example_without_one() -> None:
    assert [e.label for e in examples_for(["poetry"])] == ["no expert"]
    assert [e.label for e in examples_for([])] == ["no expert"]


@pytest.fixture(scope="module")
def shipped() -> Iterator[SpectrModel]:
    model = load()
    yield model
    model.detach()


def run(model: SpectrModel, prompt: str, *columns: str) -> Frame:
    """A run's last frame. Columns share a batch, whose size decides how a CPU rounds."""
    step = model.compare(prompt, columns, max_new_tokens=48)
    routers = tuple(parse_router(column, model.library.names) for column in columns)
    return Frame(columns=step.columns, routers=routers, status="finished", trace=step.trace)


@pytest.mark.slow
@pytest.mark.embedded
def test_the_default_router_answers_each_example(shipped: SpectrModel) -> None:
    wrong = []
    for example in EXAMPLES:
        if not example.experts:
            continue
        single = f"single:{example.experts[0]}"
        frame = run(shipped, example.prompt, single, *PAGE_COLUMNS[1:])
        (answer,) = (c.text for c in frame.columns if c.label == DEFAULT_ROUTER)
        card = cards.answers(frame, SHIPPED)
        named = [name for name in SHIPPED if f"<b>{name}</b>" in card]
        if answer != ANSWERS[example.label] or set(named) != set(example.experts):
            wrong.append((example.label, named, answer))
    assert not wrong


@pytest.mark.slow
@pytest.mark.embedded
@pytest.mark.parametrize("prompt", ORDINARY)
def test_an_ordinary_prompt_is_answered_as_the_base_answers(
    shipped: SpectrModel, prompt: str
) -> None:
    frame = run(shipped, prompt, "base", DEFAULT_ROUTER)
    base, answer = (column.text for column in frame.columns)
    assert answer == base != ""
    assert "No expert stands out; the base answers" in cards.answers(frame, SHIPPED)
