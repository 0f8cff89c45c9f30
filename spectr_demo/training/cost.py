"""What a training run will take, said before it starts: memory counted, time measured."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from spectr_demo.base.memory import free_memory
from spectr_demo.base.quantization import NF4_BYTES
from spectr_demo.training.lora import inner_linears

LORA_BYTES = 16  # of each value: float32 weight, gradient and AdamW's two moments
# Values kept for the backward pass, per token and layer, in units of the hidden size and of the
# MLP's: inputs of norms, projections and attention, and of the gated MLP's products.
HIDDEN_VALUES, MLP_VALUES = 14, 4
CPU_GAPS = 1.5  # a CPU's allocator keeps gaps between passes of different lengths
MATMUL_SHARE = 0.5  # of a large product's speed, which small layers and everything else leave
PROBE_SECONDS = 0.3


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """Estimates for one expert; they are right to about a factor of two.

    memory, free_memory: bytes on the device (GPU memory, or RAM). A container's limit counts.
    seconds: of training alone.
    """

    memory: int
    free_memory: int
    seconds: float
    num_parameters: int

    def __str__(self) -> str:
        verdict = "" if self.memory < self.free_memory else ": TOO LITTLE, lower --batch-size"
        return (
            f"{self.num_parameters / 1e6:,.0f}M parameters; about {self.memory / 1e9:.1f} GB needed"
            f" of {self.free_memory / 1e9:.1f} GB free{verdict}; "
            f"about {max(1, round(self.seconds / 60))} min an expert, held-out answers not counted"
        )


def estimate_training(
    config: PreTrainedConfig,
    *,
    rank: int,
    tokens_per_step: int,
    answer_tokens_per_step: int,
    tokens_at_once: int,
    num_steps: int,
    device: torch.device,
) -> TrainingCost:
    """Estimate from the base's configuration alone: no weight is fetched or allocated.

    tokens_per_step: tokens of a batch, padding included.
    answer_tokens_per_step: those of them with logits.
    tokens_at_once: of a pass, at most; a batch may take several. Memory is for one.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    text = config.get_text_config()
    inside = inner_linears(model).values()
    num_parameters = sum(p.numel() for p in model.parameters())
    num_linear = sum(m.weight.numel() for m in inside)
    num_lora = sum(rank * (m.in_features + m.out_features) for m in inside)
    on_gpu = device.type == "cuda"
    value_bytes = 2 if on_gpu else 4 * CPU_GAPS
    weights = (
        NF4_BYTES * num_linear + 2 * (num_parameters - num_linear) if on_gpu else 4 * num_parameters
    )
    mlp_size = getattr(text, "intermediate_size", 4 * text.hidden_size)
    share_at_once = min(1.0, tokens_at_once / tokens_per_step)
    values = share_at_once * tokens_per_step * text.num_hidden_layers
    values *= HIDDEN_VALUES * text.hidden_size + MLP_VALUES * mlp_size
    # With softmax and gradient.
    logits = share_at_once * 3 * 4 * answer_tokens_per_step * text.vocab_size
    # Forward and the gradient by inputs, 2 operations a weight each; weights get no gradient.
    operations = 4.0 * tokens_per_step * num_linear
    operations += 4.0 * answer_tokens_per_step * text.vocab_size * text.hidden_size
    return TrainingCost(
        memory=round(weights + LORA_BYTES * num_lora + value_bytes * values + logits),
        free_memory=free_memory(device),
        seconds=num_steps * operations / (MATMUL_SHARE * _matmul_speed(device)),
        num_parameters=num_parameters,
    )


def _matmul_speed(device: torch.device) -> float:
    """Operations per second of a product of the size that training is made of."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(512, 2048, device=device, dtype=dtype)
    b = torch.randn(2048, 2048, device=device, dtype=dtype)
    (a @ b).sum().item()
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < PROBE_SECONDS:
        (a @ b).sum().item()  # `.item()` waits for a GPU
        count += 1
    return 2 * 512 * 2048 * 2048 * count / elapsed
