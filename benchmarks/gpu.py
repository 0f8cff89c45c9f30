"""Speed on one GPU at the shapes of Llama-3.2-3B and Llama-3.1-8B: NF4, computed in 16 bits.

    python benchmarks/gpu.py [--quick] [--json FILE]

Each case generates from a prompt of 64 tokens, as `SpectrModel` does. `eager` launches each kernel
of a token, and its cache grows. `graph` is one CUDA graph a token, with a static cache. A rate is
that of the median token; a ratio is to the bare base in the same mode, with as many rows. `prefill`
is the time to the first token after a prompt of 2,000 tokens. Weights and experts are random, so
nothing is downloaded. The file is written anew after each case, so a run that is cut keeps what it
had. --quick: a tiny shape, on any device, to see that the script works.
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import ArrowConfig, LoraConfig, create_arrow_model, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from benchmarks.common import arguments, conditions
from benchmarks.random_models import RANK, SHAPES, random_base, random_library, random_plan
from spectr_demo.engine.layers import attach_, detach_, follow, routed
from spectr_demo.engine.plan import RoutingPlan
from spectr_demo.engine.recorder import Recorder
from spectr_demo.engine.static import StepHook, token_step
from spectr_demo.experts.adapters import WEIGHTS_FILE
from spectr_demo.experts.preflight import preflight

TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROUTERS = ("single:e0", "uniform", "spectr", "spectr-paper", "arrow", "norm", "spectr-context")
EAGER = ("single:e0", "spectr", "spectr-context", "lag")  # the others take as long
SHORT, LONG = 64, 2000  # tokens of a prompt
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SKIPPED = 4  # tokens, in which kernels are compiled and the graph is made


class Clock(BaseStreamer):
    """When each token is there, in seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is kept back."""


Plan = Callable[[Recorder | None], RoutingPlan | None]


class Case:
    """Generates in one mode. What it gives is seconds: until the first token, and between two."""

    def __init__(
        self,
        model: Any,
        num_rows: int,
        plan: Plan,
        *,
        mode: str = "eager",
        is_recorded: bool = False,
    ) -> None:
        self.model, self.num_rows, self.plan, self.mode = model, num_rows, plan, mode
        self.is_recorded = is_recorded

    @torch.inference_mode()
    def __call__(self, num_prompt: int, num_tokens: int) -> list[float]:
        plan = self.plan(Recorder(num_tokens) if self.is_recorded else None)
        device, clock = self.model.device, Clock()
        ids = torch.arange(num_prompt, device=device).expand(self.num_rows, -1) % 500
        config = GenerationConfig(
            max_new_tokens=num_tokens, do_sample=False, disable_compile=True, pad_token_id=0
        )
        with routed(plan), ExitStack() as stack:
            cache = None
            if self.mode == "graph":
                assert plan is not None
                step = token_step(self.model, plan, device, num_prompt + num_tokens)
                cache = stack.enter_context(step)
            wait(device)
            start = time.perf_counter()
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                streamer=clock,
                generation_config=config,
                **({} if cache is None else {"past_key_values": cache}),
            )
        times = [start, *clock.times[1:]]  # the first to come is the prompt
        return [after - before for before, after in itertools.pairwise(times)]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def kernels(case: Case) -> int:
    """That a GPU runs for one token."""
    counts = []
    for num_tokens in (SKIPPED, SKIPPED + 1):
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            case(SHORT, num_tokens)
            torch.cuda.synchronize()
        events = profiled.events() or ()
        counts.append(sum(e.device_type == torch.autograd.DeviceType.CUDA for e in events))
    return counts[1] - counts[0]


def random_adapters(
    config: PreTrainedConfig, num_experts: int, rank: int, folder: Path
) -> list[str]:
    """PEFT adapters on all linear layers; their folders."""
    lora = LoraConfig(r=rank, target_modules=TARGET_MODULES, init_lora_weights=False)
    with torch.device("meta"):
        peft = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
    shapes = {n: p.shape for n, p in peft.named_parameters() if "lora_" in n}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folders = []
    for e in range(num_experts):
        path = folder / f"rank-{rank}-{e}"
        path.mkdir()
        peft.peft_config["default"].save_pretrained(path)
        weights = {
            name.replace(".default", ""): 0.02 * torch.randn(shape, device=device).bfloat16().cpu()
            for name, shape in shapes.items()
        }
        save_file(weights, path / WEIGHTS_FILE)
        folders.append(str(path))
    return folders


def memory(config: PreTrainedConfig, shape: str) -> dict[str, Any]:
    """What `preflight` counts for ten experts of rank 16 and four columns of 1,024 tokens, and what
    such a run takes at most, recorded, in gigabytes."""
    num_rows, num_tokens, num_new = 4, 1024, 128
    model = random_base(config, DEVICE)
    library = random_library(model, 10, rank=16)
    attach_(model, library)
    hooks = [*follow(model), StepHook(model)]
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    plan = partial(random_plan, library, "spectr", num_rows)
    Case(model, num_rows, plan, mode="graph", is_recorded=True)(num_tokens - num_new, num_new)
    taken = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
    for hook in hooks:
        hook.remove()
    with tempfile.TemporaryDirectory() as name:
        config.save_pretrained(name)
        folders = random_adapters(config, 10, 16, Path(name))
        counted = preflight(name, folders, num_columns=num_rows, num_tokens=num_tokens)
    found = {"case": "memory", "shape": shape, "taken_gb": taken / 1e9}
    return found | {
        f"{key}_gb": getattr(counted, key) / 1e9 for key in ("weights", "experts", "cache")
    }


def arrow_model(config: PreTrainedConfig, num_experts: int, folder: Path) -> PreTrainedModel:
    """PEFT's own Arrow on as many random adapters."""
    folders = random_adapters(config, num_experts, RANK, folder)
    base = random_base(config, DEVICE)
    model: PreTrainedModel = create_arrow_model(base, folders, ArrowConfig(top_k=3)).eval()
    return model


class Bench:
    """The cases of one base, and what is found so far."""

    def __init__(self, output: Path | None, num_tokens: int) -> None:
        self.output, self.num_tokens = output, num_tokens
        self.results: list[dict[str, Any]] = []
        self.bare: dict[tuple[str, int], float] = {}

    def measure(self, name: str, case: Case, **facts: Any) -> None:
        """A row for the case; the bare base comes first."""
        device = case.model.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            times = case(SHORT, SKIPPED + self.num_tokens)[SKIPPED:]
            found = {"tokens_per_second": 1 / statistics.median(times)}
            place = case.mode, case.num_rows
            self.bare.setdefault(place, found["tokens_per_second"])
            found["ratio"] = found["tokens_per_second"] / self.bare[place]
            if case.mode == "eager":
                found["prefill_s"] = min(case(LONG, 1)[0] for _ in range(2))
                if device.type == "cuda" and case.num_rows == 1:
                    found["kernels"] = kernels(case)
            if device.type == "cuda":
                found["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        except Exception as error:  # one case that fails leaves the others
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[:200]}
        row = {"case": name, "mode": case.mode, "rows": case.num_rows, **facts, **found}
        row["recorded"] = case.is_recorded
        self.keep(row)

    def keep(self, row: dict[str, Any]) -> None:
        print(row, flush=True)
        self.results.append(row)
        if self.output:
            save(self.output, self.results)


def save(output: Path, results: Sequence[dict[str, Any]]) -> None:
    document = {**conditions("python benchmarks/gpu.py", None), "results": list(results)}
    output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def measure_experts(
    bench: Bench, model: PreTrainedModel, num_experts: int, routers: Sequence[str], shape: str
) -> None:
    """The bare base, then the routers on so many experts."""
    bench.bare.clear()
    library, facts = random_library(model, num_experts), {"shape": shape, "experts": num_experts}
    hook = StepHook(model)
    for num_rows, mode in itertools.product((1, 4), ("eager", "graph")):
        bare = Case(model, num_rows, partial(random_plan, library, "base", num_rows), mode=mode)
        bench.measure("bare base", bare, **facts)
    attach_(model, library)
    hooks = [*follow(model), hook]
    for num_rows, mode, router in itertools.product((1, 4), ("eager", "graph"), routers):
        if mode == "eager" and router not in EAGER:
            continue
        plan = partial(random_plan, library, router, num_rows)
        bench.measure(router, Case(model, num_rows, plan, mode=mode), **facts)
        if router in ("spectr", "spectr-context"):
            recorded = Case(model, num_rows, plan, mode=mode, is_recorded=True)
            bench.measure(router, recorded, **facts)
    for each in hooks:
        each.remove()
    detach_(model)


def main() -> None:
    options = arguments(__doc__)
    if not options.quick and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: no CUDA device was found; it needs one, or --quick")
    shapes = ("tiny",) if options.quick else ("Llama-3.2-3B", "Llama-3.1-8B")
    bench = Bench(options.json, 4 if options.quick else 32)
    for shape in shapes:
        model = random_base(SHAPES[shape], DEVICE)
        measure_experts(bench, model, 8, ROUTERS, shape)
        with tempfile.TemporaryDirectory() as folder:
            theirs = arrow_model(SHAPES[shape], 8, Path(folder))
            for num_rows in (1, 4):
                case = Case(theirs, num_rows, lambda recorder: None)
                bench.measure("PEFT Arrow", case, shape=shape, experts=8)
            del theirs, case
        if shape != "Llama-3.1-8B":  # of whose layers 1,000 take 60 GB
            measure_experts(bench, model, 1000, ("lag",), shape)
        del model
        free_memory()
        bench.keep(memory(SHAPES[shape], shape))
        free_memory()


def free_memory() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
