"""Made-up traces that look like real ones, for the tests of the trace and of the charts."""

import re
from typing import Any

import numpy as np

from spectr_demo.trace import NOT_ROUTED, ColumnTrace, RoutingTrace

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

PROMPT = """<|im_start|>system
You are a helpful assistant.<|im_end|>
<|im_start|>user
Table `users(id, name, joined)`: how many joined in 2023? Explain it to a naïve reader → briefly, \
with <b>SQL</b>, a Python loop & the maths: $12 \\times 31$.<|im_end|>
<|im_start|>assistant
"""
ANSWER = """Count the rows of 2023:

SELECT COUNT(*) FROM users
WHERE joined BETWEEN '2023-01-01' AND '2023-12-31';

The same in Python:

def count(rows):
    total = 0
    for row in rows:
        if row["joined"].year == 2023:
            total += 1
    return total

Suppose 12 months with 31 people each: $12 \\times 31 = 372$, so the answer is 372 people. \
日本語 also works 🙂, as does é̂."""

# Two tokens are routed, the third was never read. Layer 1 has no expert on projection 1.
#        token 0: layer 0, layer 1             token 1: layer 0, layer 1
EXPERTS = [
    [[[0, 1], [0, 2]], [[1, 0], [NOT_ROUTED, NOT_ROUTED]]],
    [[[2, 0], [2, 1]], [[2, 1], [NOT_ROUTED, NOT_ROUTED]]],
    [[[NOT_ROUTED, NOT_ROUTED]] * 2] * 2,
]
WEIGHTS = [
    [[[0.75, 0.25], [0.5, 0.5]], [[0.5, 0.5], [0, 0]]],
    [[[1.0, 0.0], [0.5, 0.5]], [[0.75, 0.25], [0, 0]]],
    [[[0.0, 0.0]] * 2] * 2,
]

_TOKEN = re.compile(r"<\|\w+\|>|\n+|[ \t]+(?=\s)| ?[^\W\d_]{1,7}|\d| ?[^\w\s]{1,3}|\s|.")


def sample_trace(
    num_tokens: int = 200,
    *,
    expert_names: tuple[str, ...] = ("chat", "code", "math", "sql"),
    num_layers: int = 30,
    top_k: int = 2,
    seed: int = 0,
) -> RoutingTrace:
    """Columns "base", "single:<last expert>", "uniform" and "spectr" over one made-up chat."""
    prompt = _TOKEN.findall(PROMPT)
    answer = _TOKEN.findall(ANSWER) * (1 + num_tokens // 100)
    tokens = tuple((prompt + answer)[:num_tokens])
    num_prompt = min(len(prompt), num_tokens)
    rng = np.random.default_rng(seed)
    E, T = len(expert_names), len(tokens)
    shape = (T, num_layers, len(PROJECTIONS))

    # Experts take turns along the text, blurred, and differ by layer and projection.
    turns = (np.arange(T) // 17) % E
    affinity = 2.2 * (turns[:, None] == np.arange(E)) + rng.normal(0, 0.5, (T, E))
    scores = (
        affinity[:, None, None, :]
        + rng.normal(0, 0.7, (1, num_layers, 1, E))
        + rng.normal(0, 0.4, (*shape, E))
    )
    experts = np.argsort(-scores, axis=-1)[..., :top_k].astype(np.int16)
    scores = np.take_along_axis(scores, experts.astype(np.intp), axis=-1).astype(np.float32)
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    if num_prompt < T:  # the last generated token is never read
        experts[-1], weights[-1], scores[-1] = NOT_ROUTED, 0.0, np.nan

    def constant(label: str, ids: list[int], weight: float) -> ColumnTrace:
        """A router that gives every token the same weights, stored once."""
        full = (*shape, len(ids))
        return _column(
            label,
            tokens,
            num_prompt,
            np.broadcast_to(np.array(ids, np.int16), full),
            np.broadcast_to(np.array(weight, np.float32), full),
            np.broadcast_to(np.array(np.nan, np.float32), full),
            rng,
        )

    spectr = _column("spectr", tokens, num_prompt, experts, weights, scores, rng)
    return RoutingTrace(
        expert_names=expert_names,
        projections=PROJECTIONS,
        num_layers=num_layers,
        columns=(
            constant("base", [NOT_ROUTED], 0.0),
            constant(f"single:{expert_names[-1]}", [E - 1], 1.0),
            constant("uniform", list(range(E)), 1 / E),
            spectr,
        ),
        meta={"model": "made up", "seed": seed},
    )


def _column(
    label: str,
    tokens: tuple[str, ...],
    num_prompt: int,
    experts: np.ndarray,
    weights: np.ndarray,
    scores: np.ndarray,
    rng: np.random.Generator,
) -> ColumnTrace:
    T = len(tokens)
    ends = np.cumsum([len(token) for token in tokens])
    logprob, entropy, kl = rng.gamma(1.2, 0.5, (3, T)).astype(np.float32)
    if label == "base":
        kl = np.zeros(T, np.float32)
    for values in (logprob, entropy, kl):
        values[0] = np.nan
    return ColumnTrace(
        label=label,
        router={"name": label, "top_k": experts.shape[-1]},
        token_ids=np.arange(T, dtype=np.int32),
        tokens=tokens,
        spans=np.stack([np.append(0, ends[:-1]), ends], axis=1).astype(np.int32),
        num_prompt=num_prompt,
        experts=experts,
        weights=weights.astype(np.float32, copy=False),
        scores=scores,
        logprob=-logprob,
        entropy=entropy,
        kl=kl,
    )


def make_column(
    experts: Any, weights: Any, /, *, label: str = "spectr", **changes: Any
) -> ColumnTrace:
    """A column around (T, L, P, K) experts and weights; scores are ten times the weights."""
    experts = np.asarray(experts, np.int16)
    weights = np.asarray(weights, np.float32)
    T = len(experts)
    undefined = np.full(T, np.nan, np.float32)
    fields: dict[str, Any] = {
        "label": label,
        "router": {"name": "spectr"},
        "token_ids": np.arange(T, dtype=np.int32),
        "tokens": tuple("abcdefghij"[t % 10] for t in range(T)),
        "spans": np.stack([np.arange(T), np.arange(T) + 1], axis=1).astype(np.int32),
        "num_prompt": min(1, T),
        "experts": experts,
        "weights": weights,
        "scores": np.where(experts == NOT_ROUTED, np.nan, 10 * weights).astype(np.float32),
        "logprob": undefined,
        "entropy": undefined,
        "kl": undefined,
    }
    return ColumnTrace(**fields | changes)


def make_trace(*columns: ColumnTrace, num_experts: int = 3, **changes: Any) -> RoutingTrace:
    L, P = columns[0].experts.shape[1:3] if columns else (1, 1)
    fields: dict[str, Any] = {
        "expert_names": tuple(f"expert-{e}" for e in range(num_experts)),
        "projections": tuple(f"proj-{p}" for p in range(P)),
        "num_layers": L,
        "columns": columns,
    }
    return RoutingTrace(**fields | changes)
