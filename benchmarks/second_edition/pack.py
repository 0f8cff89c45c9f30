"""Pack the default base for train.py: 85 MB that need neither bitsandbytes nor a tokenizer there.

    python benchmarks/second_edition/pack.py DATA

Writes DATA/base.safetensors (NF4 codes of the linear layers, Q8_0 codes of the embedding) and
DATA/vocabulary.npz (the bytes of each token). It checks that both give back the very values that
are served: adapters are trained on them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import gguf
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script

from spectr_demo.base.checkpoint import whole_embedded_checkpoint
from spectr_demo.base.embedded import fetch_gguf
from spectr_demo.config import cache_dir

BLOCK = 32  # values of a Q8_0 block: a float16 scale, then their int8 codes


def packed_embedding(path: Path, served: Tensor) -> dict[str, Tensor]:
    """Codes (V, D) int8 and scales (V, D / 32) float16 of the GGUF's embedding."""
    tensors = gguf.GGUFReader(path).tensors
    (tensor,) = (t for t in tensors if t.name == "token_embd.weight")
    blocks = np.array(tensor.data).reshape(len(served), -1, 2 + BLOCK)
    scale = torch.from_numpy(blocks[:, :, :2].copy().view(np.float16)[..., 0])
    codes = torch.from_numpy(blocks[:, :, 2:].copy().view(np.int8))
    values = (scale.float()[..., None] * codes.float()).view(served.shape).to(served.dtype)
    assert torch.equal(values, served), "the embedding is not the one that is served"
    return {"embed.q": codes.view(served.shape), "embed.scale": scale}


def packed_linear(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    """The NF4 parts of one linear layer, from the checkpoint's tensors under `key`."""
    name = key.removeprefix("model.")
    (about,) = (k for k in state if k.startswith(f"{key}.quant_state"))
    meta = json.loads(bytes(state[about].numpy()))
    absmax, nested = state[f"{key}.absmax"], state[f"{key}.nested_absmax"]
    offset = torch.tensor([meta["nested_offset"]], dtype=torch.float32)
    codes = state[key].flatten()
    nibbles = torch.stack([codes.long() >> 4, codes.long() & 15], 1).flatten()
    scale = state[f"{key}.nested_quant_map"][absmax.long()]
    scale = scale * nested.repeat_interleave(256)[: len(absmax)] + offset
    values = (state[f"{key}.quant_map"][nibbles].view(-1, 64) * scale[:, None]).view(meta["shape"])
    parts = {k.removeprefix(f"{key}."): t for k, t in state.items() if k.startswith(f"{key}.")}
    quantized = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
    served = bnb.dequantize_4bit(state[key], quantized)
    assert torch.equal(values.to(served.dtype), served), f"{key} is not what is served"
    return {
        f"{name}.packed": codes,
        f"{name}.absmax": absmax,
        f"{name}.nested": nested,
        f"{name}.offset": offset,
        "nested_map": state[f"{key}.nested_quant_map"],  # the same in all layers
        "code": state[f"{key}.quant_map"],
    }


def packed_base(checkpoint: Path, gguf_file: Path) -> dict[str, Tensor]:
    with safe_open(checkpoint / "model.safetensors", "pt") as stored:
        state = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (no dict)
    out = packed_embedding(gguf_file, state["model.embed_tokens.weight"])
    for key, tensor in state.items():
        if key.endswith("norm.weight"):
            out[key.removeprefix("model.")] = tensor
        elif key.endswith("proj.weight"):
            out |= packed_linear(state, key)
    return {key: tensor.contiguous() for key, tensor in out.items()}


def token_bytes(tokenizer_file: Path) -> list[bytes]:
    """The bytes of each token of a byte-level BPE; none for special tokens."""
    stored = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    # GPT-2's table: printable bytes stand for themselves, the others for letters from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    vocabulary = stored["model"]["vocab"]
    out = [b""] * (max(vocabulary.values()) + 1)
    special = {token["id"] for token in stored["added_tokens"]}
    for token, number in vocabulary.items():
        if number not in special:
            known = all(letter in letters for letter in token)
            out[number] = bytes(letters[x] for x in token) if known else token.encode()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data
    data.mkdir(parents=True, exist_ok=True)
    checkpoint = whole_embedded_checkpoint(torch.bfloat16)
    save_file(packed_base(checkpoint, fetch_gguf(cache=cache_dir())), data / "base.safetensors")
    tokens = token_bytes(checkpoint / "tokenizer.json")
    lengths = np.array([len(token) for token in tokens], np.int16)
    blob = np.frombuffer(b"".join(tokens), np.uint8)
    np.savez_compressed(data / "vocabulary.npz", lengths=lengths, blob=blob)


if __name__ == "__main__":
    main()
