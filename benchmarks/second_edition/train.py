"""Train many LoRA experts at once: one pass of the base for all, another adapter in each row.

    python train.py --data DATA --out RESULTS --budget 480
    python train.py --data DATA --out RESULTS --budget 420 --winner off-fast --final-steps 700
    python train.py --data DATA --out RESULTS --device cpu --tiny --variants single --batch 16 \
        --max-tokens 3000 --num-single 1 --num-single-final 1 --thin 150 --budget 3000

DATA is what pack.py and build.py wrote; where it has a folder distractors (what
../distractors/build.py wrote), those adapters are trained too. The second command leaves the
experiment out. The third is a dry run of every stage: it takes five minutes on a CPU. RESULTS has
experts_*.safetensors, distractors_*.safetensors, record.json (answers and figures) and what
score.py reads. Each stage writes what it has, so a run that is cut keeps it.

This is one file of more than 350 lines because it travels alone: the machine with the GPU had no
network, and nothing of this project. It needs torch, numpy and safetensors.

Axes: R rows, T tokens, E experts, K experts of one row, L layers, r rank.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

L, D, HEADS, KV_HEADS, HEAD, HIDDEN, VOCAB = 30, 576, 9, 3, 64, 1536, 49152
EPS, THETA = 9.999999747378752e-06, 100000.0
END = 2
RANK, SCALING = 8, 2.0
DIALECT = torch.bfloat16
# What a token of a training row belongs to.
PREFIX, OWN, FOREIGN, LABEL = 0, 1, 2, 128
STARTED = time.monotonic()


def say(*words: Any) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f}s]", *words, flush=True)


# ---------------------------------------------------------------- the base


@dataclass
class Layer:
    """Weights (D_out, D_in) in bfloat16, exactly the NF4 values that are served."""

    norm_1: Tensor
    qkv: Tensor
    o: Tensor
    norm_2: Tensor
    gate_up: Tensor
    down: Tensor


class Base:
    """SmolLM2-135M, dense: NF4 and Q8_0 values expanded once."""

    def __init__(self, path: Path, device: torch.device) -> None:
        packed = {name: tensor.to(device) for name, tensor in load_file(path).items()}
        self.device = device

        def dense(name: str, rows: int) -> Tensor:
            key = f"{name}.weight"
            absmax = packed["nested_map"][packed[f"{key}.absmax"].long()]
            absmax = absmax * packed[f"{key}.nested"].repeat_interleave(256)[: absmax.numel()]
            absmax = absmax + packed[f"{key}.offset"]
            codes = packed[f"{key}.packed"].long()
            nibbles = torch.stack([codes >> 4, codes & 15], 1).flatten()
            values = packed["code"][nibbles].view(-1, 64) * absmax[:, None]
            return values.view(rows, -1).to(DIALECT)

        self.layers = []
        for i in range(L):
            at, mlp = f"layers.{i}.self_attn", f"layers.{i}.mlp"
            self.layers.append(
                Layer(
                    packed[f"layers.{i}.input_layernorm.weight"].to(DIALECT),
                    torch.cat(
                        [
                            dense(f"{at}.q_proj", D),
                            dense(f"{at}.k_proj", KV_HEADS * HEAD),
                            dense(f"{at}.v_proj", KV_HEADS * HEAD),
                        ]
                    ),
                    dense(f"{at}.o_proj", D),
                    packed[f"layers.{i}.post_attention_layernorm.weight"].to(DIALECT),
                    torch.cat([dense(f"{mlp}.gate_proj", HIDDEN), dense(f"{mlp}.up_proj", HIDDEN)]),
                    dense(f"{mlp}.down_proj", D),
                )
            )
        quantized = packed["embed.q"].view(VOCAB, -1, 32).float()
        embedding = (packed["embed.scale"].float()[..., None] * quantized).view(VOCAB, D)
        self.embedding = embedding.to(DIALECT)
        self.norm = packed["norm.weight"].to(DIALECT)
        powers = torch.arange(0, HEAD, 2, device=device).float() / HEAD
        angles = torch.arange(2048, device=device).float()[:, None] * (THETA**-powers)[None]
        angles = torch.cat([angles, angles], 1)
        self.cos, self.sin = angles.cos().to(DIALECT), angles.sin().to(DIALECT)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (R, heads, T, 64); cos, sin: (R or 1, 1, T, 64)."""
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat([-two, one], -1) * sin


# ---------------------------------------------------------------- the experts

# Name -> (inputs, outputs) of the fused layers; each output block has its own rank-8 part.
BLOCKS = {
    "qkv": (D, [D, KV_HEADS * HEAD, KV_HEADS * HEAD]),
    "o": (D, [D]),
    "gate_up": (D, [HIDDEN, HIDDEN]),
    "down": (HIDDEN, [D]),
}
MODULES = {
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "o": ["self_attn.o_proj"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "down": ["mlp.down_proj"],
}


ALL_LINEAR = tuple(module.split(".")[1] for block in MODULES.values() for module in block)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """An adapter's rank, and the linear layers it changes by their last name (q_proj)."""

    rank: int = RANK
    modules: tuple[str, ...] = ALL_LINEAR


def seed_of(name: str) -> int:
    """The seed of an expert's initialisation and data order: from its name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


class Bank:
    """E adapters as stacked float32 tensors: A (E, L, D_in, n r), B (E, L, n r, D_out).

    n: the linear layers that read the same input. B of fused layers is block-diagonal; the rest of
    it is 0 and stays 0. r is the largest rank. What an adapter of a smaller shape lacks is 0 in A
    and in B, so that it has no gradient and stays 0.
    """

    def __init__(
        self, names: list[str], device: torch.device, shapes: list[Shape] | None = None
    ) -> None:
        self.names = names
        self.shapes = shapes or [Shape()] * len(names)
        self.rank = max(shape.rank for shape in self.shapes)
        self.a: dict[str, Tensor] = {}
        self.b: dict[str, Tensor] = {}
        self.blocks: dict[str, Tensor] = {}
        for block, (inputs, outputs) in BLOCKS.items():
            n = len(outputs) * self.rank
            self.a[block] = torch.zeros(len(names), L, inputs, n)
            self.b[block] = torch.zeros(len(names), L, n, sum(outputs), device=device)
            parts = [torch.ones(self.rank, width) for width in outputs]
            self.blocks[block] = torch.block_diag(*parts).to(device)
        for e, (name, shape) in enumerate(zip(names, self.shapes, strict=True)):
            generator = torch.Generator().manual_seed(seed_of(name.split("@")[0]))
            for block, (inputs, outputs) in BLOCKS.items():
                bound = 1 / math.sqrt(inputs)  # as PEFT starts lora_A
                drawn = torch.empty(L, inputs, len(outputs) * shape.rank)
                drawn.uniform_(-bound, bound, generator=generator)
                for i, ranks in self._parts(e, block):
                    start = i * shape.rank
                    self.a[block][e, ..., ranks] = drawn[..., start : start + shape.rank]
        self.a = {block: a.to(device) for block, a in self.a.items()}

    def parameters(self) -> list[Tensor]:
        return [*self.a.values(), *self.b.values()]

    def gather(self, chosen: Tensor) -> dict[str, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
        """chosen: (R, K) expert numbers. Per block: L tensors A (R, D_in, K n r), B (R, K n r,
        D_out); the scaling is in B."""
        rows, k = chosen.shape
        flat = chosen.flatten()
        out = {}
        for block in BLOCKS:
            a = self.a[block].to(DIALECT)[flat]  # (R K, L, D_in, n r)
            b = (self.b[block] * SCALING).to(DIALECT)[flat]
            if k > 1:
                a = a.view(rows, k, *a.shape[1:]).permute(0, 2, 3, 1, 4).flatten(3)
                b = b.view(rows, k, *b.shape[1:]).transpose(1, 2).flatten(2, 3)
            out[block] = (a.unbind(1), b.unbind(1))
        return out

    def to_fp16_values_(self) -> None:
        for p in self.parameters():
            p.data = p.data.half().float()

    def _parts(self, e: int, block: str) -> Iterator[tuple[int, slice]]:
        """The linear layers of a block that expert e changes: number, and its ranks in the bank."""
        shape = self.shapes[e]
        for i, module in enumerate(MODULES[block]):
            if module.split(".")[1] in shape.modules:
                yield i, slice(i * self.rank, i * self.rank + shape.rank)

    def _views(self, e: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Of one expert, layer by layer: PEFT's name, A (D_in, r) and B (r, D_out), both views."""
        for block, (_, outputs) in BLOCKS.items():
            for i, ranks in self._parts(e, block):
                column = sum(outputs[:i])
                for layer in range(L):
                    key = f"base_model.model.model.layers.{layer}.{MODULES[block][i]}"
                    b = self.b[block][e, layer, ranks, column : column + outputs[i]]
                    yield key, self.a[block][e, layer, :, ranks], b

    def peft(self, e: int) -> dict[str, Tensor]:
        """The adapter's tensors under PEFT's names, float16."""
        out = {}
        for key, a, b in self._views(e):
            out[f"{key}.lora_A.weight"] = a.T.half().contiguous().cpu()
            out[f"{key}.lora_B.weight"] = b.T.half().contiguous().cpu()
        return out

    def load_peft_(self, e: int, tensors: dict[str, Tensor]) -> None:
        """The inverse of `peft`."""
        for key, a, b in self._views(e):
            a.copy_(tensors[f"{key}.lora_A.weight"].T)
            b.copy_(tensors[f"{key}.lora_B.weight"].T)


class Slots:
    """Which of a row's K experts each token uses. weight: (R, T, K), 0 or 1; all 0 is the base.

    rank: of the bank.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        self.wide = {
            n: weight.to(DIALECT).repeat_interleave(n * rank, -1)
            for n in {len(outputs) for _, outputs in BLOCKS.values()}
        }


# ---------------------------------------------------------------- the forward


class Cache:
    """Keys and values of R rows for S positions."""

    def __init__(self, rows: int, size: int, device: torch.device) -> None:
        shape = (L, rows, KV_HEADS, size, HEAD)
        self.k = torch.zeros(shape, dtype=DIALECT, device=device)
        self.v = torch.zeros(shape, dtype=DIALECT, device=device)
        self.rows = torch.arange(rows, device=device)


def forward(
    base: Base,
    ids: Tensor,
    adapters: Any,
    slots: Slots | None,
    cache: Cache | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Hidden states (R, T, D) after the last norm.

    ids: (R, T), padded on the right. Without positions: all T tokens from position 0, causal; they
    are written to the cache if there is one. With positions (R,): one token a row at that position.
    """
    rows, length = ids.shape
    x = F.embedding(ids, base.embedding)
    if positions is None:
        cos, sin = base.cos[None, None, :length], base.sin[None, None, :length]
        mask = None
    else:
        cos, sin = base.cos[positions][:, None, None], base.sin[positions][:, None, None]
        assert cache is not None
        size = cache.k.shape[3]
        seen = torch.arange(size, device=ids.device)[None] <= positions[:, None]
        mask = seen[:, None, None]

    def linear(block: str, i: int, value: Tensor, weight: Tensor) -> Tensor:
        out = F.linear(value, weight)
        if slots is None:
            return out
        a, b = adapters[block][0][i], adapters[block][1][i]
        h = torch.bmm(value, a) * slots.wide[len(BLOCKS[block][1])]
        return torch.baddbmm(out, h, b)

    for i, layer in enumerate(base.layers):
        y = F.rms_norm(x, (D,), layer.norm_1, EPS)
        qkv = linear("qkv", i, y, layer.qkv).view(rows, length, HEADS + 2 * KV_HEADS, HEAD)
        q, k, v = qkv.transpose(1, 2).split([HEADS, KV_HEADS, KV_HEADS], 1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if positions is None:
            if cache is not None:
                cache.k[i, :, :, :length], cache.v[i, :, :, :length] = k, v
            k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            assert cache is not None
            cache.k[i][cache.rows, :, positions] = k[:, :, 0]
            cache.v[i][cache.rows, :, positions] = v[:, :, 0]
            grouped = q.view(rows, KV_HEADS, HEADS // KV_HEADS, HEAD)
            attended = F.scaled_dot_product_attention(
                grouped, cache.k[i], cache.v[i], attn_mask=mask
            ).reshape(rows, HEADS, 1, HEAD)
        x = x + linear("o", i, attended.transpose(1, 2).reshape(rows, length, D), layer.o)
        y = F.rms_norm(x, (D,), layer.norm_2, EPS)
        gate, up = linear("gate_up", i, y, layer.gate_up).chunk(2, -1)
        x = x + linear("down", i, F.silu(gate) * up, layer.down)
    return F.rms_norm(x, (D,), base.norm, EPS)


# ---------------------------------------------------------------- training


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train an expert.

    mix: rows of each kind in a batch (single, own: several requests of the domain, foreign: lines
    that are not of the domain). foreign_off: share of the foreign rows in which foreign tokens run
    through the base alone. prefix_off: share of all rows in which the chat template's opening does.
    """

    mix: tuple[int, int, int]
    foreign_off: float = 0.0
    prefix_off: float = 0.0
    steps: int = 300
    learning_rate: float = 5e-4


KINDS = ("single", "own", "foreign")
VARIANTS = {
    "single": Variant(mix=(32, 0, 0)),
    "own": Variant(mix=(16, 16, 0)),
    "given": Variant(mix=(16, 6, 10)),
    "off": Variant(mix=(16, 6, 10), foreign_off=1.0, prefix_off=0.5),
    "mixed": Variant(mix=(16, 6, 10), foreign_off=0.5, prefix_off=0.5),
    "off-fast": Variant(mix=(16, 6, 10), foreign_off=1.0, prefix_off=0.5, learning_rate=1.5e-3),
    "off-long": Variant(mix=(16, 6, 10), foreign_off=1.0, prefix_off=0.5, steps=900),
    "off-longer": Variant(mix=(16, 6, 10), foreign_off=1.0, prefix_off=0.5, steps=1800),
}
FALLBACK = "off"
DISTRACTOR = Variant(mix=(16, 0, 0), steps=160, learning_rate=1.5e-3)
EXPERIMENT = ("cron", "sql", "smart_home")
WARMUP = 0.06


class Rows:
    """Training rows of all domains and kinds as one flat array on the device."""

    def __init__(self, path: Path, device: torch.device) -> None:
        stored = np.load(path)
        self.device = device
        ids, flags, self.pools = [], [], {}
        lengths: list[np.ndarray] = []
        number = 0
        for key in sorted(k for k in stored.files if k.endswith("/lengths")):
            name = key.removesuffix("/lengths")
            lengths.append(stored[key].astype(np.int64))
            ids.append(stored[f"{name}/ids"])
            flags.append(stored[f"{name}/flags"])
            domain, kind = name.split("/")
            self.pools[domain, kind] = np.arange(number, number + len(lengths[-1]))
            number += len(lengths[-1])
        self.lengths = np.concatenate(lengths)
        self.starts = torch.from_numpy(np.cumsum(self.lengths) - self.lengths).to(device)
        self.ids = torch.from_numpy(np.concatenate(ids).astype(np.int32)).to(device)
        self.flags = torch.from_numpy(np.concatenate(flags)).to(device)

    @property
    def domains(self) -> list[str]:
        return sorted({domain for domain, _ in self.pools})

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Padded ids (R, T) int64 and flags (R, T); padding has no label."""
        lengths = torch.from_numpy(self.lengths[rows]).to(self.device)
        width = -(-int(self.lengths[rows].max()) // 8) * 8
        at = torch.arange(width, device=self.device)
        valid = at[None] < lengths[:, None]
        index = torch.where(
            valid, self.starts[torch.from_numpy(rows).to(self.device)][:, None] + at, 0
        )
        ids = torch.where(valid, self.ids[index].long(), END)
        return ids, torch.where(valid, self.flags[index], OWN)


class Order:
    """An endless shuffled order of a pool."""

    def __init__(self, pool: np.ndarray, seed: int) -> None:
        self.pool, self.rng, self.left = pool, np.random.default_rng(seed), np.empty(0, np.int64)

    def take(self, num: int) -> np.ndarray:
        while len(self.left) < num:
            self.left = np.concatenate([self.left, self.rng.permutation(self.pool)])
        taken, self.left = self.left[:num], self.left[num:]
        return taken


class Adam:
    """Adam with a learning rate and a clipped gradient norm (1.0) for each expert."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self.m = [torch.zeros_like(p) for p in bank.parameters()]
        self.v = [torch.zeros_like(p) for p in bank.parameters()]
        self.t = 0

    @torch.no_grad()
    def step(self, rates: Tensor) -> None:
        """rates: (E,) learning rates; 0 leaves an expert as it is."""
        self.t += 1
        parameters = self.bank.parameters()
        grads = [p.grad for p in parameters if p.grad is not None]
        num_a = len(self.bank.a)
        for block, grad in zip(self.bank.b, grads[num_a:], strict=True):
            grad *= self.bank.blocks[block]
        norms = torch.stack([g.square().sum(dim=(1, 2, 3)) for g in grads]).sum(0).sqrt()
        clip = (1.0 / (norms + 1e-6)).clamp(max=1.0)[:, None, None, None]
        rate = rates[:, None, None, None]
        correct_m, correct_v = 1 - 0.9**self.t, 1 - 0.999**self.t
        for p, g, m, v in zip(parameters, grads, self.m, self.v, strict=True):
            g *= clip
            m.lerp_(g, 0.1)
            v.lerp_(g.square(), 0.001)
            p -= rate * (m / correct_m) / ((v / correct_v).sqrt() + 1e-8)
            p.grad = None


def rate_at(variant: Variant, step: int) -> float:
    """Linear warm-up, then linear decay to 0 at the variant's last step."""
    warmup = max(1, round(WARMUP * variant.steps))
    if step >= variant.steps:
        return 0.0
    rise, fall = (step + 1) / warmup, (variant.steps - step) / max(1, variant.steps - warmup)
    return variant.learning_rate * min(1.0, rise, fall)


class Training:
    """E experts, each with its variant; `run` goes on until the longest one is done."""

    def __init__(
        self, base: Base, rows: Rows, bank: Bank, variants: list[Variant], max_tokens: int
    ) -> None:
        self.base, self.rows, self.bank, self.variants = base, rows, bank, variants
        self.max_tokens = max_tokens
        self.adam = Adam(bank)
        nothing = np.empty(0, np.int64)
        self.orders = [
            [
                Order(rows.pools.get((domain, kind), nothing), seed_of(domain) + i)
                for i, kind in enumerate(KINDS)
            ]
            for domain in (name.split("@")[0] for name in bank.names)
        ]
        self.rng = np.random.default_rng(0)
        self.step_number = 0
        self.losses: list[list[float]] = []
        for p in bank.parameters():
            p.requires_grad_(True)

    @property
    def num_steps(self) -> int:
        return max(variant.steps for variant in self.variants)

    def run(self, num: int) -> float:
        """Train for up to `num` steps; returns the seconds a step took."""
        started = time.monotonic()
        last = min(self.step_number + num, self.num_steps)
        done = last - self.step_number
        while self.step_number < last:
            losses = self.step()
            if self.step_number % 25 == 0 or self.step_number == last:
                self.losses.append([self.step_number, *[round(x, 4) for x in losses.tolist()]])
                say(f"step {self.step_number}/{self.num_steps} loss", self.losses[-1][1:])
        return (time.monotonic() - started) / max(1, done)

    def step(self) -> Tensor:
        active = [e for e, v in enumerate(self.variants) if self.step_number < v.steps]
        chosen, experts, off = [], [], []
        for e in active:
            variant = self.variants[e]
            for order, kind, num in zip(self.orders[e], KINDS, variant.mix, strict=True):
                chosen.append(order.take(num))
                experts.append(np.full(num, e))
                share = variant.foreign_off if kind == "foreign" else 0.0
                draws = self.rng.random((num, 2)) < (variant.prefix_off, share)
                off.append(draws)
        rows, expert, off_ = np.concatenate(chosen), np.concatenate(experts), np.concatenate(off)
        longest = np.argsort(-self.rows.lengths[rows], kind="stable")
        rows, expert, off_ = rows[longest], expert[longest], off_[longest]
        totals = torch.zeros(len(self.bank.names), device=self.base.device)
        labels_of = torch.zeros_like(totals)
        pieces = self.pieces(self.rows.lengths[rows])
        batches = []
        for piece in pieces:
            ids, flags = self.rows.batch(rows[piece])
            owner = torch.from_numpy(expert[piece]).to(self.base.device)
            labelled = (flags & LABEL) > 0
            labels_of.index_add_(0, owner, labelled.sum(1).float())
            batches.append((ids, flags, owner, labelled, piece))
        for ids, flags, owner, labelled, piece in batches:
            kinds = flags & 3
            without = torch.from_numpy(off_[piece]).to(self.base.device)
            is_off = ((kinds == PREFIX) & without[:, :1]) | ((kinds == FOREIGN) & without[:, 1:])
            hidden = forward(
                self.base,
                ids,
                self.bank.gather(owner[:, None]),
                Slots(~is_off[..., None], self.bank.rank),
            )
            at_row, at = labelled.nonzero(as_tuple=True)
            logits = F.linear(hidden[at_row, at - 1], self.base.embedding)
            losses = F.cross_entropy(logits.float(), ids[at_row, at], reduction="none")
            weighted = losses / labels_of[owner[at_row]]
            weighted.sum().backward()
            totals.index_add_(0, owner[at_row], weighted.detach())
        rates = [rate_at(v, self.step_number) for v in self.variants]
        self.adam.step(torch.tensor(rates, device=self.base.device))
        self.step_number += 1
        return totals

    def pieces(self, lengths: np.ndarray) -> list[slice]:
        """Cut rows, longest first, into pieces of at most `max_tokens` padded tokens."""
        out, start = [], 0
        while start < len(lengths):
            stop = start + max(1, self.max_tokens // int(lengths[start]))
            out.append(slice(start, min(stop, len(lengths))))
            start = stop
        return out


# ---------------------------------------------------------------- answers


@dataclass
class Message:
    """A user turn of one or more parts, and what is asked of each.

    ids: prompt with template. parts: for each token the part that it belongs to, -1 for the
    template's opening. experts: by part, numbers in the bank, -1 for the base alone.
    """

    ids: list[int]
    parts: list[int]
    experts: list[int]
    caps: list[int]


class Vocabulary:
    """Bytes of each token."""

    def __init__(self, path: Path, device: torch.device) -> None:
        stored = np.load(path)
        lengths = stored["lengths"].astype(np.int64)
        ends = np.cumsum(lengths)
        blob = stored["blob"].tobytes()
        self.tokens = [blob[end - n : end] for end, n in zip(ends, lengths, strict=True)]
        self.newline = torch.tensor([b"\n" in t for t in self.tokens], device=device)
        self.newline_id = self.tokens.index(b"\n")

    def decode(self, ids: list[int]) -> str:
        text = b"".join(self.tokens[i] for i in ids if i != END)
        return text.decode("utf-8", "replace").strip()


@torch.inference_mode()
def answer(
    base: Base,
    bank: Bank | None,
    vocabulary: Vocabulary,
    messages: list[Message],
    *,
    batch: int,
    prefix: str = "first",
    sample: bool = False,
) -> list[dict[str, Any]]:
    """Answer each message; each part's tokens, asked and answered, by that part's expert.

    A part ends with a newline or, where another follows, with an end token, which then becomes a
    newline. prefix: "first" gives the template's opening to the first part's expert, "base" gives
    it to none, "text" gives the whole prompt to the first part's expert.
    Returns {"parts": texts, "ended": how each part ended: newline, end or cap}.
    """
    order = sorted(
        range(len(messages)), key=lambda i: (len(messages[i].experts), len(messages[i].ids))
    )
    out: list[dict[str, Any]] = [{} for _ in messages]
    for start in range(0, len(order), batch):
        numbers = order[start : start + batch]
        found = _answer(base, bank, vocabulary, [messages[i] for i in numbers], prefix, sample)
        for i, result in zip(numbers, found, strict=True):
            out[i] = result
    return out


@dataclass
class Asked:
    """Messages as tensors, padded on the right.

    ids, parts: (R, T). experts, caps: (R, K), the caps in tokens. lengths: (R,) tokens of the
    prompt. last: (R,) number of the last part.
    """

    ids: Tensor
    parts: Tensor
    experts: Tensor
    caps: Tensor
    lengths: Tensor
    last: Tensor

    @classmethod
    def from_messages(cls, messages: list[Message], prefix: str, device: torch.device) -> Asked:
        def padded(lists: list[list[int]], fill: int) -> Tensor:
            size = max(len(x) for x in lists)
            return torch.tensor([[*x, *[fill] * (size - len(x))] for x in lists], device=device)

        parts = padded([m.parts for m in messages], 0)
        if prefix == "first":
            parts = parts.clamp(min=0)
        elif prefix == "text":
            parts = torch.zeros_like(parts)
        return cls(
            padded([m.ids for m in messages], END),
            parts,
            padded([m.experts for m in messages], -1),
            padded([m.caps for m in messages], 0),
            torch.tensor([len(m.ids) for m in messages], device=device),
            torch.tensor([len(m.experts) - 1 for m in messages], device=device),
        )

    def slots(self, part: Tensor, rank: int) -> Slots:
        """part: (R, T), -1 for the base alone. rank: of the bank."""
        k = self.experts.shape[1]
        of_part = torch.eye(k, device=part.device)[None] * (self.experts >= 0)[:, None]
        index = part.clamp(min=0)[..., None].expand(-1, -1, k)
        return Slots(of_part.gather(1, index) * (part >= 0)[..., None], rank)


class Progress:
    """Which part each row is answering, what it has said, and how its parts ended."""

    def __init__(self, asked: Asked, vocabulary: Vocabulary) -> None:
        self.asked, self.vocabulary = asked, vocabulary
        self.rows = torch.arange(len(asked.ids), device=asked.ids.device)
        self.part, self.in_part = torch.zeros_like(asked.last), torch.zeros_like(asked.last)
        self.done = torch.zeros_like(asked.last, dtype=torch.bool)
        self.ends = torch.zeros_like(asked.experts)  # 1 newline, 2 end, 3 cap
        self.said: list[Tensor] = []
        self.owners: list[Tensor] = []

    def take(self, token: Tensor) -> Tensor:
        """Note each row's next token, (R,); returns what the row goes on with."""
        self.in_part += 1
        is_end, is_line = token == END, self.vocabulary.newline[token]
        is_over = self.in_part >= self.asked.caps.gather(1, self.part[:, None])[:, 0]
        is_last = self.part == self.asked.last
        moves = ~is_last & (is_end | is_line | is_over) & ~self.done
        finishes = is_last & (is_end | is_over) & ~self.done
        how = torch.where(is_end, 2, torch.where(is_line, 1, 3))
        before = self.ends[self.rows, self.part]
        self.ends[self.rows, self.part] = torch.where(moves | finishes, how, before)
        self.said.append(torch.where(self.done | (moves & ~is_line), END, token))
        self.owners.append(self.part.clone())
        self.done |= finishes
        self.part = self.part + moves
        self.in_part = torch.where(moves, 0, self.in_part)
        return torch.where(moves & ~is_line, self.vocabulary.newline_id, token)

    def answers(self, num_parts: list[int]) -> list[dict[str, Any]]:
        tokens, owner = torch.stack(self.said, 1).tolist(), torch.stack(self.owners, 1).tolist()
        names, ends = ("", "newline", "end", "cap"), self.ends.tolist()
        decode = self.vocabulary.decode
        return [
            {
                "parts": [
                    decode([t for t, p in zip(tokens[r], owner[r], strict=True) if p == i])
                    for i in range(num)
                ],
                "ended": [names[ends[r][i]] for i in range(num)],
            }
            for r, num in enumerate(num_parts)
        ]


def _answer(
    base: Base,
    bank: Bank | None,
    vocabulary: Vocabulary,
    messages: list[Message],
    prefix: str,
    sample: bool,
) -> list[dict[str, Any]]:
    asked = Asked.from_messages(messages, prefix, base.device)
    (rows, width), k = asked.ids.shape, asked.experts.shape[1]
    adapters = bank.gather(asked.experts.clamp(min=0)) if bank is not None else None

    def read(ids: Tensor, part: Tensor, positions: Tensor | None) -> Tensor:
        slots = None if bank is None else asked.slots(part, bank.rank)
        return forward(base, ids, adapters, slots, cache, positions)

    steps = int(asked.caps.sum(1).max()) + k
    cache = Cache(rows, -(-(width + steps) // 8) * 8, base.device)
    hidden = read(asked.ids, asked.parts, None)[cache.rows, asked.lengths - 1]
    progress = Progress(asked, vocabulary)
    for step in range(steps):
        logits = F.linear(hidden, base.embedding)
        token = progress.take(_sampled(logits) if sample else logits.argmax(-1))
        if step % 8 == 7 and bool(progress.done.all()):
            break
        hidden = read(token[:, None], progress.part[:, None], asked.lengths + step)[:, 0]
    return progress.answers([len(m.experts) for m in messages])


def _sampled(logits: Tensor, top_p: float = 0.95) -> Tensor:
    chances, order = logits.float().softmax(-1).sort(-1, descending=True)
    chances[(chances.cumsum(-1) - chances) > top_p] = 0
    return order.gather(1, torch.multinomial(chances, 1))[:, 0]


# ---------------------------------------------------------------- scores


def is_right(found: str, expected: str, domain: str) -> bool:
    """Exact, JSON by value; list marks do not count. The tasks' own scorers run afterwards."""
    found, expected = (re.sub(r"^\s*\d+[.)]\s+", "", x) for x in (found, expected))
    if domain == "smart_home":
        try:
            return bool(json.loads(found) == json.loads(expected))
        except ValueError:
            return False
    return " ".join(found.split()) == " ".join(expected.split())


def wilson(right: int, num: int) -> tuple[float, float]:
    z, p = 1.959964, right / num
    centre, half = p + z * z / (2 * num), z * math.sqrt(p * (1 - p) / num + z * z / (4 * num * num))
    return (centre - half) / (1 + z * z / num), (centre + half) / (1 + z * z / num)


class Distractors:
    """Further adapters: shapes, rows of single requests to train on, and held-out ones."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        stored = json.loads((folder / "tests.json").read_text(encoding="utf-8"))
        self.shapes = {
            name: Shape(rank=shape["rank"], modules=tuple(shape["modules"]))
            for name, shape in stored["shapes"].items()
        }
        self.singles: dict[str, list[dict[str, Any]]] = stored["singles"]
        self.rows = Rows(folder / "rows.npz", device)

    def groups(self) -> list[list[str]]:
        """Names that share a bank: one of a large rank would make the others' as wide."""
        small = [name for name, shape in self.shapes.items() if shape.rank <= RANK]
        large = [name for name in self.shapes if name not in small]
        return [group for group in (small, large) if group]


class Tests:
    """Held-out messages: single requests by domain, and pairs of two domains in five formats."""

    def __init__(self, path: Path) -> None:
        stored = json.loads(path.read_text(encoding="utf-8"))
        self.singles: dict[str, list[dict[str, Any]]] = stored["singles"]
        self.pairs: list[dict[str, Any]] = stored["pairs"]
        self.ordinary: list[dict[str, Any]] = stored["ordinary"]
        self.first: dict[str, dict[str, float]] = stored["first_edition"]


def run_tests(
    base: Base,
    bank: Bank,
    vocabulary: Vocabulary,
    cases: list[dict[str, Any]],
    experts: list[dict[str, int]],
    batch: int,
    prefix: str = "first",
) -> list[dict[str, Any]]:
    """Answer each case with each of `experts` (domain -> number in the bank); one record each."""
    messages, records = [], []
    for numbers in experts:
        for case in cases:
            chosen = [numbers.get(domain, -1) for domain in case["domains"]]
            messages.append(Message(case["ids"], case["parts"], chosen, case["caps"]))
            names = [bank.names[e] if e >= 0 else "base" for e in chosen]
            records.append({"case": case["id"], "experts": names})
    found = answer(base, bank, vocabulary, messages, batch=batch, prefix=prefix)
    by_id = {case["id"]: case for case in cases}
    for record, result in zip(records, found, strict=True):
        case = by_id[record["case"]]
        record.update(result)
        record["right"] = [
            is_right(text, expected, domain)
            for text, expected, domain in zip(
                result["parts"], case["answers"], case["domains"], strict=True
            )
        ]
    return records


def summary(records: list[dict[str, Any]], cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Share of right parts: by expert, by place, by format."""
    by_id = {case["id"]: case for case in cases}
    groups: dict[str, list[bool]] = {}
    for record in records:
        case = by_id[record["case"]]
        for place, (name, right) in enumerate(zip(record["experts"], record["right"], strict=True)):
            if name == "base":
                continue
            variant = name.partition("@")[2]
            keys = [name, f"all@{variant}", f"part{place + 1}@{variant}"]
            for key in [*keys, f"{case['format']}@{variant}"]:
                groups.setdefault(key, []).append(right)
    return {key: [round(sum(x) / len(x), 4), len(x)] for key, x in sorted(groups.items())}


# ---------------------------------------------------------------- the run


class Run:
    """Everything in order, with what is known so far always on disk."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.out = Path(options.out)
        self.out.mkdir(parents=True, exist_ok=True)
        folder = Path(options.data)
        self.base = Base(folder / "base.safetensors", self.device)
        say("base ready")
        self.vocabulary = Vocabulary(folder / "vocabulary.npz", self.device)
        self.rows = Rows(folder / "rows.npz", self.device)
        self.tests = Tests(folder / "tests.json")
        further = folder / "distractors"
        self.further = Distractors(further, self.device) if further.exists() else None
        say("data ready:", len(self.rows.lengths), "rows")
        self.record: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU",
            "torch": torch.__version__,
            "options": vars(options),
            "variants": {name: asdict(v) for name, v in VARIANTS.items()},
            "distractor": asdict(DISTRACTOR),
            "distractors": [],
        }

    def left(self) -> float:
        return float(self.options.budget) - (time.monotonic() - STARTED)

    def write(self) -> None:
        self.record["seconds"] = round(time.monotonic() - STARTED, 1)
        partial = self.out / "partial.tmp"
        partial.write_text(json.dumps(self.record, ensure_ascii=False), encoding="utf-8")
        partial.rename(self.out / "record.json")

    def train(self, names: list[str], variants: list[Variant]) -> tuple[Bank, Training]:
        bank = Bank(names, self.device)
        training = Training(self.base, self.rows, bank, variants, self.options.max_tokens)
        return bank, training

    def steps_in_time(self, training: Training, steps: int, reserve: float) -> tuple[int, float]:
        """How many of `steps` leave `reserve` seconds, and the seconds of one.

        It times a few steps; what they trained is thrown away.
        """
        if self.options.tiny:
            return steps, training.run(1)
        training.run(8)  # the first ones are slower
        seconds = training.run(4)
        return max(1, min(steps, int((self.left() - reserve) / max(seconds, 1e-3)))), seconds

    def rehearse(self) -> None:
        """Two steps, a few answers and the files: whatever is broken shows before time is spent."""
        names = [f"{domain}@rehearsal" for domain in EXPERIMENT]
        bank, training = self.train(names, [Variant(mix=(2, 1, 1), steps=2)] * len(names))
        training.run(2)
        bank.to_fp16_values_()
        numbers = [{domain: i for i, domain in enumerate(EXPERIMENT)}]
        cases = [c for c in self.tests.pairs if set(c["domains"]) <= set(EXPERIMENT)][:4]
        for prefix in ("first", "base", "text"):
            found = run_tests(
                self.base, bank, self.vocabulary, cases, numbers, self.options.batch, prefix
            )
        summary(found, cases)
        self.save(bank, "experts")
        self.distractors(Variant(mix=(1, 0, 0), steps=2), 1)
        for file in self.out.glob("*.safetensors"):
            file.unlink()
        self.record["distractors"] = []
        say("rehearsed:", found[0]["parts"])

    def experiment(self) -> str:
        """Train every variant of three experts and return the name of the best one."""
        names = [f"{domain}@{variant}" for variant in VARIANTS for domain in EXPERIMENT]
        variants = [self.shortened(VARIANTS[name.partition("@")[2]]) for name in names]
        bank, training = self.train(names, variants)
        seconds = training.run(10**9)
        bank.to_fp16_values_()
        say(f"experiment trained: {seconds:.3f} s a step")
        cases_1 = [c for d in EXPERIMENT for c in self.tests.singles[d][: self.options.num_single]]
        cases_2 = [c for c in self.tests.pairs if set(c["domains"]) <= set(EXPERIMENT)]
        cases_2 = cases_2[:: self.options.thin]
        numbers = [
            {domain: names.index(f"{domain}@{variant}") for domain in EXPERIMENT}
            for variant in VARIANTS
        ]
        run = (self.base, bank, self.vocabulary)
        singles = run_tests(*run, cases_1, numbers, self.options.batch)
        pairs = run_tests(*run, cases_2, numbers, self.options.batch)
        cases_3 = [c for c in self.tests.ordinary if set(c["domains"]) <= {*EXPERIMENT, "base"}]
        cases_3 = cases_3[:: self.options.thin]
        ordinary = run_tests(*run, cases_3, numbers, self.options.batch)
        scores_1, scores_2 = summary(singles, cases_1), summary(pairs, cases_2)
        say("experiment scored")
        winner, table = self.decide(scores_1, scores_2)
        self.record["experiment"] = {
            "losses": training.losses,
            "seconds_per_step": seconds,
            "singles": singles,
            "pairs": pairs,
            "single_scores": scores_1,
            "pair_scores": scores_2,
            "ordinary": ordinary,
            "ordinary_scores": summary(ordinary, cases_3),
            "table": table,
            "winner": winner,
        }
        for name, line in table.items():
            say(name, line)
        self.write()
        return winner

    def decide(self, singles: dict[str, Any], pairs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The best variant, and a table of all.

        Variants whose single scores are below the first edition's, by more than their interval, are
        left out unless all are. Parts count twice as much as single requests.
        """
        table: dict[str, Any] = {}
        for variant in VARIANTS:
            names = [f"{domain}@{variant}" for domain in EXPERIMENT]
            table[variant] = {
                "single": [singles[n][0] for n in names],
                "part": [pairs[n][0] for n in names],
                "by place": [pairs[f"part{i}@{variant}"][0] for i in (1, 2)],
                "in interval": all(
                    wilson(round(singles[n][0] * singles[n][1]), singles[n][1])[1]
                    >= self.tests.first[n.partition("@")[0]]["mean"]
                    for n in names
                ),
            }
        able = [v for v, line in table.items() if line["in interval"]] or list(table)
        return max(able, key=lambda v: sum(table[v]["part"]) + 0.5 * sum(table[v]["single"])), table

    def shortened(self, variant: Variant) -> Variant:
        if not self.options.tiny:
            return variant
        steps = max(1, variant.steps // 300)
        mix = tuple(-(-num // 16) for num in variant.mix)
        return Variant(**{**asdict(variant), "mix": mix, "steps": steps})

    def final(self, winner: str) -> Bank:
        """Train all experts as the winner was, as long as the time allows, and write them."""
        names = self.rows.domains
        variant = self.shortened(VARIANTS[winner])
        wanted = variant.steps if self.options.tiny else self.options.final_steps or variant.steps
        variant = replace(variant, steps=max(12, wanted))
        _, training = self.train(names, [variant] * len(names))
        steps, seconds = self.steps_in_time(training, wanted, self.options.reserve)
        del training
        say(f"final: {steps} steps of {seconds:.3f} s, winner {winner}")
        bank, training = self.train(names, [replace(variant, steps=steps)] * len(names))
        training.run(steps // 2)
        self.save(bank, "experts")
        training.run(steps)
        bank.to_fp16_values_()
        self.save(bank, "experts")
        self.record["final"] = {
            "winner": winner,
            "steps": steps,
            "names": names,
            "losses": training.losses,
            "seconds_per_step": seconds,
        }
        self.write()
        return bank

    def distractors(self, variant: Variant, num_tested: int) -> None:
        """Train the further adapters as far as the time allows; write them and their scores."""
        if self.further is None:
            return
        groups = self.further.groups()
        for number, names in enumerate(groups):
            later = len(groups) - 1 - number  # groups, of about 20 s each
            reserve = self.options.score_reserve + 20 * later
            if self.left() < reserve:
                say("no time for", names)
                continue
            bank, group = self.distractor_group(
                self.further, names, variant, reserve, f"distractors_{number}"
            )
            cases = [c for name in names for c in self.further.singles[name][:num_tested]]
            numbers = [{name: i for i, name in enumerate(names)}]
            group["singles"] = run_tests(
                self.base, bank, self.vocabulary, cases, numbers, self.options.batch
            )
            group["single_scores"] = summary(group["singles"], cases)
            say("distractors", group["single_scores"])
            self.record["distractors"].append(group)
            self.write()

    def distractor_group(
        self, further: Distractors, names: list[str], variant: Variant, reserve: float, file: str
    ) -> tuple[Bank, dict[str, Any]]:
        """Train and save the adapters of one bank; the bank, and what the record says of it."""

        def fresh(steps: int) -> Training:
            bank = Bank(names, self.device, [further.shapes[name] for name in names])
            variants = [replace(variant, steps=steps)] * len(names)
            return Training(self.base, further.rows, bank, variants, self.options.max_tokens)

        steps, seconds = self.steps_in_time(fresh(max(12, variant.steps)), variant.steps, reserve)
        training = fresh(steps)
        training.run(steps)
        training.bank.to_fp16_values_()
        self.save(training.bank, file)
        about = {"names": names, "steps": steps, "seconds_per_step": seconds}
        return training.bank, {**about, "losses": training.losses}

    def score_final(self, bank: Bank) -> None:
        names = bank.names
        run = (self.base, bank, self.vocabulary)
        numbers = [{name: i for i, name in enumerate(names)}]
        final = self.record["final"]
        cases = [c for d in names for c in self.tests.singles[d][: self.options.num_single_final]]
        final["singles"] = run_tests(*run, cases, numbers, self.options.batch)
        final["single_scores"] = summary(final["singles"], cases)
        say("single scores", final["single_scores"])
        self.write()
        thin = self.options.thin
        pairs, ordinary = self.tests.pairs[::thin], self.tests.ordinary[::thin]
        for key, cases, prefix in (
            ("pairs", pairs, "first"),
            ("ordinary", ordinary, "first"),
            ("pairs, opening by base", pairs, "base"),
            ("pairs, prompt by first", pairs, "text"),
        ):
            if self.left() < 15:
                return
            found = run_tests(*run, cases, numbers, self.options.batch, prefix)
            final[key] = found
            final[f"{key}: scores"] = summary(found, cases)
            say(key, final[f"{key}: scores"])
            self.write()

    def save(self, bank: Bank, name: str, most_bytes: int = 16_000_000) -> None:
        """NAME_0.safetensors and so on, whole adapters to a file, so that a file stays small."""
        number, size = 0, 0
        tensors: dict[str, Tensor] = {}
        for e in range(len(bank.names)):
            adapter = bank.peft(e)
            more = sum(tensor.nbytes for tensor in adapter.values())
            if tensors and size + more > most_bytes:
                save_file(tensors, self.out / f"{name}_{number}.safetensors")
                number, size, tensors = number + 1, 0, {}
            tensors |= {f"{bank.names[e]}/{key}": tensor for key, tensor in adapter.items()}
            size += more
        save_file(tensors, self.out / f"{name}_{number}.safetensors")
        say("written:", name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a dry run with few steps and rows")
    parser.add_argument("--budget", type=float, default=500, help="seconds from the start")
    parser.add_argument("--reserve", type=float, default=60, help="seconds kept after the experts")
    parser.add_argument("--score-reserve", type=float, default=45, help="those for their scores")
    parser.add_argument("--final-steps", type=int, default=0, help="default the winner's")
    parser.add_argument("--batch", type=int, default=512, help="rows answered at once")
    parser.add_argument("--max-tokens", type=int, default=40_000, help="of one training pass")
    parser.add_argument("--num-single", type=int, default=100)
    parser.add_argument("--num-single-final", type=int, default=200)
    parser.add_argument("--thin", type=int, default=1, help="every n-th pair only")
    parser.add_argument("--variants", default="", help="comma-separated; default all")
    parser.add_argument("--winner", default="", help="skip the experiment")
    options = parser.parse_args()
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape
    for name in set(VARIANTS) - set(options.variants.split(",") if options.variants else VARIANTS):
        del VARIANTS[name]
    run = Run(options)
    run.rehearse()
    winner = options.winner
    if not winner:
        try:
            winner = run.experiment()
        except Exception:
            if options.tiny:
                raise
            traceback.print_exc()
            say("the experiment failed: going on with", FALLBACK)
            winner = FALLBACK
            torch.cuda.empty_cache()
    bank = run.final(winner)
    try:
        run.distractors(run.shortened(DISTRACTOR), options.num_single)
    except Exception:
        if options.tiny:
            raise
        traceback.print_exc()
        say("the distractors failed: going on with the scores")
        torch.cuda.empty_cache()
    run.score_final(bank)
    run.write()
    say("done")


if __name__ == "__main__":
    main()
