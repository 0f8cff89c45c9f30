"""Batches of rows on which the operators' kernels are compared with `reference`.

Axes: R rows, T tokens, P projections of a bank, E experts, D outputs, K selected, r rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.testing import assert_close

from spectr_demo.gpu import reference
from spectr_demo.gpu.operators import add_chosen_, project_kept, weigh
from spectr_demo.gpu.rules import Rule, Rules

UNWRITTEN = -9


@dataclass(frozen=True, kw_only=True)
class Case:
    """rows: of the batch. D: outputs of each of the bank's layers. E: of the bank, of which LAG's
    filter keeps `kept`, where given, before the kernels see them. has_statistics: scores are
    standardised. has_weights: rows that do not score have weights. dtype: of the bank; y_dtype: of
    the layer."""

    name: str
    rows: Sequence[Rule]
    D: Sequence[int] = (80, 80)
    E: int = 5
    r: int = 6
    T: int = 2
    kept: int | None = None
    has_statistics: bool = False
    has_weights: bool = False
    places: torch.dtype = torch.int16
    dtype: torch.dtype = torch.float32
    y_dtype: torch.dtype = torch.float32

    @property
    def P(self) -> int:  # noqa: N802
        return len(self.D)


CONSTANT, MERGED_CONSTANT = Rule(), Rule(is_merged=True)
MIXED = [
    Rule(measure="length", top_k=1),
    Rule(measure="length", top_k=4, is_merged=True),
    CONSTANT,
    Rule(measure="first", top_k=3, temperature=1.0),
    Rule(measure="length", top_k=2, filter=3),
    Rule(measure="output", top_k=5, temperature=0.1, is_merged=True),
    MERGED_CONSTANT,
    Rule(measure="first", top_k=2, filter=2, is_merged=True),
]
CASES = [
    Case(name="all routers", rows=MIXED, has_weights=True, places=torch.int32),
    Case(name="standardised", rows=MIXED[:6], has_weights=True, has_statistics=True, r=4),
    Case(name="none has weights", rows=[CONSTANT, Rule(measure="length", top_k=1), CONSTANT], r=64),
    Case(name="none scores", rows=[CONSTANT, MERGED_CONSTANT], has_weights=True, r=3),
    Case(name="one expert", rows=[*MIXED[:1], CONSTANT], E=1, r=1, D=[7], has_weights=True),
    Case(name="five layers", rows=MIXED[:5], D=(64, 130, 7, 64, 16), has_weights=True),
    Case(
        name="bfloat16",
        rows=[Rule(measure="length", top_k=4, is_merged=True), Rule(measure="output", top_k=2)],
        E=8,
        r=16,
        D=(128, 64, 64),
        dtype=torch.bfloat16,
        y_dtype=torch.bfloat16,
    ),
    Case(
        name="float16",
        rows=[Rule(measure="first", top_k=2, temperature=0.5), CONSTANT],
        has_weights=True,
        dtype=torch.float16,
        y_dtype=torch.float16,
    ),
    Case(
        name="two dtypes",
        rows=[Rule(measure="length", top_k=2)],
        T=3,
        dtype=torch.bfloat16,
        D=(200, 8),
    ),
    Case(
        name="1,000 experts",
        rows=[Rule(measure="length", top_k=8, filter=20), Rule(measure="output", top_k=8)],
        E=1000,
        r=9,
        D=[80],
        T=1,
    ),
    Case(
        name="1,000 experts, merged",
        rows=[MERGED_CONSTANT, Rule(measure="length", top_k=2), CONSTANT],
        E=1000,
        r=2,
        D=[80],
        T=1,
        has_weights=True,
    ),
    Case(
        name="1,000 experts, 20 kept",
        rows=[
            Rule(measure="length", top_k=3, filter=20),
            Rule(measure="output", top_k=2, filter=20, is_merged=True),
            CONSTANT,
        ],
        E=1000,
        kept=20,
        has_weights=True,
        has_statistics=True,
    ),
]


class Inputs(NamedTuple):
    """Of one case, on one device."""

    rules: Rules
    z: Tensor  # (R * T, P, E, r)
    Bs: list[Tensor]  # (E * r, D) of each layer
    singular_values: Tensor  # (P, E, r)
    kept: Tensor | None  # (R, P, F)


def inputs_of(case: Case, device: str) -> Inputs:
    """Random ones; the third expert, where there is one, is zero at the last layer."""
    generator = torch.Generator().manual_seed(7)
    R, P, E, r = len(case.rows), case.P, case.E, case.r

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    z, Bs = random(R * case.T, P, E, r), [random(E * r, D) for D in case.D]
    z[:, -1, 2:3] = 0
    constant = random(R, P, E) / E
    constant[0, :, ::2] = 0
    kept = None
    if case.kept is not None:
        kept = torch.stack([torch.randperm(E, generator=generator) for _ in range(R * P)])
        kept = kept[:, : case.kept].view(R, P, -1).int().to(device)
        z = z[:, :, : case.kept]
    statistics = [random(R, P, E).to(device), random(R, P, E).abs().add(0.5).to(device)]
    rules = Rules.of(
        case.rows,
        E,
        device=device,
        mean=statistics[0] if case.has_statistics else None,
        std=statistics[1] if case.has_statistics else None,
        constant=constant.to(device) if case.has_weights else None,
    )
    return Inputs(
        rules,
        z.to(device, case.dtype),
        [B.to(device, case.dtype) for B in Bs],
        random(P, E, r).abs().to(device),
        kept,
    )


class Choices(NamedTuple):
    """Room for what is chosen, unwritten."""

    places: Tensor
    weights: Tensor
    scores: Tensor

    @classmethod
    def empty(cls, case: Case, shape: Sequence[int], device: str) -> "Choices":
        places = torch.full(shape, UNWRITTEN, dtype=case.places, device=device)
        weights, scores = (torch.full(shape, float(UNWRITTEN), device=device) for _ in range(2))
        return cls(places, weights, scores)


def check_add_chosen(case: Case, device: str) -> None:
    """One token of each row, recorded in the second of three slots."""
    rules, z, Bs, singular_values, kept = inputs_of(case, device)
    R = len(case.rows)
    z = z[:R].contiguous()
    step = torch.ones(1, dtype=torch.int64, device=device)
    shape = R, 3, case.P
    ours, theirs = (Choices.empty(case, (*shape, rules.most), device) for _ in range(2))
    of_all = Choices.empty(case, (*shape, z.shape[2]), device)
    before = [torch.randn(R, D, device=device).to(case.y_dtype) for D in case.D]
    ys, expected, again, once_more = ([y.clone() for y in before] for _ in range(4))
    args = z, Bs, singular_values
    add_chosen_(ys, *args, rules, kept=kept, **ours._asdict(), step=step)
    reference.add_chosen_(expected, *args, rules.flat, kept, *theirs, step)
    reference.add_chosen_(once_more, *args, choosing_all(rules, z).flat, kept, *of_all, step)
    is_same = check_choices(ours, theirs, of_all, case.E)[:, 1]
    for place in range(case.P):
        rows = is_same[:, place]
        assert_close(ys[place][rows], expected[place][rows])
    add_chosen_(again, *args, rules, kept=kept)
    for y, unrecorded in zip(ys, again, strict=True):
        assert torch.equal(y, unrecorded), "the same without a record"
    is_scored = rules.measure >= 0
    assert (ours.weights[~is_scored] == UNWRITTEN).all()
    assert (ours.weights[:, [0, 2]] == UNWRITTEN).all(), "of other tokens"
    total = ours.weights[is_scored, 1].sum(-1)
    assert_close(total, torch.ones_like(total))


def check_weigh(case: Case, device: str) -> None:
    """A prompt's tokens, recorded."""
    rules, z, _, singular_values, _ = inputs_of(case, device)
    shape = z.shape[:2]
    ours, theirs = (Choices.empty(case, (*shape, rules.most), device) for _ in range(2))
    of_all = Choices.empty(case, z.shape[:3], device)
    before = z.clone()
    weighed = weigh(z, singular_values, rules, **ours._asdict())
    expected = reference.weigh(z, singular_values, rules.flat, *theirs)
    reference.weigh(z, singular_values, choosing_all(rules, z).flat, *of_all)
    assert torch.equal(z, before)
    is_same = check_choices(ours, theirs, of_all, case.E)
    assert_close(weighed[is_same], expected[is_same])
    assert_close(weigh(z, singular_values, rules)[is_same], weighed[is_same])  # without a record


def choosing_all(rules: Rules, z: Tensor) -> Rules:
    """The same, but rows that score choose all experts of z (..., F, r)."""
    num = z.shape[-2]
    return replace(rules, top_k=rules.top_k.clamp(max=1) * num, most=num)


def check_choices(ours: Choices, theirs: Choices, of_all: Choices, E: int) -> Tensor:
    """Which layers chose the very experts of the reference, (...) bool.

    Sums in another order are rounded otherwise, so of two experts whose scores differ by no more
    (1.3e-6 of them, and 1e-5) the other one may be chosen. Each must have the score recorded in the
    reference too, and be chosen once. of_all: what the reference gives all of them.
    """
    assert_close(ours.weights, theirs.weights)
    assert_close(ours.scores, theirs.scores)
    is_chosen = theirs.weights > 0
    scores = torch.full((*theirs.scores.shape[:-1], E), torch.nan, device=theirs.scores.device)
    scores.scatter_(-1, of_all.places.clamp_min(0).long(), of_all.scores)
    found = scores.gather(-1, ours.places.where(is_chosen, 0).long())
    assert_close(found[is_chosen], ours.scores[is_chosen])
    chosen = torch.nn.functional.one_hot(ours.places.where(is_chosen, E).long(), E + 1)
    assert chosen[..., :E].sum(-2).max() <= 1, "none is chosen twice"
    is_same = ours.places == theirs.places
    assert is_same[~is_chosen].all(), "no other slot is written"
    is_same = is_same.all(-1)
    assert (~is_same).sum() <= max(1, is_same.numel() // 100)
    return is_same


def check_project_kept(
    device: str, *, E: int, F: int, r: int, dtype: torch.dtype, x_dtype: torch.dtype
) -> None:
    N, P, D = 3, 2, 100
    torch.manual_seed(1)
    x, A = torch.randn(N, D), torch.randn(P * E * r, D)
    x, A = x.to(device, x_dtype), A.to(device, dtype)
    arrows = (x.to(dtype) @ A[::r].mT).view(N, P, E)
    z, kept = project_kept(x, A, arrows, F)
    expected_z, expected_kept = reference.project_kept(x, A, arrows, F)
    assert kept.dtype == torch.int32 and z.dtype == torch.float32
    # In 16 bits some arrows are as long as others: torch then keeps any.
    lengths, expected = (arrows.abs().gather(-1, k.long()) for k in (kept, expected_kept))
    assert_close(lengths, expected)
    is_same = (kept == expected_kept)[..., None]
    assert is_same.float().mean() > 0.8
    assert_close(z * is_same, expected_z * is_same)
