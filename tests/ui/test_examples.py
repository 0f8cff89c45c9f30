"""The examples fit the experts that are loaded."""

from pathlib import Path

from spectr_demo.config import shipped_experts
from spectr_demo.ui.examples import EXAMPLES, NEUTRAL, examples_for

SHIPPED = tuple(Path(folder).name for folder in shipped_experts())


def test_each_shipped_expert_has_an_example_and_two_need_two() -> None:
    shown = examples_for(SHIPPED)
    assert shown == EXAMPLES
    assert {e.experts[0] for e in shown if len(e.experts) == 1} == set(SHIPPED)
    assert sum(len(e.experts) == 2 for e in shown) == 2


def test_only_examples_whose_experts_are_loaded_are_shown() -> None:
    assert [e.label for e in examples_for(["sql", "cron", "poetry"])] == [
        "sql",
        "cron",
        "sql + cron",
    ]


def test_other_experts_get_a_neutral_example() -> None:
    assert examples_for(["poetry"]) == (NEUTRAL,)
    assert examples_for([]) == (NEUTRAL,)
