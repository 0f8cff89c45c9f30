"""Load a base model and its tokenizer in 4 bits: `load_base`.

The base is the embedded default (`embedded`, `checkpoint`), a Hub id or a folder. All of them are
quantized alike (`quantization`) and end as the same `LoadedBase`.
"""

import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import CONFIG_NAME, cached_file, extract_commit_hash
from transformers.utils import logging as hf_logging

from spectr_demo.base.checkpoint import (
    MakeCheckpoint,
    digest,
    digests,
    make_embedded_checkpoint,
    whole_embedded_checkpoint,
)
from spectr_demo.base.embedded import EMBEDDED_ID, SMOLLM2_135M
from spectr_demo.base.generation import read_generation
from spectr_demo.base.memory import execution_device
from spectr_demo.base.quantization import (
    OFFLOADED,
    cast_unquantized_,
    choose_compute_dtype,
    nf4_config,
    settle_4bit_,
)
from spectr_demo.base.templates import read_processor_template, settle_template_
from spectr_demo.config import (
    base_from_environment,
    device_map_from_environment,
    is_zero_gpu,
    unknown_name,
)

logger = logging.getLogger(__name__)

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

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
    notices: tuple[str, ...] = ()  # what of its files is used otherwise than they say

    @property
    def device(self) -> torch.device:
        """Where token ids go. Asked each time: a ZeroGPU moves the model."""
        return execution_device(self.model.get_input_embeddings())

    @property
    def context(self) -> int:
        """How many tokens the base can read, prompt and answer together; `sys.maxsize` where its
        configuration names no limit."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or sys.maxsize


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
            model, tokenizer, notices = _load_embedded(device_map, dtype, make_checkpoint)
        else:
            config = read_base_config(base)
            source, name = base, Path(base).expanduser().resolve().name
            fingerprint = _fingerprint(base)
            model, tokenizer, notices = _from_pretrained(base, config, device_map, dtype)
        bits, quantization = settle_4bit_(model, dtype)
    for notice in notices:
        logger.warning(notice)
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
        notices=tuple(notices),
    )


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
        config = AutoConfig.from_pretrained(_where(base), trust_remote_code=False)
    except Exception as error:  # other people's files fail in many ways
        raise ValueError(_unreadable(base, "config", error)) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"base {base!r}: it is a {config.model_type!r} model, a causal language model was "
            "needed. Choose one that AutoModelForCausalLM of transformers loads."
        )
    is_encoder = hasattr(config, "add_cross_attention") and not getattr(config, "is_decoder", True)
    if is_encoder and not config.is_encoder_decoder:  # BERT and its kin
        raise ValueError(
            f"base {base!r}: it is an encoder (a {config.model_type!r} model with "
            "is_decoder=False), whose tokens see those after them; a decoder was needed. Choose "
            "another base."
        )
    stored = getattr(config, "quantization_config", None)
    if stored is not None and not stored.get("load_in_4bit", False):
        raise ValueError(
            f"base {base!r}: its weights are quantized ({stored.get('quant_method', 'unknown')}), "
            "plain or bitsandbytes 4-bit weights were needed. Choose the unquantized checkpoint; "
            "it is quantized while loading."
        )
    for part in (config, config.get_text_config()):
        # Files of training have these switched; passes give what is asked of them, and no more.
        part.return_dict, part.output_hidden_states, part.output_attentions = True, False, False
        if hasattr(part, "use_cache"):
            part.use_cache = True
    return config


def _where(base: str) -> str | Path:
    """What transformers reads a base from: its folder, or its Hub id."""
    folder = Path(base).expanduser()
    return folder if folder.is_dir() else base


def _load_embedded(
    device_map: DeviceMap, dtype: torch.dtype, make_checkpoint: MakeCheckpoint
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """Load the default from its NF4 checkpoint in the cache; make that first if need be.

    Reading the checkpoint takes seconds, converting the GGUF the better part of a minute.
    """
    checkpoint = whole_embedded_checkpoint(dtype, make_checkpoint)
    config = read_base_config(str(checkpoint))
    model, tokenizer, notices = _from_pretrained(str(checkpoint), config, device_map, dtype)
    # PEFT writes this into adapter_config.json as the base that an adapter was trained on.
    model.config._name_or_path = model.name_or_path = EMBEDDED_ID
    return model, tokenizer, notices


def _from_pretrained(
    base: str, config: PretrainedConfig, device_map: DeviceMap, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """Load safetensors weights without running anybody's code; quantize unless they are 4-bit.

    Returns what is to be said about the base's files, too.
    """
    where = _where(base)
    is_quantized = getattr(config, "quantization_config", None) is not None
    places = {"auto"} if isinstance(device_map, str) else set(device_map.values())
    if is_quantized and len(places) > 1 and places & OFFLOADED:
        raise ValueError(
            f"base {base!r}: its weights are in 4 bits already; to keep some on CPU or disk, "
            "unquantized ones were needed. Leave these out of the device map, or choose the "
            "unquantized checkpoint."
        )
    quantization = nf4_config(dtype, can_offload=len(places) > 1 or places == {"auto"})
    if is_zero_gpu():
        # ZeroGPU's stand-in for CUDA lives on the main thread; transformers loads on others.
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    generation, notices = read_generation(base, where, config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where,
            output_loading_info=True,
            config=config,
            generation_config=generation,
            trust_remote_code=False,
            dtype=dtype,
            use_safetensors=True,
            device_map=device_map,
            **({} if is_quantized else {"quantization_config": quantization}),
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # other people's files fail in many ways
        raise ValueError(_unreadable(base, "weights or tokenizer", error)) from error
    model, found = loaded
    if missing := sorted(found["missing_keys"]):  # transformers gives them random values
        raise ValueError(
            f"base {base!r}: its files lack {len(missing)} weights of a {type(model).__name__} "
            f"({missing[0]}, ...). Choose a whole checkpoint of a causal language model."
        )
    if tokenizer.chat_template is None:
        tokenizer.chat_template = read_processor_template(where)
    settle_template_(tokenizer, f"base {base!r}")
    if is_quantized:
        cast_unquantized_(model, dtype)
    return model, tokenizer, notices


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
    if "trust_remote_code" in str(error):
        return (
            f"base {base!r}: its {what} needs code that comes with it, and such code is never run. "
            "Choose a base whose architecture transformers has."
        )
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return f"base {base!r}: its {what} could not be read ({reason}). {remedy}"


def _fingerprint(base: str) -> str:
    """What tells these weights from others: the Hub's commit, or a hash over the folder's files."""
    folder = Path(base).expanduser()
    if not folder.is_dir():
        commit = extract_commit_hash(cached_file(base, CONFIG_NAME), None)
        return f"hub-commit:{commit or 'unknown'}"
    content = json.dumps(digests(folder, digest)).encode()
    return f"folder-sha256:{hashlib.sha256(content).hexdigest()}"


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
