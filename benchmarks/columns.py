"""Four columns in one batch against the same four one after another, with 8 experts.

    python benchmarks/columns.py [--quick] [--json FILE]

Wall time of whole runs, prompt included; and what recording a full trace adds to one. Answers have
128 tokens, as many as a run has where nothing is said.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from benchmarks.common import (
    PROMPT,
    arguments,
    endless_base,
    expert_folders,
    report,
    rows,
    seconds,
)
from spectr_demo.config import GenerationSettings
from spectr_demo.engine.model import SpectrModel
from spectr_demo.experts.library import load_experts

Cases = dict[str, Callable[[], None]]


def cases(model: SpectrModel, num_tokens: int) -> tuple[Cases, Cases]:
    columns = ["base", f"single:{model.library.names[0]}", "uniform", "spectr"]

    def run(chosen: list[str], record: bool = False) -> None:
        model.compare(PROMPT, chosen, max_new_tokens=num_tokens, record=record)

    def one_by_one() -> None:
        for column in columns:
            run([column])

    together = {"one after another": one_by_one, "one batch": lambda: run(columns)}
    recording = {
        "not recorded": lambda: run(["spectr"]),
        "recorded": lambda: run(["spectr"], record=True),
    }
    return together, recording


def main() -> None:
    options = arguments(__doc__)
    num_tokens = 12 if options.quick else GenerationSettings().max_new_tokens
    # A recorded run differs from another by less than a noisy machine from itself.
    num_rounds = 3 if options.quick else 9
    with tempfile.TemporaryDirectory() as folder:
        base = endless_base()
        model = SpectrModel(base, load_experts(expert_folders(8, Path(folder)), base.model))
        together, recording = cases(model, num_tokens)
        times = seconds(together, num_rounds)
        results = rows(times, "one after another", tokens=num_tokens)
        results += rows(seconds(recording, num_rounds), "not recorded", tokens=num_tokens)
    report("python benchmarks/columns.py", results, options.json, base)


if __name__ == "__main__":
    main()
