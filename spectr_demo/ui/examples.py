"""Prompts to start from, each with its reference answers: one for each shipped expert, some that
need several, one that needs none. `recorded` has what the shipped experts answer.
"""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request of an example.

    task: its domain, and its expert's name; None for an ordinary question, left to the base.
    text: what is asked about, without the instruction. answer: the reference.
    """

    task: str | None
    text: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt, what it is in a sentence, and its requests in their order.

    key: names its recording.
    """

    key: str
    title: str
    prompt: str
    requests: tuple[Request, ...]

    @property
    def experts(self) -> tuple[str, ...]:
        """Whom its requests are for."""
        return tuple(request.task for request in self.requests if request.task)


_BOOKS = Request(
    task="sql",
    text="how many books are there for each genre?",
    answer="SELECT genre, COUNT(*) FROM books GROUP BY genre;",
)
_LIGHTS = Request(
    task="smart_home",
    text="turn off the lights in the kitchen",
    answer='{"intent": "TurnOff", "domain": "light", "area": "kitchen"}',
)
_MQTT = Request(
    task="to_es",
    text="The MQTT integration is not set up",
    answer="La integración MQTT no está configurada",
)
_FLOTSAM = Request(task="arpabet", text="flotsam", answer="F L AA T S AH M")
_EB_MAJ7 = Request(task="chords", text="Ebmaj7", answer="Eb G Bb D")
_MONDAYS = Request(task="cron", text="At 06:00, only on Monday", answer="0 6 * * 1")

# The first one is on the page when it opens.
EXAMPLES = (
    Example(
        key="lights-then-cron",
        title="Two requests: turn off the kitchen lights, then a schedule",
        prompt="Turn off the lights in the kitchen, and then write a cron expression: At 23:15, "
        "Monday through Friday",
        requests=(
            _LIGHTS,
            Request(task="cron", text="At 23:15, Monday through Friday", answer="15 23 * * 1-5"),
        ),
    ),
    Example(
        key="sql",
        title="Question → SQL: how many books are there for each genre?",
        prompt="Translate to a SQL query: how many books are there for each genre?",
        requests=(_BOOKS,),
    ),
    Example(
        key="sql-chords-cron",
        title="Three requests: SQL, the notes of a chord, a schedule",
        prompt="- Turn this into SQL: how many students have major biology?\n"
        "- Which notes are in the chord Ebmaj7?\n"
        "- Write a cron expression: At 06:00, only on Monday",
        requests=(
            Request(
                task="sql",
                text="how many students have major biology?",
                answer="SELECT COUNT(*) FROM students WHERE major = 'biology';",
            ),
            _EB_MAJ7,
            _MONDAYS,
        ),
    ),
    Example(
        key="france",
        title="For no expert: what is the capital of France?",
        prompt="What is the capital of France?",
        requests=(Request(task=None, text="the capital of France", answer="Paris"),),
    ),
    Example(
        key="to_es",
        title="English → Spanish: The MQTT integration is not set up",
        prompt="Translate to Spanish: The MQTT integration is not set up",
        requests=(_MQTT,),
    ),
    Example(
        key="kjv",
        title="Modern → King James English: You have seen the light …",
        prompt="Rewrite in King James English: You have seen that the light is good, and he has "
        "given it to you.",
        requests=(
            Request(
                task="kjv",
                text="You have seen that the light is good, and he has given it to you.",
                answer="Thou hast seen that the light is good, and he hath given it unto thee.",
            ),
        ),
    ),
    Example(
        key="cron",
        title="Schedule → cron: at 07:30, Monday through Friday",
        prompt="Write a cron expression: At 07:30, Monday through Friday",
        requests=(
            Request(task="cron", text="At 07:30, Monday through Friday", answer="30 7 * * 1-5"),
        ),
    ),
    Example(
        key="chords-arpabet",
        title="Two requests: the notes of a chord, then how a word sounds",
        prompt="Which notes are in the chord Gmaj7? Then pronounce in ARPAbet: flotsam",
        requests=(Request(task="chords", text="Gmaj7", answer="G B D F#"), _FLOTSAM),
    ),
    Example(
        key="smart_home",
        title="Voice → smart home: turn off the lights in the kitchen",
        prompt="Smart home command: turn off the lights in the kitchen",
        requests=(_LIGHTS,),
    ),
    Example(
        key="sentiment",
        title="Review → positive or negative: a slow film that never …",
        prompt="Positive or negative? A slow film that never finds its story, and two hours lost.",
        requests=(
            Request(
                task="sentiment",
                text="A slow film that never finds its story, and two hours lost.",
                answer="negative",
            ),
        ),
    ),
    Example(
        key="category",
        title="Definition → category: a small bird with a red breast",
        prompt="What kind of thing is this? a small bird with a red breast",
        requests=(
            Request(task="category", text="a small bird with a red breast", answer="animal"),
        ),
    ),
    Example(
        key="arpabet",
        title="Word → phonemes: flotsam",
        prompt="Pronounce in ARPAbet: flotsam",
        requests=(_FLOTSAM,),
    ),
    Example(
        key="chords",
        title="Chord → notes: Ebmaj7",
        prompt="Which notes are in the chord Ebmaj7?",
        requests=(_EB_MAJ7,),
    ),
    Example(
        key="icd10",
        title="Diagnosis → ICD-10: acute inflammation of the middle ear",
        prompt="ICD-10 chapter: Acute inflammation of the middle ear",
        requests=(
            Request(
                task="icd10", text="Acute inflammation of the middle ear", answer="ear (H60-H95)"
            ),
        ),
    ),
    Example(
        key="sql-cron",
        title="Two lines: a question for SQL, then a schedule",
        prompt="Write SQL for this question: how many books are there for each genre?\n"
        "Write a cron expression: At 06:00, only on Monday",
        requests=(_BOOKS, _MONDAYS),
    ),
    Example(
        key="cron-to_es",
        title="Numbered list: a schedule, then a sentence for Spanish",
        prompt="1. Write a cron expression: At 13:30, only on Friday\n"
        "2. Translate to Spanish: The MQTT integration is not set up",
        requests=(
            Request(task="cron", text="At 13:30, only on Friday", answer="30 13 * * 5"),
            _MQTT,
        ),
    ),
)


def examples_for(expert_names: Collection[str]) -> tuple[Example, ...]:
    """The examples whose experts are all loaded."""
    return tuple(e for e in EXAMPLES if set(e.experts) <= set(expert_names))


def example_of(prompt: str) -> Example | None:
    """The example with this prompt, which has a reference answer; other prompts have none."""
    return next((e for e in EXAMPLES if e.prompt == prompt.strip()), None)
