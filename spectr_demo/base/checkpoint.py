"""The embedded default as an NF4 checkpoint in the cache: made once, from the GGUF, then only read.

Reading the checkpoint takes seconds. Converting the GGUF takes the better part of a minute.
"""

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from spectr_demo.base.embedded import SMOLLM2_135M, cache_errors, fetch_gguf
from spectr_demo.base.files import cache_lock, check_space, file_sha256, publish, scratch_dir
from spectr_demo.base.quantization import dtype_name, nf4_config
from spectr_demo.config import cache_dir

logger = logging.getLogger(__name__)

# Dense float32 weights beside the NF4 checkpoint: the most that is on disk while converting.
CONVERSION_BYTES = 720_000_000
ENDS_BYTES = 1 << 20
CHECKPOINT_SUFFIXES = {".json", ".jinja", ".safetensors"}
MANIFEST = "spectr-manifest.json"

# Makes the folder of the default's NF4 checkpoint in a compute dtype.
MakeCheckpoint = Callable[[Path, torch.dtype], None]


def embedded_checkpoint(cache: Path, dtype: torch.dtype) -> Path:
    """Folder of the default's NF4 checkpoint; whatever changes its bytes is part of its name."""
    major, minor = transformers.__version__.split(".")[:2]
    parts = (
        f"gguf-{SMOLLM2_135M.member_sha256[:12]}",
        f"nf4-{dtype_name(dtype)}",
        f"bitsandbytes-{bnb.__version__}",
        f"transformers-{major}.{minor}",
    )
    return cache / "base" / "_".join(parts)


def is_whole(checkpoint: Path, only: str | None = None) -> bool:
    """Whether the folder holds what `make_embedded_checkpoint` wrote, to the last bit.

    only: the one of its files that is looked at.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        if only is not None:
            return bool(manifest[only] == file_sha256(checkpoint / only))
        return bool(manifest == digests(checkpoint))
    except (OSError, ValueError, LookupError, TypeError):
        return False


def whole_embedded_checkpoint(
    dtype: torch.dtype, make_checkpoint: MakeCheckpoint | None = None, only: str | None = None
) -> Path:
    """Folder of the default's NF4 checkpoint in the cache, which is made if need be.

    only: the one file of it that is read. Raises what `make_embedded_checkpoint` raises.
    """
    checkpoint = embedded_checkpoint(cache_dir(), dtype)
    if not is_whole(checkpoint, only):
        if checkpoint.exists():
            logger.warning("%s is damaged and is made again", checkpoint)
        (make_checkpoint or make_embedded_checkpoint)(checkpoint, dtype)
    return checkpoint


def make_embedded_checkpoint(target: Path, dtype: torch.dtype) -> None:
    """Convert the GGUF to an NF4 checkpoint with tokenizer; `target` appears when it is whole.

    What is not quantized, the embedding included, is stored in `dtype`. So nothing is rounded that
    loading in `dtype` would not round. Raises `EmbeddedBaseError` where the GGUF cannot be fetched
    or the checkpoint cannot be stored.
    """
    cache = cache_dir()
    gguf = fetch_gguf(cache=cache)
    with cache_errors(cache, needed_bytes=CONVERSION_BYTES), cache_lock(cache):
        if is_whole(target):  # another process made it while this one waited
            return
        shutil.rmtree(target, ignore_errors=True)
        check_space(cache, CONVERSION_BYTES)
        with scratch_dir(cache) as scratch:
            _convert(gguf, scratch, dtype)
            publish(scratch / "nf4", target)


def _convert(gguf: Path, scratch: Path, dtype: torch.dtype) -> None:
    """Write the checkpoint to `scratch / "nf4"`, by way of dense weights in `scratch / "dense"`."""
    _say(f"Converting {gguf.name} (only at the first start) ...")
    dense = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=dtype,
        trust_remote_code=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, trust_remote_code=False
    )
    tokenizer.model_max_length = dense.config.max_position_embeddings
    _say("Quantizing to NF4 ...")
    # transformers quantizes only what it reads from a folder.
    dense.save_pretrained(scratch / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        scratch / "dense",
        quantization_config=nf4_config(dtype),
        dtype=dtype,
        device_map={"": "cpu"},
        trust_remote_code=False,
    )
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(scratch / "nf4")
    tokenizer.save_pretrained(scratch / "nf4")
    manifest = json.dumps(digests(scratch / "nf4"))
    (scratch / "nf4" / MANIFEST).write_text(manifest, encoding="utf-8")


def digests(checkpoint: Path, of: Callable[[Path], str] = file_sha256) -> dict[str, str]:
    """SHA-256 (hex) of each file of a checkpoint, by name; or what else tells files apart."""
    return {
        path.name: of(path)
        for path in sorted(checkpoint.iterdir())
        if path.suffix in CHECKPOINT_SUFFIXES and path.name != MANIFEST
    }


def digest(file: Path) -> str:
    """SHA-256 (hex) of a file's size and both its ends (1 MiB each).

    This tells a file that was cut short, and tells fine-tunes of one model apart. No gigabytes are
    read for it.
    """
    size = file.stat().st_size
    with file.open("rb") as content:
        head = content.read(ENDS_BYTES)
        content.seek(max(size - ENDS_BYTES, 0))
        return hashlib.sha256(f"{size} ".encode() + head + content.read()).hexdigest()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
