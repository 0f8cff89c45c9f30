"""Decode speed on the embedded default: the bare base, PEFT, and this project, in one run.

    python benchmarks/decode.py [--quick] [--json FILE]

Each case decodes the same prompt greedily, without an end token, and reports tokens per second from
its first token to its last, and the seconds until the first. Rounds go through all cases in turn,
so that a machine whose speed drifts is unfair to none; the median over rounds counts. Experts
beyond the shipped ones are random, of the same shapes and size.
"""

import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import ArrowConfig, PeftModel, create_arrow_model
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers.generation.streamers import BaseStreamer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from benchmarks.common import PROMPT, arguments, conditions, endless_base, expert_folders
from spectr_demo.config import GenerationSettings
from spectr_demo.engine import SpectrModel
from spectr_demo.experts import load_experts
from spectr_demo.loading import LoadedBase, load_base

FOUR_COLUMNS = ["base", "single", "uniform", "spectr"]
# Number of tokens -> tokens per second of one column, and seconds to the first token.
Case = Callable[[int], tuple[float, float]]


class Clock(BaseStreamer):
    """Notes when each token comes; the first call is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def hugging_face_case(model: Any, base: LoadedBase) -> Case:
    """transformers' own `generate` on a plain or a PEFT model."""
    chat = [{"role": "user", "content": PROMPT}]
    inputs = base.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ).to(base.device)

    def run(num_tokens: int) -> tuple[float, float]:
        clock = Clock()
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, streamer=clock)
        rate = (num_tokens - 1) / (clock.times[-1] - clock.times[1])
        return rate, clock.times[1] - start

    return run


def our_case(model: SpectrModel, columns: list[str]) -> Case:
    def run(num_tokens: int) -> tuple[float, float]:
        start = time.perf_counter()
        steps = model.stream(PROMPT, columns, GenerationSettings(max_new_tokens=num_tokens))
        next(steps)
        first = time.perf_counter() - start
        *_, last = steps
        return last.columns[0].tokens_per_second, first

    return run


def cases(num_experts: int, folder: Path) -> dict[str, Case]:
    folders = expert_folders(num_experts, folder)
    bare, one, many, ours = (endless_base() for _ in range(4))
    peft_one = PeftModel.from_pretrained(one.model, folders[0]).eval()
    arrow = create_arrow_model(many.model, folders, ArrowConfig(top_k=3)).eval()
    model = SpectrModel(ours, load_experts(folders, ours.model))
    single = f"single:{model.library.names[0]}"
    four = [single if column == "single" else column for column in FOUR_COLUMNS]
    return {
        "bare base": hugging_face_case(bare.model, bare),
        "PEFT, one adapter": hugging_face_case(peft_one, one),
        "PEFT Arrow": hugging_face_case(arrow, many),
        "base": our_case(model, ["base"]),
        "single": our_case(model, [single]),
        "arrow": our_case(model, ["arrow"]),
        "spectr, K = 1": our_case(model, ["spectr"]),
        "spectr, K = 4": our_case(model, ["spectr-paper"]),
        "spectr-context": our_case(model, ["spectr-context"]),
        "four columns in one batch": our_case(model, four),
    }


def main() -> None:
    options = arguments(__doc__)
    num_tokens, num_rounds = (12, 3) if options.quick else (32, 5)

    results = []
    with tempfile.TemporaryDirectory() as folder:
        for num_experts in (4, 32):
            todo = cases(num_experts, Path(folder))
            rates: dict[str, list[float]] = {name: [] for name in todo}
            waits: dict[str, list[float]] = {name: [] for name in todo}
            for case in todo.values():
                case(3)  # warm-up
            for _ in tqdm(range(num_rounds), desc=f"{num_experts} experts", unit="round"):
                for name, case in todo.items():
                    rate, wait = case(num_tokens)
                    rates[name].append(rate)
                    waits[name].append(wait)
            for name, values in rates.items():
                relative = [v / b for v, b in zip(values, rates["bare base"], strict=True)]
                results.append(
                    {
                        "case": name,
                        "experts": num_experts,
                        "columns": 4 if name.startswith("four") else 1,
                        "tokens_per_second": statistics.median(values),
                        "min": min(values),
                        "max": max(values),
                        "ratio_to_bare_base": statistics.median(relative),
                        "seconds_to_first_token": statistics.median(waits[name]),
                    }
                )
            del todo
            gc.collect()
    base = load_base(None)
    report = {
        **conditions("python benchmarks/decode.py" + (" --quick" if options.quick else ""), base),
        "num_tokens": num_tokens,
        "num_rounds": num_rounds,
        "results": results,
    }
    table = Table(
        "case", "experts", "tokens/s per column", "min - max", "ratio to bare base", "s to first"
    )
    for row in results:
        table.add_row(
            row["case"],
            str(row["experts"]),
            f"{row['tokens_per_second']:.1f}",
            f"{row['min']:.1f} - {row['max']:.1f}",
            f"{row['ratio_to_bare_base']:.2f}",
            f"{row['seconds_to_first_token']:.2f}",
        )
    Console().print(table)
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
