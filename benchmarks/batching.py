"""Visitors whose runs share each pass, against the same runs one after the other.

    python benchmarks/batching.py [--quick] [--json FILE]

Four visitors at once ask held-out prompts of the shipped experts, one after the other, greedily:
by the default router, as `serve` answers; the same with answers of 128 tokens, which no end token
ends; in the page's columns, with their trace; and by the default router while somebody else's run
of 300 tokens goes on, which is not counted.
`one after the other` lets one run go on at a time. `first_p50_s`, `first_p99_s`: from asking to the
first token. `same`: answers that are, letter by letter, those of the runs one after the other; on a
CPU that computes in bfloat16 near ties may fall otherwise.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from benchmarks.common import arguments, endless_base, report
from spectr_demo.config import DEFAULT_ROUTER, GenerationSettings, shipped_experts
from spectr_demo.engine import batch
from spectr_demo.engine.model import SpectrModel, load
from spectr_demo.experts.library import load_experts
from spectr_demo.ui.trial import chosen_prompts, domains_for

NUM_VISITORS = 4
ONE = [DEFAULT_ROUTER]
COLUMNS = ["base", "uniform", "arrow", "spectr", DEFAULT_ROUTER]
SETTINGS = GenerationSettings(max_new_tokens=96)
ENDLESS = GenerationSettings(max_new_tokens=128)
LONG = GenerationSettings(max_new_tokens=300)
Answers = dict[str, list[str]]  # by prompt, of each column


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    model: SpectrModel
    columns: list[str]
    settings: GenerationSettings = SETTINGS
    record: bool = False
    has_long: bool = False


def visits(case: Case, prompts: Sequence[str]) -> tuple[dict[str, Any], Answers]:
    """The figures of all visitors' requests, and their answers."""
    firsts: list[float] = []
    num_tokens: list[int] = []
    answers: Answers = {}

    def visit(own: Sequence[str]) -> None:
        for prompt in own:
            asked = time.perf_counter()
            steps = case.model.stream(
                prompt, case.columns, case.settings, record=case.record, trace_every=8
            )
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


def measure(case: Case, prompts: Sequence[str]) -> list[dict[str, Any]]:
    rows, alone = [], None
    for way, most in (("one after the other", 1), ("together", batch.MOST_RUNS)):
        others = long_run(case.model) if case.has_long else nullcontext()
        with patch.object(batch, "MOST_RUNS", most), others:
            figures, answers = visits(case, prompts)
        alone = alone or answers
        same = [
            one == other
            for prompt in prompts
            for one, other in zip(alone[prompt], answers[prompt], strict=True)
        ]
        rows.append({"case": case.name, "way": way, **figures, "same": sum(same) / len(same)})
    return rows


def main() -> None:
    options = arguments(__doc__)
    model = load()
    base = endless_base()
    endless = SpectrModel(base, load_experts(shipped_experts(), base.model))
    cases = (
        Case(name="default router", model=model, columns=ONE),
        Case(name="128 tokens each", model=endless, columns=ONE, settings=ENDLESS),
        Case(name="page", model=model, columns=COLUMNS, record=True),
        Case(name="beside a long run", model=model, columns=ONE, has_long=True),
    )
    domains = domains_for(model.library.names)
    prompts = [each.prompt for each in chosen_prompts(domains, 1 if options.quick else 2)]
    rows: list[dict[str, Any]] = []
    for case in cases:
        case.model.compare(prompts[0], COLUMNS, max_new_tokens=4)  # what a first run compiles
        rows += measure(case, prompts[: 2 * NUM_VISITORS])
    report("python benchmarks/batching.py", rows, options.json, model.base)


if __name__ == "__main__":
    main()
