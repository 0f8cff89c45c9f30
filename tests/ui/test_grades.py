"""Grades: each request by its own task."""

import pytest

from spectr_demo.ui.examples import EXAMPLES, Example
from spectr_demo.ui.grades import grade, overall

BY_KEY = {example.key: example for example in EXAMPLES}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.key)
def test_references_are_right_and_neither_silence_nor_an_echo_is(example: Example) -> None:
    reference = "\n".join(request.answer for request in example.requests)
    grades = grade(example, reference)
    assert [each.score for each in grades] == [1.0] * len(example.requests)
    assert overall(grades) == "right"
    for text in ("", example.prompt, example.requests[0].text):
        assert overall(grade(example, text)) == "wrong", text


@pytest.mark.parametrize(
    ("key", "text", "verdict", "score"),
    [
        # F1 of three of four notes: 2 * 3 / (3 + 4)
        ("chords", "Eb G Bb", "partly right", 6 / 7),
        ("chords", "D Bb G Eb", "right", 1),
        ("chords", "Eb A", "wrong", 2 / 6),
        ("arpabet", "F L AA T S AH N", "partly right", 6 / 7),
        ("sql", "SELECT genre, COUNT(genre) FROM books GROUP BY genre", "right", 1),
        ("cron", "30 07 * * MON-FRI", "right", 1),
        ("cron", "30 7 * * *", "wrong", 0),
        ("france", "The capital of France is Paris.", "right", 1),
        ("france", "Parisian cafés", "wrong", 0),
    ],
)
def test_the_tasks_scorer_decides(key: str, text: str, verdict: str, score: float) -> None:
    (found,) = grade(BY_KEY[key], text)
    assert found.verdict == verdict
    assert found.score == pytest.approx(score)


def test_what_the_prompt_has_already_is_no_part_of_an_answer() -> None:
    kjv = BY_KEY["kjv"]
    (echo,) = grade(kjv, kjv.requests[0].text)
    assert echo.score > 0.5  # half of the letters are the same
    assert echo.verdict == "wrong"
    (near,) = grade(kjv, kjv.requests[0].answer.replace("unto thee", "to you"))
    assert near.verdict == "partly right"


@pytest.mark.parametrize(
    ("text", "verdicts"),
    [
        ("G B D F#\nF L AA T S AH M", ["right", "right"]),
        ("1. G B D F#\n\n2. F L AA T S AH M\nand more", ["right", "right"]),
        ("F L AA T S AH M\nG B D F#", ["wrong", "wrong"]),
        ("G B D F#", ["right", "wrong"]),
        ("G B D\nF L AA T S AH M", ["partly right", "right"]),
    ],
)
def test_each_line_is_graded_by_its_own_task(text: str, verdicts: list[str]) -> None:
    grades = grade(BY_KEY["chords-arpabet"], text)
    assert [each.verdict for each in grades] == verdicts
    assert overall(grades) == (verdicts[0] if len(set(verdicts)) == 1 else "partly right")
