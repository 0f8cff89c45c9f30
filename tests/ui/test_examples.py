"""The examples fit the experts that are loaded."""

from pathlib import Path

from spectr_demo.config import shipped_experts
from spectr_demo.ui.examples import EXAMPLES, example_of, examples_for

SHIPPED = tuple(Path(folder).name for folder in shipped_experts())
SHOWN = 60  # characters of a title that Gradio shows


def test_each_shipped_expert_has_an_example_and_some_need_several_or_none() -> None:
    shown = examples_for(SHIPPED)
    assert shown == EXAMPLES
    assert {e.experts[0] for e in shown if len(e.requests) == len(e.experts) == 1} == set(SHIPPED)
    assert {len(e.experts) for e in shown} == {0, 1, 2, 3}
    assert len({e.key for e in shown}) == len({e.prompt for e in shown}) == len(shown) >= 8


def test_titles_are_sentences_that_fit() -> None:
    for example in EXAMPLES:
        assert len(example.title) <= SHOWN
        assert {"→", ":"} & set(example.title), "it says what is asked, not a name"
        assert len(example.title.split()) > 2


def test_what_is_asked_about_stands_in_the_prompt() -> None:
    for example in EXAMPLES:
        places = [example.prompt.lower().find(r.text.lower()) for r in example.requests]
        assert -1 not in places
        assert places == sorted(places)


def test_only_examples_whose_experts_are_loaded_are_shown() -> None:
    loaded = ["sql", "cron", "poetry"]
    assert {e.key for e in examples_for(loaded)} == {"sql", "cron", "sql-cron", "france"}
    assert [e.key for e in examples_for(["poetry"])] == ["france"]
    assert [e.key for e in examples_for([])] == ["france"]


def test_an_example_is_known_by_its_prompt() -> None:
    assert example_of(EXAMPLES[3].prompt + "\n") == EXAMPLES[3]
    assert example_of("hello") is None
    assert example_of("") is None
