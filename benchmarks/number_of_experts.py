"""Decode speed, memory and load time from 1 to 1000 experts. Needs Linux's /proc.

    python benchmarks/number_of_experts.py [--quick] [--json FILE] [--folder PATH]

Each number of experts runs in a process of its own. `memory_MB` is the resident memory that the
experts add once loaded, mapped pages of their files included, `of_files` the same as a multiple of
the sizes of these files, and `peak_MB` the most they add while they load. The alignments are
computed and cached before, so `load_s` only reads them. `spectr`, `spectr-paper` and `lag` are the
decode speed as a ratio to the bare base. Experts beyond the shipped ones are random, of the same
shapes; 1000 of them and their alignments take 15 GB on disk: `--folder` keeps them for the next
run.
"""

import ctypes
import gc
import multiprocessing
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from benchmarks.common import (
    PROMPT,
    arguments,
    decoding,
    decoding_rows,
    expert_folders,
    load_library,
    report,
    routed_decoding,
)
from spectr_demo.base.loading import load_base
from spectr_demo.engine.model import SpectrModel
from spectr_demo.experts.adapters import WEIGHTS_FILE, read_adapter
from spectr_demo.experts.library import align_adapter

ROUTERS = ("spectr", "spectr-paper", "lag")


def memory(field: str) -> float:
    """MB of this process: `VmRSS` is what it holds, `VmHWM` the most it has held."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def held_memory() -> float:
    """MB of this process without what it has freed and not given back yet."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return memory("VmRSS")


def align(experts: list[str], folder: Path) -> None:
    """Fill the cache of alignments."""
    with patch.dict(os.environ, SPECTR_CACHE=str(folder)):
        for expert in experts:
            align_adapter(read_adapter(expert))


def measure(experts: list[str], folder: Path, is_quick: bool) -> dict[str, Any]:
    bare, ours = load_base(None), load_base(None)
    before = held_memory()
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
    start = time.perf_counter()
    library = load_library(experts, ours, folder)
    load_s = time.perf_counter() - start
    peak = memory("VmHWM")
    added = held_memory() - before
    file_MB = sum((Path(expert) / WEIGHTS_FILE).stat().st_size for expert in experts) / 1e6
    model = SpectrModel(ours, library)
    prompt = model.encode(PROMPT)
    cases = {
        "bare base": decoding(bare.model, torch.tensor([prompt], device=bare.device)),
        **{router: routed_decoding(model, [router], prompt) for router in ROUTERS},
    }
    ratios = {row["case"]: row["ratio"] for row in decoding_rows(cases, is_quick)}
    return {
        "experts": len(experts),
        "memory_MB": added,
        "of_files": added / file_MB,
        "peak_MB": peak - before,
        "load_s": load_s,
        **{router: ratios[router] for router in ROUTERS},
    }


def main() -> None:
    options = arguments(__doc__, folder="keep the random experts and all alignments here")
    numbers = (1, 8, 32) if options.quick else (1, 8, 32, 100, 320, 1000)
    results = []
    with (
        tempfile.TemporaryDirectory() as temporary,
        ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), max_tasks_per_child=1
        ) as processes,
    ):
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        experts = expert_folders(max(numbers), folder)
        processes.submit(align, experts, folder).result()
        for num in numbers:
            run = processes.submit(measure, experts[:num], folder, options.quick)
            results.append(run.result())
    report("python benchmarks/number_of_experts.py", results, options.json, load_base(None))


if __name__ == "__main__":
    main()
