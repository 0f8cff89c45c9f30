"""What the benchmarks share: experts of any number and rank, fair timing, and the report."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch.utils.benchmark import Timer
from tqdm import tqdm

from spectr_demo.config import shipped_experts
from spectr_demo.experts import WEIGHTS_FILE
from spectr_demo.loading import LoadedBase, load_base
from spectr_demo.tracing import library_versions

PROMPT = "Explain what an aeroplane is, and how it stays in the air."


def arguments(description: str | None) -> argparse.Namespace:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="less of everything, less exact")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    return parser.parse_args()


def endless_base() -> LoadedBase:
    """The embedded default, without an end token: every case decodes as many tokens."""
    base = load_base(None)
    base.model.generation_config.eos_token_id = None
    base.tokenizer.eos_token = None
    return base


def expert_folders(num_experts: int, folder: Path, rank: int = 8) -> list[str]:
    """The shipped experts, then random ones of their shapes and standard deviations; with another
    rank than theirs all are random."""
    shipped = [Path(source) for source in shipped_experts()]
    folders = [str(path) for path in shipped][: num_experts if rank == 8 else 0]
    generator = torch.Generator().manual_seed(0)
    for i in range(len(folders), num_experts):
        path = folder / f"random-{i}-rank-{rank}"
        if not path.is_dir():
            path.mkdir()
            config = json.loads((shipped[0] / "adapter_config.json").read_text())
            config["r"] = rank
            (path / "adapter_config.json").write_text(json.dumps(config))
            weights = {}
            for key, tensor in load_file(shipped[0] / WEIGHTS_FILE).items():
                shape = [rank if size == 8 else size for size in tensor.shape]
                random = torch.randn(shape, generator=generator) * tensor.float().std()
                weights[key] = random.to(tensor.dtype)
            save_file(weights, path / WEIGHTS_FILE)
        folders.append(str(path))
    return folders


def seconds(cases: Mapping[str, Callable[[], Any]], num_rounds: int) -> dict[str, list[float]]:
    """Wall time of each case in each round. Rounds go through all cases in turn, so that a machine
    whose speed drifts is unfair to none; a round before the first warms up."""
    timers = {
        name: Timer("case()", globals={"case": case}, num_threads=torch.get_num_threads())
        for name, case in cases.items()
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in tqdm(range(num_rounds + 1), unit="round"):
        for name, timer in timers.items():
            time = timer.timeit(1).median
            if number > 0:
                times[name].append(time)
    return times


def rows(times: Mapping[str, Sequence[float]], baseline: str, **facts: Any) -> list[dict[str, Any]]:
    """A row for each case. ratio: how many times as fast as the baseline, the median of rounds."""
    return [
        {
            "case": name,
            **facts,
            "seconds": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "ratio": statistics.median(b / v for v, b in zip(values, times[baseline], strict=True)),
        }
        for name, values in times.items()
    ]


def conditions(command: str, base: LoadedBase | None) -> dict[str, Any]:
    """What was run, on what."""
    device = base.device if base else "cpu"
    return {
        "command": command,
        **({"base": base.source, "quantization": base.quantization} if base else {}),
        "device": f"{device}, {platform.processor() or platform.machine()}",
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
    }


def report(
    command: str,
    results: Sequence[Mapping[str, Any]],
    output: Path | None,
    base: LoadedBase | None = None,
) -> None:
    """Print the table, and write the JSON file if one is asked for. base: that was measured."""
    document = {**conditions(command, base), "results": results}
    table = Table(*results[0])
    for row in results:
        table.add_row(
            *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
        )
    Console().print(table)
    if output:
        output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
