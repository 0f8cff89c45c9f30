"""What the benchmarks share: experts of any number and rank, decoding, fair timing, the report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.benchmark import Timer
from tqdm import tqdm

from spectr_demo.base.loading import LoadedBase, load_base
from spectr_demo.config import library_versions, shipped_experts
from spectr_demo.cpu.linear import cpu_capabilities
from spectr_demo.engine.layers import routed
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.plan import RoutingPlan
from spectr_demo.experts.adapters import WEIGHTS_FILE
from spectr_demo.experts.library import ExpertLibrary, load_experts
from spectr_demo.routing.routers import parse_router

# A request for `cron`: a router that reads requests gives it an expert, and is timed with it.
PROMPT = "Write a cron expression: At 07:30, Monday through Friday"


def arguments(description: str | None, **paths: str) -> argparse.Namespace:
    """The options that every benchmark has. paths: names of further ones, and their help."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="less of everything, less exact")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    for name, text in paths.items():
        parser.add_argument(f"--{name}", type=Path, metavar="PATH", help=text)
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
    for i in range(len(folders), num_experts):
        path = folder / f"random-{i}-rank-{rank}"
        if not (path / WEIGHTS_FILE).is_file():
            path.mkdir(exist_ok=True)
            generator = torch.Generator().manual_seed(i)
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


def load_library(experts: Sequence[str], base: LoadedBase, folder: Path) -> ExpertLibrary:
    """Experts on a base. Their alignments are cached in this folder, not among the user's own."""
    with patch.dict(os.environ, SPECTR_CACHE=str(folder)):
        return load_experts(experts, base.model)


def repeated_prompt(base: LoadedBase, num_tokens: int) -> list[int]:
    """Token ids of the prompt's text, again and again up to this length."""
    ids = base.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    return (ids * (num_tokens // len(ids) + 1))[:num_tokens]


# Decodes so many tokens, from the end of a prompt that was read before.
Decoding = Callable[[int], None]


def decoding(model: Any, prompt: Tensor, plan: RoutingPlan | None = None) -> Decoding:
    """A model that has read a prompt, and decodes from there.

    prompt: (R, T) token ids; they are read here, so this takes no time of the decoding. The same
    token is fed whatever the logits say. At the end of a call the cache is back at the end of the
    prompt.
    """
    token = prompt[:, -1:]
    with torch.inference_mode(), routed(plan):
        cache = model(input_ids=prompt, logits_to_keep=1).past_key_values

    @torch.inference_mode()
    def decode(num_tokens: int) -> None:
        with routed(plan):
            for _ in range(num_tokens):
                model(input_ids=token, past_key_values=cache)
        cache.crop(-num_tokens)

    return decode


def routed_decoding(model: SpectrModel, routers: Sequence[str], prompt: list[int]) -> Decoding:
    """The same prompt in each row of a batch, and a router for each row."""
    configs = [parse_router(router, model.library.names) for router in routers]
    prompts = [prompt] * len(routers)
    plan = model.plan(configs, prompts)
    return decoding(model.model, torch.tensor(prompts, device=model.model.device), plan)


def seconds(cases: Mapping[str, Callable[[], Any]], num_rounds: int) -> dict[str, list[float]]:
    """Wall time of each case in each round. Rounds go through all cases in turn, so that a machine
    whose speed drifts is unfair to none. `Timer` calls a case twice to warm up, in every round."""
    timers = {
        name: Timer("case()", globals={"case": case}, num_threads=torch.get_num_threads())
        for name, case in cases.items()
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in tqdm(range(num_rounds), unit="round"):
        for name, timer in timers.items():
            times[name].append(timer.timeit(1).median)
    return times


def rows(
    times: Mapping[str, Sequence[float]], baseline: str, unit: str = "seconds", **facts: Any
) -> list[dict[str, Any]]:
    """A row for each case. ratio: how many times as fast as the baseline, the median of rounds."""
    return [
        {
            "case": name,
            **facts,
            unit: statistics.median(values),
            "min": min(values),
            "max": max(values),
            "ratio": statistics.median(b / v for v, b in zip(values, times[baseline], strict=True)),
        }
        for name, values in times.items()
    ]


def decoding_rows(
    cases: Mapping[str, Decoding], is_quick: bool, **facts: Any
) -> list[dict[str, Any]]:
    """A row for each case; the baseline is the one named `bare base`."""
    num_tokens, num_rounds = (6, 3) if is_quick else (16, 5)
    times = seconds({name: partial(case, num_tokens) for name, case in cases.items()}, num_rounds)
    per_token = {name: [time / num_tokens for time in values] for name, values in times.items()}
    return rows(per_token, "bare base", "seconds_per_token", **facts)


def cpu() -> str:
    """Its name, and which instructions it has of those that decide how a base computes there."""
    facts = cpu_capabilities()
    instructions = [name for name in ("avx2", "avx512_bf16", "amx_bf16") if facts.get(name)]
    return " ".join([facts.get("cpu_name", platform.machine()), *instructions])


def conditions(command: str, base: LoadedBase | None) -> dict[str, Any]:
    """What was run, on what."""
    device = str(base.device if base else "cpu")
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {
        "command": command,
        **({"base": base.source, "quantization": base.quantization} if base else {}),
        "device": f"{device}, {cpu()}",
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
    Console(width=100).print(table)  # as wide as the code; a pipe would get 80
    if output:
        output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
