"""Whether a column answered an example: each request by its own task's scorer."""

import re
from dataclasses import dataclass
from typing import Literal

from spectr_demo.evaluation import tasks
from spectr_demo.evaluation.composition import part_score, split_answer
from spectr_demo.ui.examples import Example, Request

Verdict = Literal["right", "partly right", "wrong"]
# Half of the score is the least that counts as a part of an answer.
_PARTLY = 0.5


@dataclass(frozen=True, kw_only=True)
class Grade:
    """One request's answer. score: in [0, 1]. metric: what it measures, in a few words."""

    request: Request
    score: float
    metric: str
    verdict: Verdict


def grade(example: Example, text: str) -> list[Grade]:
    """The grades of an answer, a request after the other.

    The answer to several requests has a line for each of them.
    """
    num = len(example.requests)
    answers = split_answer(text, num) if num > 1 else [text]
    return [_graded(r, answer) for r, answer in zip(example.requests, answers, strict=True)]


def overall(grades: list[Grade]) -> Verdict:
    """Right where all are, wrong where all are."""
    verdicts = {each.verdict for each in grades}
    return verdicts.pop() if len(verdicts) == 1 else "partly right"


def _graded(request: Request, answer: str) -> Grade:
    """An answer is partly right that has half of the score, and more than the request itself has:
    the English sentence is no half of its translation."""
    if request.task is None:
        is_named = re.search(rf"\b{re.escape(request.answer)}\b", answer) is not None
        score, floor, metric = float(is_named), 1.0, "names it"
    else:
        example = tasks.Example(
            prompt=request.text,
            answer=request.answer,
            text=request.text,
            key=request.text,
            wording="{text}",
            is_heldout_wording=False,
        )
        score = part_score(request.task, answer, example)
        floor = max(_PARTLY, part_score(request.task, request.text, example))
        metric = tasks.get_task(request.task).metric
    verdict: Verdict = "right" if score == 1 else "partly right" if score > floor else "wrong"
    return Grade(request=request, score=score, metric=metric, verdict=verdict)
