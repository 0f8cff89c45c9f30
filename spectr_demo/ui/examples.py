"""Prompts to start from: one for each shipped expert, some that need several, one that needs none.

`tests/ui/test_examples.py` says what the shipped experts answer.
"""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt and the experts it needs, the first of which also fills the single-expert column."""

    label: str
    prompt: str
    experts: tuple[str, ...] = ()


EXAMPLES = (
    Example(
        label="sql",
        prompt="Translate to a SQL query: how many books are there for each genre?",
        experts=("sql",),
    ),
    Example(
        label="cron",
        prompt="Write a cron expression: At 07:30, Monday through Friday",
        experts=("cron",),
    ),
    Example(
        label="smart_home",
        prompt="Smart home command: turn off the lights in the kitchen",
        experts=("smart_home",),
    ),
    Example(
        label="kjv",
        prompt="Rewrite in King James English: You have seen that the light is good, and he has "
        "given it to you.",
        experts=("kjv",),
    ),
    Example(
        label="to_es",
        prompt="Translate to Spanish: The MQTT integration is not set up",
        experts=("to_es",),
    ),
    Example(
        label="sentiment",
        prompt="Positive or negative? A slow film that never finds its story, and two hours lost.",
        experts=("sentiment",),
    ),
    Example(
        label="category",
        prompt="What kind of thing is this? a small bird with a red breast",
        experts=("category",),
    ),
    Example(
        label="arpabet",
        prompt="Pronounce in ARPAbet: flotsam",
        experts=("arpabet",),
    ),
    Example(
        label="chords",
        prompt="Which notes are in the chord Ebmaj7?",
        experts=("chords",),
    ),
    Example(
        label="icd10",
        prompt="ICD-10 chapter: Acute inflammation of the middle ear",
        experts=("icd10",),
    ),
    Example(
        label="sql + cron",
        prompt="Write SQL for this question: how many books are there for each genre?\n"
        "Write a cron expression: At 06:00, only on Monday",
        experts=("sql", "cron"),
    ),
    Example(
        label="cron + to_es",
        prompt="1. Write a cron expression: At 13:30, only on Friday\n"
        "2. Translate to Spanish: The MQTT integration is not set up",
        experts=("cron", "to_es"),
    ),
    Example(
        label="chords + arpabet",
        prompt="Which notes are in the chord Gmaj7? Then pronounce in ARPAbet: flotsam",
        experts=("chords", "arpabet"),
    ),
    Example(
        label="smart_home + cron",
        prompt="Turn off the lights in the kitchen, and then write a cron expression: At 23:15, "
        "Monday through Friday",
        experts=("smart_home", "cron"),
    ),
    Example(
        label="sql + chords + cron",
        prompt="- Turn this into SQL: how many students have major biology?\n"
        "- Which notes are in the chord Ebmaj7?\n"
        "- Write a cron expression: At 06:00, only on Monday",
        experts=("sql", "chords", "cron"),
    ),
    Example(label="no expert", prompt="What is the capital of France?"),
)


def examples_for(expert_names: Collection[str]) -> tuple[Example, ...]:
    """The examples whose experts are all loaded."""
    return tuple(e for e in EXAMPLES if set(e.experts) <= set(expert_names))
