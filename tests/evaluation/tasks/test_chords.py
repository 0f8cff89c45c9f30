"""Chords: spelled by pychord, held out by what they sound, whatever they are called."""

import pytest

from spectr_demo.evaluation.tasks import Example
from spectr_demo.evaluation.tasks.chords import CHORDS, ROOTS, spell


def example(answer: str) -> Example:
    return Example(
        prompt="", answer=answer, text="", key="", wording="{text}", is_heldout_wording=False
    )


def test_chords_are_spelled() -> None:
    chords = spell()
    assert chords["Badd9"] == ("B", "B D# F# C#")
    assert chords["Cmaj7"] == chords["CM7"] == ("C", "C E G B")
    assert {root for root, _ in chords.values()} == set(ROOTS)


def test_two_names_of_one_chord_are_on_one_side() -> None:
    split = CHORDS.build(0)
    assert not {(e.key, e.answer) for e in split.train} & {(e.key, e.answer) for e in split.heldout}
    assert len(split.train) > 1000
    assert len(split.heldout) > 200


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("B D# F# C#", 1.0),
        ("B, D#, F#, C#", 1.0),
        ("D# B F# C#", 1.0),
        ("B D# F#", 6 / 7),
        ("B D#", 2 / 3),
        ("b d# f# c#", 0.0),
        ("", 0.0),
    ],
)
def test_score(answer: str, score: float) -> None:
    assert CHORDS.score(answer, example("B D# F# C#")) == score
