"""Decode speed at the shapes of Llama-3.2-3B and Llama-3.1-8B, NF4 and bfloat16, on one GPU.

    python benchmarks/gpu.py [--quick] [--json FILE]

Weights and experts are random, so nothing is downloaded. Each case decodes greedily with a growing
cache after a prompt of 64 tokens. The ratio is to the bare base with as many rows. `kernels` are
the CUDA kernels of one token. The file is written anew after each part, so a run that is cut keeps
what it had. --quick: a tiny shape, on any device, to see that the script works.
"""

import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import ArrowConfig, LoraConfig, create_arrow_model, get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from benchmarks.common import arguments, report, rows, seconds
from spectr_demo.engine.layers import attach_, detach_, follow, routed
from spectr_demo.engine.plan import RoutingPlan
from spectr_demo.experts.adapters import WEIGHTS_FILE, Adapter
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.experts.shared_inputs import shared_inputs
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.routers import parse_router

RANK = 8
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES = {
    "Llama-3.2-3B": LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "Llama-3.1-8B": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
    ),
}
TINY = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
)


def random_base(config: LlamaConfig, device: torch.device) -> LlamaForCausalLM:
    """A model of this shape with random weights, its linear layers in NF4."""
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    for path, layer in list(model.model.named_modules()):
        if isinstance(layer, nn.Linear):
            with device:
                quantized = bnb.nn.Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                )
            quantized.weight = bnb.nn.Params4bit(
                layer.weight.data, requires_grad=False, quant_type="nf4"
            ).to(device)
            model.model.set_submodule(path, quantized)
    return model


def random_library(model: LlamaForCausalLM, num_experts: int) -> ExpertLibrary:
    """Experts of rank 8 on all linear layers, made where the model is, already aligned."""
    device = model.device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    layers = {
        f"model.{path}": layer
        for path, layer in model.model.named_modules()
        if isinstance(layer, nn.Linear)
    }
    banks = []
    for paths, _ in shared_inputs(model, list(layers)):
        num_rows, D_in = num_experts * RANK, layers[paths[0]].in_features
        sizes = [layers[path].out_features for path in paths]
        B = [torch.randn(num_rows, D, device=device, dtype=dtype) / D**0.5 for D in sizes]
        A = torch.randn(len(paths) * num_rows, D_in, device=device, dtype=dtype) / D_in**0.5
        singular_values = [b.float().norm(dim=1).view(num_experts, RANK) for b in B]
        banks.append(
            ExpertBank(
                paths=paths,
                expert_ids=torch.arange(num_experts),
                A=A,
                B=tuple(0.01 * b for b in B),
                singular_values=0.01 * torch.stack(singular_values),
            )
        )
    adapters = [
        Adapter.of({}, name=f"e{e}", source="random", base_model="random", sha256=str(e))
        for e in range(num_experts)
    ]
    return ExpertLibrary(adapters=tuple(adapters), aligned=(), banks=tuple(banks))


def arrow_model(config: LlamaConfig, device: torch.device, num_experts: int, folder: Path) -> Any:
    """PEFT's own Arrow on as many random adapters."""
    folders = []
    lora = LoraConfig(r=RANK, target_modules=TARGET_MODULES, init_lora_weights=False)
    for e in range(num_experts):
        with torch.device("meta"):
            peft = get_peft_model(LlamaForCausalLM(config), lora)
        shapes = {n: p.shape for n, p in peft.named_parameters() if "lora_" in n}
        path = folder / f"{config.hidden_size}-{e}"
        path.mkdir(exist_ok=True)
        peft.peft_config["default"].save_pretrained(path)
        weights = {
            name.replace(".default", ""): 0.02 * torch.randn(shape, dtype=torch.bfloat16)
            for name, shape in shapes.items()
        }
        save_file(weights, path / WEIGHTS_FILE)
        folders.append(str(path))
    return create_arrow_model(random_base(config, device), folders, ArrowConfig(top_k=3)).eval()


class Decoder:
    """Decodes `num_tokens` at each call; the prompt is read once, before the clock starts."""

    def __init__(
        self, model: Any, num_rows: int, num_tokens: int, plan: RoutingPlan | None = None
    ) -> None:
        self.model, self.num_tokens, self.plan = model, num_tokens, plan
        prompt = torch.arange(64, device=model.device).expand(num_rows, -1)
        with torch.inference_mode(), routed(plan):
            output = model(prompt, use_cache=True)
        self.token, self.cache = output.logits[:, -1:].argmax(-1), output.past_key_values

    @torch.inference_mode()
    def __call__(self) -> None:
        with routed(self.plan):
            for _ in range(self.num_tokens):
                output = self.model(self.token, past_key_values=self.cache, use_cache=True)
                self.token = output.logits[:, -1:].argmax(-1)


def kernels(decoder: Decoder) -> int:
    """CUDA kernels of one token."""
    decoder.num_tokens = 1
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        decoder()
        torch.cuda.synchronize()
    events = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(events)


def in_context(library: ExpertLibrary, num_rows: int) -> RoutingPlan:
    """The default router after it has read a request for each row, as if for an expert each."""
    names = library.names
    routers = [parse_router("spectr-context", names)] * num_rows
    weights = torch.eye(len(names))
    return RoutingPlan(routers, names, weights={row: weights[row] for row in range(num_rows)})


def decoders(
    model: Any, library: ExpertLibrary, routers: Sequence[str], num_rows: int, num_tokens: int
) -> dict[str, Decoder]:
    """The bare base and each router, in a batch of so many rows."""
    names, cases = library.names, {"bare base": Decoder(model, num_rows, num_tokens)}
    for router in routers:
        if router == "spectr-context":
            plan = in_context(library, num_rows)
        else:
            plan = RoutingPlan([parse_router(router, names)] * num_rows, names)
        cases[router] = Decoder(model, num_rows, num_tokens, plan)
    return cases


def main() -> None:
    options = arguments(__doc__)
    if not options.quick and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: no CUDA device was found; it needs one, or --quick")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = {"tiny": TINY} if options.quick else SHAPES
    num_tokens, num_rounds = (4, 2) if options.quick else (8, 2)
    results: list[dict[str, Any]] = []

    def keep(found: list[dict[str, Any]]) -> None:
        results.extend(found)
        report("python benchmarks/gpu.py", results, options.json)

    for shape, config in shapes.items():
        model = random_base(config, device)
        few, many = (random_library(model, n) for n in (8, 1000))
        with tempfile.TemporaryDirectory() as folder:
            theirs = arrow_model(config, device, 8, Path(folder))
        for num_rows in (1, 4):
            for library, routers in (
                (few, ("base", "single:e0", "spectr", "spectr-paper", "arrow", "spectr-context")),
                (many, ("lag",)),
            ):
                attach_(model, library)
                hooks = follow(model)
                cases = decoders(model, library, routers, num_rows, num_tokens)
                if library is few:
                    cases["PEFT Arrow"] = Decoder(theirs, num_rows, num_tokens)
                times = seconds(cases, num_rounds)
                facts = {"shape": shape, "experts": len(library.names), "rows": num_rows}
                found = rows(times, "bare base", **facts)
                for row in found:
                    row["tokens_per_second"] = num_tokens / row["seconds"]
                    if device.type == "cuda":
                        row["kernels"] = kernels(cases[row["case"]])
                        row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
                keep(found)
                for hook in hooks:
                    hook.remove()
                detach_(model)
        del model, few, many, theirs, cases
        gc.collect()
        torch.cuda.empty_cache()
    if device.type == "cuda":
        print(json.dumps({"gpu": torch.cuda.get_device_name(device)}))


if __name__ == "__main__":
    main()
