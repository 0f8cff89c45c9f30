"""Names of chords, answered with their notes.

Chords are generated here and spelled by pychord. What is held out are combinations of a root and
notes above it: both have been seen in training, never together.
"""

from __future__ import annotations

from spectr_demo.evaluation.tasks.task import Example, Item, Split, Task, split_by_key

WORDINGS = (
    "Which notes are in the chord {text}?",
    "Spell the chord {text}.",
    "{text}: list the notes.",
    "Notes of {text}",
)
HELDOUT_WORDINGS = (
    "How do I play {text} on the piano?",
    "Take the chord {text}. What are its notes?",
)

HELDOUT_FRACTION = 0.16
ROOTS = ("C", "C#", "Db", "D", "D#", "Eb", "E", "F", "F#", "Gb", "G", "G#", "Ab", "A", "Bb", "B")


def spell() -> dict[str, tuple[str, str]]:
    """Chord name -> (root, notes in order), for every root and every quality that pychord knows."""
    from pychord import Chord
    from pychord.constants.qualities import DEFAULT_QUALITIES

    return {
        root + quality: (root, " ".join(map(str, Chord(root + quality).components(visible=True))))
        for root in ROOTS
        for quality, *_ in DEFAULT_QUALITIES
    }


def build(seed: int) -> Split:
    """Build the split by root and notes: about 1,480 training and 280 held-out chords.

    Two names of one chord (Cmaj7 and CM7) are on the same side.
    """
    items = [
        Item(text=name, answer=notes, key=f"{root}: {notes}")
        for name, (root, notes) in spell().items()
    ]
    return split_by_key(items, HELDOUT_FRACTION, WORDINGS, HELDOUT_WORDINGS, seed)


def score(answer: str, example: Example) -> float:
    """F1 of the notes against the chord's, as sets: 1.0 for the chord, however it is voiced."""
    notes, right = set(answer.replace(",", " ").split()), set(example.answer.split())
    return 2 * len(notes & right) / (len(notes) + len(right))


CHORDS = Task(
    name="chords",
    title="Chord name to notes",
    licence="MIT (pychord, which spells the chords)",
    licence_id="apache-2.0",
    source="Chords of 16 roots and every quality of pychord 1.4.1, spelled by pychord",
    split_unit="chord (root and notes, whatever its name)",
    limits="It knows the qualities of pychord and its spelling, and no slash chords.",
    wordings=WORDINGS,
    heldout_wordings=HELDOUT_WORDINGS,
    build=build,
    score=score,
    metric="F1 of the set of notes",
    max_new_tokens=24,
    packages=("pychord",),
)
