"""Do these experts fit this base, and all of it the memory? Said before any base is fetched; and
what one more would be among those that are loaded, said before it is one of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PretrainedConfig
from transformers.utils import CONFIG_NAME

from spectr_demo.base.checkpoint import whole_embedded_checkpoint
from spectr_demo.base.decoder import decoder_of
from spectr_demo.base.loading import read_base_config
from spectr_demo.base.memory import free_memory
from spectr_demo.base.quantization import NF4_BYTES, choose_compute_dtype, is_quantizable
from spectr_demo.config import base_from_environment
from spectr_demo.experts.adapters import Adapter
from spectr_demo.experts.inspection import overlap_with
from spectr_demo.experts.library import ExpertLibrary, Sources, align_adapter, read_adapters
from spectr_demo.experts.skeleton import linear_shape, skeleton_of

# A prompt's tokens take this many numbers of the widest layer each, while they are read. Measured
# on a GPU: 0.93 GB for 3,584 tokens of Llama-3.2-3B's shape (benchmarks/gpu.py).
_IN_FLIGHT = 16


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What was found. The libraries' own memory is not counted.

    problems: what `load` would refuse, one line each.
    weights, experts, cache: bytes of the base, of the experts, and of one run's keys and values.
    activations: bytes that reading the run's tokens takes beside, at most; see `_IN_FLIGHT`.
    free_memory: bytes on the device (GPU memory, or RAM).
    """

    problems: tuple[str, ...]
    num_parameters: int
    weights: int
    experts: int
    cache: int
    activations: int
    free_memory: int

    @property
    def memory(self) -> int:
        return self.weights + self.experts + self.cache + self.activations

    def __str__(self) -> str:
        parts = {"4-bit base": self.weights, "experts": self.experts, "KV cache": self.cache}
        parts["activations"] = self.activations
        sizes = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts.items())
        verdict = "" if self.memory < self.free_memory else ": TOO LITTLE"
        return "\n".join(
            (
                f"{self.num_parameters / 1e6:,.0f}M parameters; {sizes}; together "
                f"{self.memory / 1e9:.2f} GB of {self.free_memory / 1e9:.1f} GB free{verdict}",
                *(self.problems or ["All experts fit this base."]),
            )
        )


def preflight(
    base: str | None, experts: Sources, *, num_columns: int = 4, num_tokens: int = 1024
) -> Preflight:
    """Check experts against a base that need not be there, and estimate the memory of both.

    base, experts: as `load` takes them. None is `SPECTR_BASE_MODEL`, or the embedded default. Of a
        base on the Hub only the configuration is fetched, of experts their files.
    num_columns, num_tokens: of the largest run, prompt and answer.
    Raises ValueError for a base that cannot be loaded.
    """
    device = _device()
    dtype = choose_compute_dtype(device)
    config = config_of(base)
    model = skeleton_of(config).model
    adapters, problems = read_adapters(experts, config)

    layers = filter(is_quantizable, decoder_of(model).modules())
    linear = list(filter(None, map(linear_shape, layers)))
    num_linear = sum(D_in * D_out for D_in, D_out in linear)
    num_parameters = model.num_parameters()
    # A CPU without a kernel for 4-bit products keeps the 4-bit values in float32.
    linear_bytes = dtype.itemsize if dtype == torch.float32 else NF4_BYTES
    shapes = [shape for adapter in adapters for shape in adapter.shapes.values()]
    num_values = sum(map(_cached_values, config.get_text_config().per_layer_config))
    return Preflight(
        problems=tuple(problems),
        num_parameters=num_parameters,
        weights=round(num_linear * linear_bytes) + (num_parameters - num_linear) * dtype.itemsize,
        experts=sum(shape.rank * (shape.D_in + shape.D_out) for shape in shapes)
        * (torch.float32 if device.type == "cpu" else dtype).itemsize,
        cache=num_values * num_columns * num_tokens * dtype.itemsize,
        activations=_IN_FLIGHT
        * max(map(max, linear), default=0)
        * num_columns
        * num_tokens
        * dtype.itemsize,
        free_memory=free_memory(device),
    )


def _cached_values(layer: PretrainedConfig) -> int:
    """How many numbers a layer keeps of a token; none in a recurrent base, whose state does not
    grow with the tokens. layer: its own configuration."""
    heads = getattr(layer, "num_attention_heads", None)
    if heads is None:
        return 0
    num_kv_heads = getattr(layer, "num_key_value_heads", None) or heads
    head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // heads
    return int(2 * num_kv_heads * head_dim)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An adapter that fits the base, and could be added to a library.

    scaling: smallest and largest over its layers. overlaps: with each expert of the library that
    shares a layer with it, the nearest first; see `inspection.overlaps`.
    """

    adapter: Adapter
    scaling: tuple[float, float]
    overlaps: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, adapter: Adapter, library: ExpertLibrary) -> Candidate:
        """Its weights are read, and aligned. Raises AdapterError where that is not possible."""
        scalings = [factors.scaling for factors in adapter.read().values()]
        overlaps = overlap_with(library, align_adapter(adapter))
        order = np.argsort(-overlaps, kind="stable")  # those without a shared layer come last
        near = [(library.names[e], float(overlaps[e])) for e in order if np.isfinite(overlaps[e])]
        return cls(adapter=adapter, scaling=(min(scalings), max(scalings)), overlaps=tuple(near))


def config_of(base: str | None) -> PretrainedConfig:
    """The configuration of a base, as `load` takes it. Its weights are not read.

    The embedded default is made where the cache lacks it. Raises ValueError for a base that cannot
    be loaded.
    """
    base = base or base_from_environment()
    if not base:
        dtype = choose_compute_dtype(_device())
        base = str(whole_embedded_checkpoint(dtype, only=CONFIG_NAME))
    return read_base_config(base)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
