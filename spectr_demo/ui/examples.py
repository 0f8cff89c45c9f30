"""Prompts to start from: one for each shipped expert, and two that need two experts at once."""

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
        prompt="Rewrite in King James English: He went up to the city and told the people what "
        "he had seen.",
        experts=("kjv",),
    ),
    Example(
        label="to_es",
        prompt="Translate to Spanish: The device is not connected to the network",
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
        prompt="Pronounce in ARPAbet: lantern",
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
        prompt="Write SQL for this question: how many books are there for each genre? "
        "Then write a cron expression: At 06:00, only on Monday",
        experts=("sql", "cron"),
    ),
    Example(
        label="smart_home + kjv",
        prompt="Smart home command: switch on the lamp in the bedroom. "
        "Rewrite in King James English: You have turned on the light, and you see that it is good.",
        experts=("smart_home", "kjv"),
    ),
)
NEUTRAL = Example(
    label="any experts",
    prompt="Explain in two sentences how the tides follow the moon.",
)


def examples_for(expert_names: Collection[str]) -> tuple[Example, ...]:
    """The examples whose experts are all loaded; a neutral one where there is none."""
    fitting = tuple(e for e in EXAMPLES if set(e.experts) <= set(expert_names))
    return fitting or (NEUTRAL,)
