"""Visitors whose runs share each pass, against the same runs one after the other.

    python benchmarks/batching.py [--quick] [--json FILE]

Four visitors at once ask held-out prompts of the shipped experts, one after the other, greedily:
by the default router, as `serve` answers; in the page's columns, with their trace; and by the
default router while somebody else's run of 300 tokens goes on, which is not counted.
`one after the other` lets one run go on at a time. `first_p50_s`, `first_p99_s`: from asking to the
first token. `same`: answers that are, letter by letter, those of the runs one after the other; on a
CPU that computes in bfloat16 near ties may fall otherwise.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from benchmarks.common import arguments, report
from spectr_demo.config import DEFAULT_ROUTER, GenerationSettings
from spectr_demo.engine import batch
from spectr_demo.engine.model import SpectrModel, load
from spectr_demo.ui.trial import chosen_prompts, domains_for

NUM_VISITORS = 4
ONE = [DEFAULT_ROUTER]
COLUMNS = ["base", "uniform", "arrow", "spectr", DEFAULT_ROUTER]
SETTINGS = GenerationSettings(max_new_tokens=96)
LONG = GenerationSettings(max_new_tokens=300)
Answers = dict[str, list[str]]  # by prompt, of each column


def visits(
    model: SpectrModel, prompts: Sequence[str], columns: list[str], *, record: bool
) -> tuple[dict[str, Any], Answers]:
    """The figures of all visitors' requests, and their answers."""
    firsts: list[float] = []
    num_tokens: list[int] = []
    answers: Answers = {}

    def visit(own: Sequence[str]) -> None:
        for prompt in own:
            asked = time.perf_counter()
            steps = model.stream(prompt, columns, SETTINGS, record=record, trace_every=8)
            step = next(steps)
            firsts.append(time.perf_counter() - asked)
            step = deque(steps, maxlen=1).pop()
            num_tokens.append(sum(column.num_tokens for column in step.columns))
            answers[prompt] = [column.text for column in step.columns]

    threads = [
        threading.Thread(target=visit, args=(prompts[i::NUM_VISITORS],))
        for i in range(NUM_VISITORS)
    ]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    figures = {
        "requests": len(prompts),
        "requests_per_s": len(prompts) / seconds,
        "tokens_per_s": sum(num_tokens) / seconds,
        "first_p50_s": float(np.percentile(firsts, 50)),
        "first_p99_s": float(np.percentile(firsts, 99)),
    }
    return figures, answers


@contextmanager
def long_run(model: SpectrModel) -> Iterator[None]:
    """Somebody else's, begun before."""
    with closing(model.stream("Tell me a long story of a king.", ["base"], LONG)) as steps:  # type: ignore[type-var]
        next(steps)
        yield


def measure(model: SpectrModel, num_each: int) -> list[dict[str, Any]]:
    prompts = [each.prompt for each in chosen_prompts(domains_for(model.library.names), num_each)]
    rows: list[dict[str, Any]] = []
    for case, columns, record in (
        ("default router", ONE, False),
        ("page", COLUMNS, True),
        ("beside a long run", ONE, False),
    ):
        alone: Answers = {}
        for way, most in (("one after the other", 1), ("together", batch.MOST_RUNS)):
            with patch.object(batch, "MOST_RUNS", most):
                if case == "beside a long run":
                    with long_run(model):
                        figures, answers = visits(model, prompts, columns, record=record)
                else:
                    figures, answers = visits(model, prompts, columns, record=record)
            alone = alone or answers
            texts = [
                one == other
                for prompt in prompts
                for one, other in zip(alone[prompt], answers[prompt], strict=True)
            ]
            rows.append({"case": case, "way": way, **figures, "same": sum(texts) / len(texts)})
    return rows


def main() -> None:
    options = arguments(__doc__)
    model = load()
    model.compare("What is a chord?", COLUMNS, max_new_tokens=4)  # what a first run compiles
    rows = measure(model, 1 if options.quick else 3)
    report("python benchmarks/batching.py", rows, options.json, model.base)


if __name__ == "__main__":
    main()
