"""Batches of rows on which the operators' kernels are compared with `reference`.

Axes: R rows, T tokens, P projections of a bank, E experts, D outputs, K selected, r rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.testing import assert_close

from spectr_demo.gpu import reference
from spectr_demo.gpu.operators import add_chosen_, project_kept, weigh_
from spectr_demo.gpu.rules import Rule, Rules

UNWRITTEN = -9


@dataclass(frozen=True, kw_only=True)
class Case:
    """rows: of the batch. E: of the bank, of which LAG's filter keeps `kept`, where given, before
    the kernels see them. has_statistics: scores are standardised. has_weights: rows that do not
    score have weights. dtype: of the bank; y_dtype: of the layer."""

    name: str
    rows: Sequence[Rule]
    P: int = 2
    E: int = 5
    r: int = 6
    D: int = 80
    T: int = 2
    kept: int | None = None
    has_statistics: bool = False
    has_weights: bool = False
    places: torch.dtype = torch.int16
    dtype: torch.dtype = torch.float32
    y_dtype: torch.dtype = torch.float32


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
    Case(name="standardised", rows=MIXED[:6], has_weights=True, has_statistics=True, r=4, D=64),
    Case(name="none has weights", rows=[CONSTANT, Rule(measure="length", top_k=1), CONSTANT], r=64),
    Case(name="none scores", rows=[CONSTANT, MERGED_CONSTANT], has_weights=True, r=3),
    Case(name="one expert", rows=[*MIXED[:1], CONSTANT], E=1, r=1, P=1, D=7, has_weights=True),
    Case(
        name="bfloat16",
        rows=[Rule(measure="length", top_k=4, is_merged=True), Rule(measure="output", top_k=2)],
        E=8,
        r=16,
        P=3,
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
        name="two dtypes", rows=[Rule(measure="length", top_k=2)], T=3, dtype=torch.bfloat16, D=200
    ),
    Case(
        name="1,000 experts",
        rows=[Rule(measure="length", top_k=8, filter=20), Rule(measure="output", top_k=8)],
        E=1000,
        r=9,
        P=1,
        T=1,
    ),
    Case(
        name="1,000 experts, merged",
        rows=[MERGED_CONSTANT, Rule(measure="length", top_k=2), CONSTANT],
        E=1000,
        r=2,
        P=1,
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
    B: list[Tensor]  # (E * r, D) of each layer
    singular_values: Tensor  # (P, E, r)
    kept: Tensor | None  # (R, P, F)


def inputs_of(case: Case, device: str) -> Inputs:
    """Random ones; the third expert, where there is one, is zero at the last layer."""
    generator = torch.Generator().manual_seed(7)
    R, P, E, r = len(case.rows), case.P, case.E, case.r

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    z, B = random(R * case.T, P, E, r), [random(E * r, case.D) for _ in range(P)]
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
        [b.to(device, case.dtype) for b in B],
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
    """Each layer of one token, recorded in the second of three slots."""
    rules, z, B, singular_values, kept = inputs_of(case, device)
    R, P = len(case.rows), case.P
    z = z[:R].contiguous()
    step = torch.ones(1, dtype=torch.int64, device=device)
    ours, theirs = (Choices.empty(case, (R, 3, P, rules.most), device) for _ in range(2))
    for place in range(P):
        y = torch.randn(R, case.D, device=device).to(case.y_dtype)
        expected = y.clone()
        args = B[place], place, singular_values, rules
        add_chosen_(y, z, *args, kept=kept, **ours._asdict(), step=step)
        reference.add_chosen_(expected, z, *args, kept, *theirs, step)
        assert_close(y, expected)
        # Without a record it is the same.
        again = torch.zeros_like(y)
        add_chosen_(again, z, *args, kept=kept)
        expected = torch.zeros_like(y)
        reference.add_chosen_(expected, z, *args, kept, None, None, None, None)
        assert_close(again, expected)
    _compare(ours, theirs)
    is_scored = rules.measure >= 0
    assert (ours.weights[~is_scored] == UNWRITTEN).all()
    assert (ours.weights[:, [0, 2]] == UNWRITTEN).all(), "of other tokens"
    total = ours.weights[is_scored, 1].sum(-1)
    assert_close(total, torch.ones_like(total))


def check_weigh(case: Case, device: str) -> None:
    """A prompt's tokens, recorded."""
    rules, z, _, singular_values, _ = inputs_of(case, device)
    shape = *z.shape[:2], rules.most
    ours, theirs = (Choices.empty(case, shape, device) for _ in range(2))
    weighed, expected = z.clone(), z.clone()
    weigh_(weighed, singular_values, rules, **ours._asdict())
    reference.weigh_(expected, singular_values, rules, *theirs)
    assert_close(weighed, expected)
    _compare(ours, theirs)
    weigh_(z, singular_values, rules)
    assert torch.equal(z, weighed), "the same without a record"


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
    assert kept.dtype == torch.int32 and z.dtype == dtype
    # In 16 bits some arrows are as long as others: torch then keeps any.
    lengths, expected = (arrows.abs().gather(-1, k.long()) for k in (kept, expected_kept))
    assert_close(lengths, expected)
    is_same = (kept == expected_kept)[..., None]
    assert is_same.float().mean() > 0.8
    assert_close(z * is_same, expected_z * is_same)


def _compare(ours: Choices, theirs: Choices) -> None:
    """Of equal scores, as of experts that are zero, torch chooses any."""
    assert_close(ours.weights, theirs.weights)
    assert_close(ours.scores, theirs.scores)
    is_zero = theirs.scores == 0
    assert_close(ours.places.where(~is_zero, 0), theirs.places.where(~is_zero, 0))
