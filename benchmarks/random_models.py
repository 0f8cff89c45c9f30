"""Bases and experts with random weights, in the shapes of public models: nothing is downloaded."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.initialization import no_init_weights

from spectr_demo.engine.plan import RoutingPlan
from spectr_demo.engine.recorder import Recorder
from spectr_demo.experts.adapters import Adapter
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.experts.shared_inputs import shared_inputs
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.calibration import Calibration
from spectr_demo.routing.routers import ROUTERS, calibrated_scores, parse_router

RANK = 8


def _llama(
    D: int, D_mlp: int, layers: int, heads: int, kv_heads: int, **more: object
) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=D,
        intermediate_size=D_mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        **{"vocab_size": 128256, "tie_word_embeddings": True, **more},
    )


SHAPES: dict[str, PreTrainedConfig] = {
    "tiny": _llama(64, 128, 2, 4, 2, vocab_size=512),
    "SmolLM2-135M": _llama(576, 1536, 30, 9, 3, vocab_size=49152),
    "Llama-3.2-1B": _llama(2048, 8192, 16, 32, 8, head_dim=64),
    "Llama-3.2-3B": _llama(3072, 8192, 28, 24, 8, head_dim=128),
    "Llama-3.1-8B": _llama(4096, 14336, 32, 32, 8, head_dim=128, tie_word_embeddings=False),
    "Qwen3-8B": Qwen3Config(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
    ),
}


def random_base(
    config: PreTrainedConfig, device: torch.device, *, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """A model of this shape. On a GPU its weights are random, and those of linear layers NF4. On
    the device `meta` it has none, and on a CPU they are what the memory held."""
    torch.manual_seed(0)
    if device.type != "cuda":
        with device, no_init_weights():
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for path, layer in list(model.model.named_modules()):
            if isinstance(layer, nn.Linear):
                quantized = bnb.nn.Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    bias=False,
                    compute_dtype=dtype,
                    quant_type="nf4",
                )
                quantized.weight = bnb.nn.Params4bit(
                    layer.weight.data, requires_grad=False, quant_type="nf4"
                ).to(device)
                model.model.set_submodule(path, quantized)
    return model.requires_grad_(False)


def random_library(
    model: PreTrainedModel,
    num_experts: int,
    *,
    rank: int = RANK,
    dtype: torch.dtype = torch.bfloat16,
) -> ExpertLibrary:
    """Experts on all linear layers, made where the model is, already aligned."""
    device = model.device
    layers = {
        f"model.{path}": layer
        for path, layer in model.base_model.named_modules()
        if isinstance(layer, nn.Linear)
    }
    banks = []
    for paths, _ in shared_inputs(model, list(layers)):
        num_rows, D_in = num_experts * rank, layers[paths[0]].in_features
        sizes = [layers[path].out_features for path in paths]
        B = [torch.randn(num_rows, D, device=device, dtype=dtype) / D**0.5 for D in sizes]
        A = torch.randn(len(paths) * num_rows, D_in, device=device, dtype=dtype) / D_in**0.5
        singular_values = [b.float().norm(dim=1).view(num_experts, rank) for b in B]
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


def no_calibration(library: ExpertLibrary) -> Calibration:
    """One that changes no score."""
    sizes = {bank: bank.singular_values[..., 0] for bank in library.banks}
    return Calibration(
        {
            (bank, score): (torch.zeros_like(size), torch.ones_like(size))
            for bank, size in sizes.items()
            for score in calibrated_scores()
        }
    )


def random_plan(
    library: ExpertLibrary, router: str, num_rows: int, recorder: Recorder | None = None
) -> RoutingPlan:
    """A plan of one router for so many rows. One that reads requests has done so, and found the
    request of each row to be for an expert of its own."""
    names = library.names
    chosen = torch.eye(len(names))
    config = parse_router(router, names)
    reads = ROUTERS[config.name].reads_request
    return RoutingPlan(
        [config] * num_rows,
        names,
        recorder,
        calibration=no_calibration(library) if config.calibrated else None,
        weights={row: chosen[row % len(names)] for row in range(num_rows)} if reads else None,
    )
