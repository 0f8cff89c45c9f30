"""Four bits: how a base is quantized, in which dtype it computes, how its layers run on a device.

On a CPU bitsandbytes multiplies by packed NF4 weights only where the CPU has AVX512-BF16. Elsewhere
it expands every weight again at every forward. `expand_4bit_` expands them once: the numbers are
the same, and they take more memory.
"""

import itertools
import re
from collections.abc import Sequence
from typing import cast

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer

from spectr_demo import cpu
from spectr_demo.base.memory import available_memory

# Bytes of a 4-bit weight with its double-quantised scale.
NF4_BYTES = 0.52
# bitsandbytes' kernel for a CPU takes so many outputs at once.
KERNEL_OUTPUTS = 32
# Expanded weights may take this share of the free memory; the KV cache, the experts and the
# activations of a batch need the rest.
EXPANSION_SHARE = 0.5
OFFLOADED = {"cpu", "disk"}  # in a device map: weights are brought in for each pass


def choose_compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which 4-bit layers compute fast on this device without losing range.

    On CUDA it is bfloat16 from capability 8.0 on, and float16 below.
    `torch.cuda.is_bf16_supported()` is not asked: it says yes on a T4, which only emulates it. On a
    CPU it is bfloat16 where bitsandbytes multiplies in it, and float32 elsewhere.
    """
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    return torch.bfloat16 if has_avx512bf16() else torch.float32


def nf4_config(dtype: torch.dtype, *, can_offload: bool = False) -> BitsAndBytesConfig:
    """NF4 with double quantization, computing in `dtype`.

    can_offload: whether a device map may leave layers on the CPU or on disk, unquantized.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # Despite its name: what a device map leaves on the CPU or on disk is not quantized.
        llm_int8_enable_fp32_cpu_offload=can_offload,
    )


def is_quantizable(layer: nn.Module) -> bool:
    """Whether loading in 4 bits quantizes this layer of a dense model's decoder.

    transformers leaves subclasses of `nn.Linear` as they are: all of Falcon's layers are such.
    """
    return type(layer) is nn.Linear or isinstance(layer, Conv1D)


def settle_4bit_(model: PreTrainedModel, dtype: torch.dtype) -> tuple[int, str]:
    """Make the 4-bit layers ready to run where they are.

    dtype: what they compute in. Returns the bits of a weight, and a description for people. A base
    has no such layer where all of them were kept on CPU and disk, or are of its own class.
    """
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    places = sorted({str(place) for place in getattr(model, "hf_device_map", {}).values()})
    spread = f"spread over {', '.join(places)}" if len(places) > 1 else ""
    if not layers:
        return 8 * dtype.itemsize, f"unquantized, {spread}" if spread else "unquantized"
    for layer in layers:  # a checkpoint that was 4-bit already brings its maker's choice
        layer.compute_dtype, layer.compute_type_is_set = dtype, True
        cast(bnb.nn.Params4bit, layer.weight).quant_state.dtype = dtype  # of expanded weights
    state = cast(bnb.nn.Params4bit, layers[0].weight).quant_state
    kind = state.quant_type.upper()
    packed = f"{kind}, double quantization" if state.nested else kind
    if spread:
        kept = "; unquantized on cpu and disk" if OFFLOADED.intersection(places) else ""
        return 4, f"{packed}, {spread}{kept}"
    if model.device.type == "cpu":
        packed = _settle_on_cpu_(model, layers, dtype, kind, packed)
    return 4, packed


def _settle_on_cpu_(
    model: PreTrainedModel,
    layers: Sequence[bnb.nn.Linear4bit],
    dtype: torch.dtype,
    kind: str,
    packed: str,
) -> str:
    """Keep the weights packed or expand them, then speed the model up; returns the description.

    kind, packed: what the layers are, in short and with their scales.
    """
    # The fused kernel computes in bfloat16 whatever it is given, and there are no gradients through
    # the weights that it reordered; so other dtypes are expanded too.
    if has_avx512bf16() and dtype == torch.bfloat16:
        if unfit := [layer for layer in layers if not _fits_kernel(layer)]:
            has_room = _has_room(unfit, dtype)
            _expand_some_(model, unfit) if has_room else _expand_at_every_step_(unfit)
            how = "expanded" if has_room else "expanded again at every step"
            packed += f"; {len(unfit)} of {len(layers)} layers {how} (no 4-bit kernel fits them)"
        # The first forward repacks weights in place, which two threads must not do at once.
        with torch.no_grad():
            model.eval()(torch.zeros(1, 1, dtype=torch.long), use_cache=False)
    elif _has_room(layers, dtype):
        expand_4bit_(model)
        name = dtype_name(dtype)
        packed = f"{kind} values, expanded to {name} (this CPU has no 4-bit kernel for {name})"
    else:
        _expand_at_every_step_(layers)
        return f"{packed}, expanded again at every step (too little memory to keep it expanded)"
    cpu.speed_up_(model, dtype)
    return packed


def _has_room(layers: Sequence[bnb.nn.Linear4bit], dtype: torch.dtype) -> bool:
    """Whether these layers may be kept expanded."""
    num_weights = sum(layer.in_features * layer.out_features for layer in layers)
    return num_weights * dtype.itemsize <= EXPANSION_SHARE * available_memory()


def _fits_kernel(layer: bnb.nn.Linear4bit) -> bool:
    """Whether the fused kernel can multiply by this layer's weights."""
    blocksize = cast(bnb.nn.Params4bit, layer.weight).quant_state.blocksize
    return layer.out_features % KERNEL_OUTPUTS == 0 and layer.in_features % blocksize == 0


def _expand_at_every_step_(layers: Sequence[bnb.nn.Linear4bit]) -> None:
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False


def expand_4bit_(model: PreTrainedModel) -> None:
    """Replace every `Linear4bit` by an `nn.Linear` with the same values; the model is a dense one.

    It must come before the first forward. On CPUs with the fused kernel that forward reorders the
    packed weights in place, and dequantizing them then gives garbage. transformers' `dequantize`
    is not used: a layer that has two names would stay in 4 bits under one of them.
    """
    _expand_some_(model, [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)])
    cast(HfQuantizer, model.hf_quantizer).remove_quantization_config(model)
    # transformers leaves this flag behind, and PEFT would take the layers for 4-bit ones.
    del model.is_loaded_in_4bit


def _expand_some_(model: PreTrainedModel, layers: Sequence[bnb.nn.Linear4bit]) -> None:
    """Replace these layers, under all their names, by an `nn.Linear` with the same values."""
    expanded: dict[nn.Module, nn.Linear] = {}
    for layer in layers:
        packed = cast(bnb.nn.Params4bit, layer.weight)
        weight = dequantize_4bit(packed.data, packed.quant_state)
        D_out, D_in = weight.shape
        expanded[layer] = nn.Linear(D_in, D_out, bias=False, device="meta")
        expanded[layer].weight = nn.Parameter(weight, requires_grad=False)
        expanded[layer].bias = layer.bias
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in expanded:
            model.set_submodule(path, expanded[module])


def cast_unquantized_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Bring what is not in 4 bits to the dtype that it has in a model loaded in `dtype`.

    transformers leaves these parts of a 4-bit checkpoint in the dtype of the file. A few of them
    are float32 whatever the rest computes in.
    """
    if all(p.dtype == dtype or isinstance(p, bnb.nn.Params4bit) for p in model.parameters()):
        return
    in_float32 = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        in_float32 |= set(model._keep_in_fp32_modules or ())
    stored = model.state_dict().keys()  # without what is computed from the configuration
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        is_plain = tensor.is_floating_point() and not isinstance(tensor, bnb.nn.Params4bit)
        if is_plain and name in stored:
            is_kept = any(re.search(pattern, name) for pattern in in_float32)
            tensor.data = tensor.data.to(torch.float32 if is_kept else dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """The name without `torch.`."""
    return str(dtype).removeprefix("torch.")
