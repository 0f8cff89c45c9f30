"""A library on disk of 10 to 1,000 experts: opening, memory, decode speed. Needs Linux.

    python benchmarks/packed.py [--quick] [--json FILE] [--folder PATH]

The libraries of the embedded default hold the shipped experts and random ones of the same shapes.
Of ordinary text they hold random figures of the right shapes: what it costs to read a request does
not depend on them. That of Llama-3.2-3B's shapes has experts of rank 8 on all linear layers, whose
factors are zeros and are never read, like the weights of the base.

Each library is opened in a process of its own. Its files are put out of the system's cache before,
so `open_s` reads from the disk. It is `load_experts` with the base loaded; `open_cpu_s` is the
processor's time in it, which other processes do not lengthen. MB columns are what the
process holds beyond what it held before, mapped pages of the library included: once it is open, and
after each kind of run in this order. `single` uses one expert. `request_s` is what `spectr-context`
takes to read a request; `first_request_s` is the first one. `spectr`, `lag` and `spectr-context`
are the decode speed as a ratio to the bare base.

1,000 experts of the default take 6 GB on disk while it runs, those of the 3B base 25 GB.
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
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
    report,
    routed_decoding,
)
from benchmarks.number_of_experts import held_memory
from benchmarks.random_models import RANK, SHAPES, random_base
from spectr_demo.base.generic import generic_prompts
from spectr_demo.base.loading import load_base
from spectr_demo.config import shipped_experts
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.ordinary import identity
from spectr_demo.experts import packing
from spectr_demo.experts.adapters import Adapter, LoraShape, read_adapter
from spectr_demo.experts.library import align_adapter, load_experts
from spectr_demo.experts.packed import MeasuredRecord, ordinary_file, save_index
from spectr_demo.experts.skeleton import linear_shape, skeleton_of
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.routers import calibrated_scores, parse_router

DEFAULT, LARGE = "SmolLM2-135M", "Llama-3.2-3B"
NUM_DIRECTIONS = 64  # of the metric of ordinary text


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def adapters_of(shape: str, num: int, source: Path) -> list[Adapter]:
    """On all linear layers of the decoder; those of the default begin with the shipped ones.
    source: a folder with no model card and no tokenizer, of all others."""
    shapes = {
        f"model.{path}": LoraShape(sizes[1], sizes[0], RANK)
        for path, layer in skeleton_of(SHAPES[shape]).model.model.named_modules()
        if (sizes := linear_shape(layer))
    }
    first = [read_adapter(each) for each in shipped_experts()] if shape == DEFAULT else []
    random = [
        Adapter(
            name=f"random-{i}",
            source=str(source),
            base_model=shape,
            sha256=f"random-{i}",
            num_bytes=0,
            shapes=shapes,
            read=dict,
        )
        for i in range(num - len(first))
    ]
    return [*first, *random]


def fill_(banks: Sequence[ExpertBank], adapters: Sequence[Adapter]) -> None:
    """Random rows of length 1 or so in A, and updates as large as trained ones."""
    aligned = [align_adapter(adapter) for adapter in adapters if adapter.name[:7] != "random-"]
    for bank in banks:
        bank.A.normal_(std=bank.A.shape[1] ** -0.5)
        for B, singular_values in zip(bank.B, bank.singular_values, strict=True):
            B.normal_(std=B.shape[1] ** -0.5)
            singular_values.fill_(1)
        for e, factors in enumerate(aligned):
            bank.put_(e, [factors[path] for path in bank.paths])


def make(shape: str, num: int, folder: Path) -> None:
    adapters, config = adapters_of(shape, num, folder.parent), SHAPES[shape]
    fill = fill_ if shape == DEFAULT else (lambda banks, adapters: None)
    with patch.object(packing, "fill_", fill):
        index = packing.write_library(adapters, config, folder, torch.bfloat16)
    if shape != DEFAULT:
        return
    base = load_base(None)
    prompts = generic_prompts(base)
    num_values = 2 * len(calibrated_scores()) + 2 + len(prompts)
    names = []
    for number, bank in enumerate(load_experts(folder, base.model).banks):
        (P, E, r), D_in = bank.singular_values.shape, bank.A.shape[1]
        tensors = {
            "values": torch.rand(num_values, P, E) + 0.5,
            "whitening": torch.eye(r).expand(P, E, r, r),
            "mean": torch.zeros(D_in),
            "directions": torch.linalg.qr(torch.randn(D_in, NUM_DIRECTIONS)).Q,
            "damping": torch.full((NUM_DIRECTIONS,), 0.5),
            "scale": torch.ones(()),
        }
        names.append(ordinary_file(number))
        packing.save_part(tensors, folder / names[-1])
    measured = MeasuredRecord(base=identity(base), prompts=list(prompts))
    files = {**index.files, **packing.records_of(folder, names)}
    save_index(index.model_copy(update={"measured": measured, "files": files}), folder)


def forget(folder: Path) -> float:
    """Put a library out of the system's cache. Gives its size in GB."""
    total = 0
    for file in folder.rglob("*.*"):
        if file.is_file():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            total += file.stat().st_size
    return total / 1e9


def opened(folder: Path, model: Any) -> tuple[Any, float, dict[str, float]]:
    """The library, the memory before, and the first figures."""
    GB = forget(folder)
    skeleton_of(model.config)  # made where a base is loaded
    before = held_memory()
    start, start_cpu = time.perf_counter(), time.process_time()
    library = load_experts(folder, model)
    facts = {
        "GB": GB,
        "open_s": time.perf_counter() - start,
        "open_cpu_s": time.process_time() - start_cpu,
        "open_MB": held_memory() - before,
    }
    return library, before, facts


def open_large(shape: str, folder: Path) -> dict[str, float]:
    return opened(folder, random_base(SHAPES[shape], torch.device("cpu")))[2]


def measure(folder: Path, is_quick: bool) -> dict[str, float]:
    """The embedded default with a library on disk."""
    bare, ours = load_base(None), load_base(None)
    library, before, found = opened(folder, ours.model)
    model = SpectrModel(ours, library)
    prompt = model.encode(PROMPT)

    def held_after(case: str, router: str) -> Any:
        decode = routed_decoding(model, [router], prompt)
        decode(4)
        found[f"{case}_MB"] = held_memory() - before
        return decode

    cases = {"bare base": decoding(bare.model, torch.tensor([prompt], device=bare.device))}
    held_after("single", "single:cron")
    cases["lag"] = held_after("lag", "lag")
    context = parse_router("spectr-context", model.library.names)
    found["first_request_s"] = timed(lambda: model.lanes(context, prompt))
    found["request_s"] = min(timed(lambda: model.lanes(context, prompt)) for _ in range(3))
    cases |= {router: held_after(router, router) for router in ("spectr-context", "spectr")}
    rows = {row["case"]: row for row in decoding_rows(cases, is_quick)}
    found["base_ms"] = 1000 * rows.pop("bare base")["seconds_per_token"]
    return {**found, **{router: row["ratio"] for router, row in rows.items()}}


def main() -> None:
    options = arguments(__doc__, folder="make the libraries here, one after another")
    numbers = (10, 30) if options.quick else (10, 30, 100, 1000)
    results: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as temporary,
        ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), max_tasks_per_child=1
        ) as processes,
    ):
        made = Path(temporary) / "library"
        for shape, num in [*((DEFAULT, num) for num in numbers), (LARGE, max(numbers))]:
            processes.submit(make, shape, num, made).result()
            run = (
                processes.submit(measure, made, options.quick)
                if shape == DEFAULT
                else processes.submit(open_large, shape, made)
            )
            results.append({"shape": shape, "experts": num, **run.result()})
            print(results[-1], file=sys.stderr, flush=True)
            shutil.rmtree(made)
    report("python benchmarks/packed.py", results, options.json, load_base(None))


if __name__ == "__main__":
    main()
