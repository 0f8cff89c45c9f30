"""Load a base model and its tokenizer in 4 bits, with bitsandbytes.

The base is the embedded default, a Hub id or a folder; all of them end as the same `LoadedBase`.

4-bit on a CPU: bitsandbytes multiplies by packed NF4 weights only where the CPU has AVX512-BF16.
Elsewhere it expands every weight again at every forward, so `expand_4bit_` expands them once: same
numbers, more memory.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import bitsandbytes as bnb
import torch
import transformers
from bitsandbytes.functional import has_avx512bf16
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as hf_logging

from spectr_demo.base.embedded import SMOLLM2_135M, fetch_gguf
from spectr_demo.base.files import cache_errors, cache_lock, check_space, publish, scratch_dir
from spectr_demo.base.memory import available_memory, execution_device
from spectr_demo.config import (
    base_from_environment,
    cache_dir,
    device_map_from_environment,
    is_zero_gpu,
    unknown_name,
)
from spectr_demo.cpu.attention import pack_heads_
from spectr_demo.cpu.prompt_linear import make_prompt_linear_
from spectr_demo.cpu.token_linear import make_token_linear_

EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Dense float32 weights beside the NF4 checkpoint: the most that is on disk while converting.
CONVERSION_BYTES = 720_000_000
# Expanded weights may take this share of the free memory; the KV cache, the experts and the
# activations of a batch need the rest.
EXPANSION_SHARE = 0.5
ENDS_BYTES = 1 << 20
CHECKPOINT_SUFFIXES = {".json", ".jinja", ".safetensors"}
MANIFEST = "spectr-manifest.json"
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's
OFFLOADED = {"cpu", "disk"}  # in a device map: weights are brought in for each pass
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

# Makes the folder of the default's NF4 checkpoint in a compute dtype.
MakeCheckpoint = Callable[[Path, torch.dtype], None]
DeviceMap = str | Mapping[str, str | int]  # as `from_pretrained` of transformers takes it


@dataclass(frozen=True, kw_only=True)
class LoadedBase:
    """A frozen base model in eval mode, and what is to be said about it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str  # Hub id or folder
    name: str  # short, for headings
    quantization: str  # for people
    bits: int
    compute_dtype: torch.dtype
    fingerprint: str  # identifies the weights

    @property
    def device(self) -> torch.device:
        """Where token ids go. Asked each time: a ZeroGPU moves the model."""
        return execution_device(self.model.get_input_embeddings())


def embedded_checkpoint(cache: Path, dtype: torch.dtype) -> Path:
    """Folder of the default's NF4 checkpoint; whatever changes its bytes is part of its name."""
    major, minor = transformers.__version__.split(".")[:2]
    parts = (
        f"gguf-{SMOLLM2_135M.member_sha256[:12]}",
        f"nf4-{_dtype_name(dtype)}",
        f"bitsandbytes-{bnb.__version__}",
        f"transformers-{major}.{minor}",
    )
    return cache / "base" / "_".join(parts)


def is_whole(checkpoint: Path) -> bool:
    """Whether the folder holds what `make_embedded_checkpoint` wrote, as far as file ends say."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest == _digests(checkpoint))
    except (OSError, ValueError):
        return False


def whole_embedded_checkpoint(
    dtype: torch.dtype, make_checkpoint: MakeCheckpoint | None = None
) -> Path:
    """Folder of the default's NF4 checkpoint in the cache, which is made if need be."""
    checkpoint = embedded_checkpoint(cache_dir(), dtype)
    if not is_whole(checkpoint):
        (make_checkpoint or make_embedded_checkpoint)(checkpoint, dtype)
    return checkpoint


def make_embedded_checkpoint(target: Path, dtype: torch.dtype) -> None:
    """Convert the GGUF to an NF4 checkpoint with tokenizer; `target` appears when it is whole.

    What is not quantized, the embedding included, is stored in `dtype`, so nothing is rounded that
    loading in `dtype` would not round.
    """
    cache = cache_dir()
    gguf = fetch_gguf(cache=cache)
    with cache_errors(cache, needed_bytes=CONVERSION_BYTES), cache_lock(cache):
        if is_whole(target):  # another process made it while this one waited
            return
        shutil.rmtree(target, ignore_errors=True)
        check_space(cache, CONVERSION_BYTES)
        with scratch_dir(cache) as scratch:
            _say(f"Converting {gguf.name} (only at the first start) ...")
            dense = AutoModelForCausalLM.from_pretrained(
                cache,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=dtype,
            )
            tokenizer = AutoTokenizer.from_pretrained(cache, gguf_file=gguf.name)
            tokenizer.model_max_length = dense.config.max_position_embeddings
            _say("Quantizing to NF4 ...")
            # transformers quantizes only what it reads from a folder.
            dense.save_pretrained(scratch / "dense")
            model = AutoModelForCausalLM.from_pretrained(
                scratch / "dense",
                quantization_config=_nf4_config(dtype),
                dtype=dtype,
                device_map={"": "cpu"},
            )
            model.generation_config = GenerationConfig(
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
                pad_token_id=tokenizer.pad_token_id,
            )
            model.save_pretrained(scratch / "nf4")
            tokenizer.save_pretrained(scratch / "nf4")
            manifest = json.dumps(_digests(scratch / "nf4"))
            (scratch / "nf4" / MANIFEST).write_text(manifest, encoding="utf-8")
            publish(scratch / "nf4", target)


def load_base(
    base: str | None = None,
    *,
    device: str | None = None,
    device_map: DeviceMap | None = None,
    dtype: torch.dtype | None = None,
    make_checkpoint: MakeCheckpoint = make_embedded_checkpoint,
) -> LoadedBase:
    """Load a causal language model, quantized to NF4 unless its checkpoint is 4-bit already.

    base: Hub id or folder; None takes `SPECTR_BASE_MODEL`, else the embedded default.
    device: "cuda", "cuda:1" or "cpu"; None takes CUDA where there is one.
    device_map: spreads a base that is too large for one device: "auto", or which module goes where
        ("cpu" and "disk" hold weights that are brought in for each pass, and are not quantized).
        None takes `SPECTR_DEVICE_MAP`, else all of it goes to `device`.
    dtype: what layers compute in; None takes `choose_compute_dtype`.
    make_checkpoint: how the embedded default is made where the cache lacks it.
    Raises `ValueError` for a base or device that cannot be used, `EmbeddedBaseError` where the
    default cannot be fetched or stored.
    """
    base = base or base_from_environment()
    torch_device = _device(device)
    device_map = device_map or device_map_from_environment()
    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        raise unknown_name("device map", device_map, DEVICE_MAPS)
    if device_map is None or (isinstance(device_map, str) and torch_device.type == "cpu"):
        device_map = {"": str(torch_device)}
    dtype = dtype or choose_compute_dtype(torch_device)
    with _quiet_transformers():
        if base is None:
            source, name = f"{EMBEDDED_ID} (embedded)", EMBEDDED_ID.split("/")[1]
            fingerprint = f"gguf-sha256:{SMOLLM2_135M.member_sha256}"
            model, tokenizer = _load_embedded(device_map, dtype, make_checkpoint)
        else:
            config = read_base_config(base)
            source, name = base, Path(base).expanduser().resolve().name
            fingerprint = _fingerprint(base, config)
            model, tokenizer = _from_pretrained(base, config, device_map, dtype)
        bits, quantization = _settle_4bit_(model, dtype)
        if model.device.type == "cpu" and dtype == torch.bfloat16:
            pack_heads_(model)
    model.eval().requires_grad_(False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LoadedBase(
        model=model,
        tokenizer=tokenizer,
        source=source,
        name=name,
        quantization=quantization,
        bits=bits,
        compute_dtype=dtype,
        fingerprint=fingerprint,
    )


def choose_compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which 4-bit layers compute fast on this device without losing range.

    bfloat16 from CUDA capability 8.0 on, float16 below: `torch.cuda.is_bf16_supported()` says yes
    on a T4, which only emulates it. On CPUs bfloat16 only where bitsandbytes multiplies in it.
    """
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    return torch.bfloat16 if has_avx512bf16() else torch.float32


def read_base_config(base: str) -> PretrainedConfig:
    """Read a base's config and check that it can be loaded; raises `ValueError` saying why not."""
    folder = Path(base).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"base {base!r}: the folder has no config.json. A folder written by "
                "save_pretrained() was needed; an adapter's folder is an expert, not a base."
            )
    elif not HUB_ID.fullmatch(base):
        raise ValueError(
            f"base {base!r}: there is no such folder, and it is not a Hub id (owner/name). "
            "Check the path."
        )
    try:
        config = AutoConfig.from_pretrained(folder if folder.is_dir() else base)
    except Exception as error:  # other people's files fail in many ways
        raise ValueError(_unreadable(base, "config", error)) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"base {base!r}: it is a {config.model_type!r} model, a causal language model was "
            "needed. Choose one that AutoModelForCausalLM of transformers loads."
        )
    stored = getattr(config, "quantization_config", None)
    if stored is not None and not stored.get("load_in_4bit", False):
        raise ValueError(
            f"base {base!r}: its weights are quantized ({stored.get('quant_method', 'unknown')}), "
            "plain or bitsandbytes 4-bit weights were needed. Choose the unquantized checkpoint; "
            "it is quantized while loading."
        )
    return config


def expand_4bit_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace every `Linear4bit` by an `nn.Linear` with the same NF4 values, in `dtype`.

    Must come before the first forward: on CPUs with the fused kernel that forward reorders the
    packed weights in place, and dequantizing them then gives garbage.
    """
    model.dequantize(dtype=dtype)
    # transformers leaves this flag behind, and PEFT would take the layers for 4-bit ones.
    del model.is_loaded_in_4bit
    model.requires_grad_(False)


def _settle_4bit_(model: PreTrainedModel, dtype: torch.dtype) -> tuple[int, str]:
    """Make the 4-bit layers ready to run where they are; bits of a value, and a description."""
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    places = sorted({str(place) for place in getattr(model, "hf_device_map", {}).values()})
    spread = f"spread over {', '.join(places)}" if len(places) > 1 else ""
    if not layers and spread and OFFLOADED.issuperset(places):
        return 8 * dtype.itemsize, f"unquantized, {spread}"
    if not layers:
        raise ValueError(
            f"base {model.name_or_path!r}: {type(model).__name__} has no linear layer that "
            "bitsandbytes can quantize. Choose another base."
        )
    for layer in layers:  # a checkpoint that was 4-bit already brings its maker's choice
        layer.compute_dtype, layer.compute_type_is_set = dtype, True
    state = cast(bnb.nn.Params4bit, layers[0].weight).quant_state
    kind = state.quant_type.upper()
    packed = f"{kind}, double quantization" if state.nested else kind
    if spread:
        kept = "; unquantized on cpu and disk" if OFFLOADED.intersection(places) else ""
        return 4, f"{packed}, {spread}{kept}"
    if model.device.type != "cpu":
        return 4, packed
    # The fused kernel computes in bfloat16 whatever it is given, and there are no gradients through
    # the weights that it reordered; so other dtypes are expanded too.
    if not (has_avx512bf16() and dtype == torch.bfloat16):
        num_weights = sum(layer.in_features * layer.out_features for layer in layers)
        if num_weights * dtype.itemsize <= EXPANSION_SHARE * available_memory():
            expand_4bit_(model, dtype)
            if dtype == torch.float32:
                make_token_linear_(model)
            name = _dtype_name(dtype)
            return 4, f"{kind} values, expanded to {name} (this CPU has no 4-bit kernel for {name})"
        for layer in layers:
            layer.support_avx512bf16_for_cpu = False
        return 4, f"{packed}, expanded again at every step (too little memory to keep it expanded)"
    make_prompt_linear_(model)
    # The first forward repacks weights in place, which two threads must not do at once.
    with torch.no_grad():
        model.eval()(torch.zeros(1, 1, dtype=torch.long), use_cache=False)
    return 4, packed


def _load_embedded(
    device_map: DeviceMap, dtype: torch.dtype, make_checkpoint: MakeCheckpoint
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the default from its NF4 checkpoint in the cache; make that first if need be.

    Reading the checkpoint takes seconds, converting the GGUF the better part of a minute.
    """
    checkpoint = whole_embedded_checkpoint(dtype, make_checkpoint)
    config = read_base_config(str(checkpoint))
    model, tokenizer = _from_pretrained(str(checkpoint), config, device_map, dtype)
    # PEFT writes this into adapter_config.json as the base that an adapter was trained on.
    model.config._name_or_path = model.name_or_path = EMBEDDED_ID
    return model, tokenizer


def _from_pretrained(
    base: str, config: PretrainedConfig, device_map: DeviceMap, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load safetensors weights without running anybody's code; quantize unless they are 4-bit."""
    folder = Path(base).expanduser()
    where = folder if folder.is_dir() else base
    is_quantized = getattr(config, "quantization_config", None) is not None
    places = {"auto"} if isinstance(device_map, str) else set(device_map.values())
    if is_quantized and len(places) > 1 and places & OFFLOADED:
        raise ValueError(
            f"base {base!r}: its weights are in 4 bits already; to keep some on CPU or disk, "
            "unquantized ones were needed. Leave these out of the device map, or choose the "
            "unquantized checkpoint."
        )
    quantization = _nf4_config(dtype, can_offload=len(places) > 1 or places == {"auto"})
    if is_zero_gpu():
        # ZeroGPU's stand-in for CUDA lives on the main thread; transformers loads on others.
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = AutoModelForCausalLM.from_pretrained(
            where,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            device_map=device_map,
            **({} if is_quantized else {"quantization_config": quantization}),
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # other people's files fail in many ways
        raise ValueError(_unreadable(base, "weights or tokenizer", error)) from error
    return model, tokenizer


def _nf4_config(dtype: torch.dtype, *, can_offload: bool = False) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # Despite its name: what a device map leaves on the CPU or on disk is not quantized.
        llm_int8_enable_fp32_cpu_offload=can_offload,
    )


def _device(requested: str | None) -> torch.device:
    has_cuda = torch.cuda.is_available()
    device = torch.device(requested or ("cuda" if has_cuda else "cpu"))
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"device {requested!r}: 'cuda' or 'cpu' was needed.")
    if device.type == "cuda" and not has_cuda:
        raise ValueError(f"device {requested!r}: torch finds no CUDA device here. Choose 'cpu'.")
    return device


def _unreadable(base: str, what: str, error: Exception) -> str:
    remedy = (
        "Check the folder's files; weights must be safetensors, and code in it is never run."
        if Path(base).expanduser().is_dir()
        else "Check the id and the network; a gated model needs `hf auth login`. A folder works "
        "without a network."
    )
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return f"base {base!r}: its {what} could not be read ({reason}). {remedy}"


def _fingerprint(base: str, config: PretrainedConfig) -> str:
    """What tells these weights from others: the Hub's commit, or a hash over the folder's files."""
    folder = Path(base).expanduser()
    if not folder.is_dir():
        return f"hub-commit:{config._commit_hash or 'unknown'}"
    return f"folder-sha256:{_sha256(json.dumps(_digests(folder)).encode())}"


def _digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of the size and both ends (1 MiB each) of each file of a checkpoint, by name.

    Tells a file cut short and fine-tunes of one model apart, without reading gigabytes.
    """
    digests = {}
    for path in sorted(checkpoint.iterdir()):
        if path.suffix in CHECKPOINT_SUFFIXES and path.name != MANIFEST:
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(ENDS_BYTES)
                file.seek(max(size - ENDS_BYTES, 0))
                digests[path.name] = _sha256(f"{size} ".encode() + head + file.read())
    return digests


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' bars and notes off the terminal: they count tensors, not the work."""
    verbosity, had_bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if had_bars:
            hf_logging.enable_progress_bar()
