"""A small evaluation from the page: held-out prompts, answered by several routers, and graded.

The prompts are the first of each task's held-out side; `scripts/held_out_prompts.py` writes them.
"""

import json
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache

from spectr_demo.charts.text import counted
from spectr_demo.config import ASSETS, GenerationSettings, RouterConfig
from spectr_demo.engine.run import Step
from spectr_demo.evaluation.tasks import TASKS
from spectr_demo.ui.examples import Example, Request
from spectr_demo.ui.grades import Verdict, grade, overall
from spectr_demo.ui.run import FRAME_SECONDS, MAX_COLUMNS, Status, Steps, Waiting

HELD_OUT = ASSETS / "held_out.json"
NUM_PROMPTS = 10  # of each domain


@dataclass(frozen=True, kw_only=True)
class Row:
    """One prompt. answers, verdicts: of each router, as far as they have come."""

    example: Example
    answers: tuple[str, ...] = ()
    verdicts: tuple[Verdict, ...] = ()

    @property
    def domain(self) -> str:
        task = self.example.requests[0].task
        assert task is not None
        return task


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A small evaluation as it goes on. rows: those begun. num: of all prompts. in_line: until the
    turn of a prompt comes."""

    routers: tuple[RouterConfig, ...]
    num: int
    rows: tuple[Row, ...] = field(default=())
    status: Status = "waiting"
    in_line: Waiting | None = None

    @property
    def graded(self) -> list[Row]:
        return [row for row in self.rows if row.verdicts]


@cache
def held_out() -> dict[str, tuple[Example, ...]]:
    """The prompts of each domain, with their reference answers."""
    prompts = json.loads(HELD_OUT.read_text(encoding="utf-8"))
    return {
        name: tuple(
            Example(
                key=f"{name}-{number}",
                title=each["prompt"],
                prompt=each["prompt"],
                requests=(Request(task=name, text=each["text"], answer=each["answer"]),),
            )
            for number, each in enumerate(of_domain)
        )
        for name, of_domain in prompts.items()
    }


def domains_for(expert_names: Collection[str]) -> list[str]:
    """The domains whose expert is loaded."""
    return [name for name in held_out() if name in expert_names]


def chosen_prompts(domains: Sequence[str], num: int) -> list[Example]:
    """So many of each domain, one of each in turn.

    Raises ValueError for no domain, or a number that there is not.
    """
    if not domains:
        raise ValueError("there is no domain to evaluate; choose one or more")
    if not 1 <= num <= NUM_PROMPTS:
        raise ValueError(f"{num} prompts a domain were asked for; there are 1 to {NUM_PROMPTS}")
    return [held_out()[domain][i] for i in range(num) for domain in domains]


def check_routers(routers: Sequence[RouterConfig]) -> None:
    """Raise ValueError where there are too few or too many to run side by side."""
    if not 1 <= len(routers) <= MAX_COLUMNS:
        raise ValueError(
            f"the evaluation has {counted(len(routers), 'router')}; it takes 1 to {MAX_COLUMNS}: "
            f"tick {'fewer' if routers else 'one'}"
        )


def run_trial(
    steps: Steps,
    examples: Sequence[Example],
    routers: Sequence[RouterConfig],
    stop: threading.Event,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Trial]:
    """The trial after each prompt, and about twelve times a second while one is answered.

    Once `stop` is set it ends after the token being made. Closing this iterator ends it too.
    """
    trial = Trial(routers=tuple(routers), num=len(examples), status="running")
    for example in examples:
        done = trial.rows
        if stop.is_set():
            break
        trial = replace(trial, rows=(*done, Row(example=example)))
        yield trial
        answers: tuple[str, ...] = ()
        shown_at, is_over = clock(), False
        with closing(steps(example.prompt, routers, _settings(example))) as run:
            for step in run:
                if isinstance(step, Step):
                    answers, is_over = tuple(column.text for column in step.columns), step.is_last
                if stop.is_set() or is_over:
                    break
                if isinstance(step, Waiting) or clock() - shown_at >= FRAME_SECONDS:
                    shown_at = clock()
                    row = Row(example=example, answers=answers)
                    in_line = step if isinstance(step, Waiting) and step.place > 1 else None
                    trial = replace(trial, rows=(*done, row), in_line=in_line)
                    yield trial
        if not is_over:
            trial = replace(trial, rows=done)
            break
        verdicts = tuple(overall(grade(example, answer)) for answer in answers)
        row = Row(example=example, answers=answers, verdicts=verdicts)
        trial = replace(trial, rows=(*done, row), in_line=None)
        yield trial
    is_done = len(trial.rows) == trial.num
    yield replace(trial, status="finished" if is_done else "stopped")


def _settings(example: Example) -> GenerationSettings:
    """Greedy, and long enough for every answer of the domain."""
    (request,) = example.requests
    assert request.task is not None
    return GenerationSettings(max_new_tokens=TASKS[request.task].max_new_tokens)
