"""Compiled routing of one token against the same in torch: whole runs, and function by function."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from spectr_demo.config import RouterConfig
from spectr_demo.cpu import token as kernels
from spectr_demo.engine import plan as plan_module
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.run import Step
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.context import EvidencePool, lead
from spectr_demo.routing.routers import ROUTERS
from spectr_demo.routing.spectr import select

PROMPT = "every day at noon"
TEAM = kernels.Team.of_torch()
COLUMNS: list[list[str | RouterConfig]] = [
    *([key] for key in ROUTERS if key not in ("base", "single")),
    ["single:red"],
    [RouterConfig(name="lag", prefilter=2)],
    [RouterConfig(name="lag", prefilter=2, top_k=2, decay=0.9)],
    [RouterConfig(name="uniform", composition="parameters")],
    [RouterConfig(name="spectr", top_k=2, composition="outputs", weighting="softmax")],
    [RouterConfig(name="arrow", calibrated=True, decay=0.8)],
    ["base", "single:green"],
    ["base", "spectr"],
    ["spectr", "arrow", "spectr", "single:red"],
    ["base", "spectr-context", "single:red", "spectr-paper", "lag", "uniform", "norm", "arrow"],
]


def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "can_route", lambda x, y: False)


def at(x: torch.Tensor) -> tuple[int, bool]:
    """A tensor as compiled code is told of it."""
    return x.data_ptr(), x.dtype == torch.bfloat16


def rule(num_experts: int, **changes: float) -> kernels.Rule:
    """SpectR's score, as it is."""
    plain = kernels.Rule(
        measure=kernels.LENGTH,
        num_kept=num_experts,
        mean=np.zeros((2, num_experts), np.float32),
        std=np.ones((2, num_experts), np.float32),
        temperature=0.0,
        least=-np.inf,
    )
    return plain._replace(**changes)


def one_choice(*shape: int) -> kernels.Chosen:
    """Memory for one token's."""
    places, weights, scores, _ = kernels.Choices.empty(1, *shape)
    return kernels.Chosen(places[0], weights[0], scores[0])


def assert_same(one: Step, other: Step) -> None:
    assert one.trace and other.trace
    assert [c.text for c in one.columns] == [c.text for c in other.columns]
    for a, b in zip(one.trace.columns, other.trace.columns, strict=True):
        assert np.array_equal(a.experts, b.experts)
        for name in ("weights", "scores", "logprob"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("columns", COLUMNS, ids=str)
def test_a_run_is_the_same_in_both(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch, columns: list[str | RouterConfig]
) -> None:
    monkeypatch.setattr(plan_module, "_RECORDED_AT_ONCE", 3)  # filled once, and begun again
    compiled = routed_model.compare(PROMPT, columns, max_new_tokens=6)
    in_torch(monkeypatch)
    assert_same(compiled, routed_model.compare(PROMPT, columns, max_new_tokens=6))


def test_who_can_be_served() -> None:
    token = torch.zeros(4, 1, 8)
    assert kernels.can_route(token, token)
    assert not kernels.can_route(torch.zeros(4, 2, 8), torch.zeros(4, 2, 8)), "a prompt"
    assert not kernels.can_route(torch.zeros(64, 1, 8), torch.zeros(64, 1, 8)), "many rows"
    assert kernels.can_route(token.bfloat16(), token.bfloat16())
    assert not kernels.can_route(token.bfloat16(), token), "two dtypes"
    assert not kernels.can_route(token.half(), token.half())
    apart = torch.zeros(4, 3, 8)[:, :1]
    assert not kernels.can_route(apart, token) and not kernels.can_route(token, apart)
    half = torch.zeros(2, 8).half()
    assert kernels.Factors.of(half, [half], torch.zeros(1, 1, 2)) is None
    meta = torch.zeros(2, 8, device="meta")
    assert kernels.Factors.of(meta, [meta], torch.zeros(1, 1, 2)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_stored_factors(dtype: torch.dtype) -> None:
    """In bfloat16 from its bits: exact products, where torch would round each."""
    torch.manual_seed(0)
    R, P, E, r, D, D_out = 3, 2, 5, 4, 37, 23
    x, A = torch.randn(R, 1, D).to(dtype), torch.randn(P * E * r, D).to(dtype)
    B = torch.randn(E * r, D_out).to(dtype)
    S = torch.rand(P, E, r)
    factors = kernels.Factors.of(A, [B], S)
    assert factors is not None
    expected = (x[:, 0].double() @ A.double().mT).float().view(R, P, E, r)
    z = torch.empty(R, P, E, r)
    kernels.project(z.numpy(), *at(x), factors.A, TEAM)
    assert_close(z, expected)
    kept = torch.stack([torch.randperm(E)[:3] for _ in range(R * P)]).view(R, P, 3)
    chosen = np.empty((R, P, 3, r), np.float32)
    kernels.project_chosen(chosen, *at(x), factors.A, kept.numpy(), E, TEAM)
    places = kept[..., None].expand(-1, -1, -1, r)
    assert_close(torch.from_numpy(chosen), expected.gather(2, places))

    weights = torch.rand(R, P, 3)
    weights[0, 1, 1] = 0
    is_merged = np.array([True, False, True])
    y = torch.randn(R, 1, D_out).to(dtype)
    added = y.clone()
    B_of = (factors.B[0], factors.B[0])
    arrays = chosen, weights.numpy(), is_merged, kept.numpy()
    record = kernels.bind(*arrays, factors.singular_values)
    mixed = kernels.MixedToken(B_of, (record,), [], True, arrays)
    assert mixed.add_(added, 1) is added
    for row in range(R):
        z_of = torch.from_numpy(chosen)[row, 1].double()
        w = weights[row, 1].double()[:, None]
        values = w * ((w * z_of).sum(0) if is_merged[row] else z_of)
        delta = values.flatten() @ B.view(E, r, -1)[kept[row, 1]].flatten(0, 1).double()
        once_rounded = (y[row, 0].double() + delta).to(dtype)
        rounding = 1e-5 if dtype == torch.float32 else 2**-7  # one place, where it is a near tie
        assert_close(added[row, 0], once_rounded, atol=1e-5, rtol=rounding)
        assert (added[row, 0] == once_rounded).float().mean() > 0.9 or dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_share_a_large_bank(dtype: torch.dtype) -> None:
    """And give the same as one, bit for bit; a small bank is not worth waking them."""
    torch.manual_seed(0)
    A, x = torch.randn(2 * 50 * 4, 576).to(dtype), torch.randn(3, 1, 576).to(dtype)
    one = kernels.Team.of_torch()._replace(size=1)
    products = []
    for team in (one, one._replace(size=2), one._replace(size=5)):
        if team.start == 0:
            pytest.skip("needs torch with GNU OpenMP")
        z = torch.full((3, 2, 50, 4), torch.nan)
        kernels.project(z.numpy(), *at(x), kernels.stored(A), team)
        products.append(z)
    expected = (x[:, 0].double() @ A.double().mT).float().view_as(products[0])
    assert_close(products[0], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(products[0], products[1]) and torch.equal(products[0], products[2])


@settings(deadline=None)
@given(data=st.data(), num_experts=st.integers(1, 12), num_kept=st.integers(1, 12))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keep_takes_the_longest(
    data: st.DataObject, dtype: torch.dtype, num_experts: int, num_kept: int
) -> None:
    """Of rows so alike that 8 bits cannot tell them apart, and of equal ones the first."""
    num_kept, rank, D = min(num_kept, num_experts), 2, 3
    entry = st.sampled_from([0.0, 1.0, -1.0, 1.0078125, 0.9921875])
    x = torch.tensor([data.draw(st.lists(entry, min_size=D, max_size=D)) for _ in range(2)])
    num_rows = 2 * num_experts * rank
    rows = [data.draw(st.lists(entry, min_size=D, max_size=D)) for _ in range(num_rows)]
    A = torch.tensor(rows).to(dtype)
    tokens = x.to(dtype)
    arrows = kernels.Arrows.of(A[::rank])
    kept = np.empty((2, 2, num_kept), np.int64)
    kernels.keep(kept, *at(tokens), kernels.stored(A), arrows, rank, TEAM)
    lengths = (x @ A[::rank].float().mT).abs().view(2, 2, num_experts)
    expected = lengths.argsort(dim=-1, descending=True, stable=True)[..., :num_kept]
    assert np.array_equal(kept, expected.numpy())


def test_8_bits_leave_few_arrows_to_read() -> None:
    """The others are never read, which is what the filter is for: here they are not numbers."""
    torch.manual_seed(0)
    A = torch.nn.functional.normalize(torch.randn(1000, 576), dim=-1)
    x = torch.randn(1, 1, 576)
    lengths = (A @ x.flatten()).abs()
    longest = lengths.topk(20).indices
    arrows = kernels.Arrows.of(A)
    A[lengths.argsort(descending=True)[100:]] = torch.nan
    kept = np.empty((1, 1, 20), np.int64)
    kernels.keep(kept, *at(x), kernels.stored(A), arrows, 1, TEAM)
    assert kept.flatten().tolist() == longest.tolist()


def test_what_is_not_a_number_stays_inside_the_bank() -> None:
    """A diverging model must not become a read of other memory."""
    A = torch.ones(4, 3)
    lost = torch.full((1, 1, 3), torch.nan)
    kept = np.empty((1, 1, 2), np.int64)
    kernels.keep(
        kept, *at(lost), kernels.stored(A), kernels.Arrows.of(A), 1, kernels.Team.of_torch()
    )
    assert set(kept.flatten().tolist()) <= {0, 1, 2, 3}
    nan = np.full((1, 2, 4), np.nan, np.float32)
    chosen = one_choice(1, 2, 3)
    kernels.choose(chosen, np.empty_like(nan), np.array([0]), nan, rule(4))
    assert set(chosen.places.flatten().tolist()) <= {0, 1, 2, 3}


@settings(deadline=None)
@given(
    scores=st.lists(
        st.floats(-50, 50, width=32), min_size=1, max_size=9, unique_by=lambda s: round(s, 3)
    ),
    top_k=st.integers(1, 9),
    temperature=st.sampled_from([None, 0.02, 1.0]),
    least=st.sampled_from([None, 0.0, 60.0]),
)
@example(scores=[1.0, 2.0, -50.0], top_k=3, temperature=0.02, least=None)
@example(scores=[10.875, 10.867477416992188], top_k=2, temperature=0.02, least=None)
def test_choose_is_select(
    scores: list[float], top_k: int, temperature: float | None, least: float | None
) -> None:
    config = RouterConfig(name="spectr", top_k=top_k)
    if temperature is not None:
        config = replace(config, weighting="softmax", temperature=temperature)
    tensor = torch.tensor(scores)[None, None]
    expected = select(tensor, config, least)
    asked = rule(
        len(scores),
        temperature=temperature or 0.0,
        least=-np.inf if least is None else least,
    )
    chosen = one_choice(1, 1, min(top_k, len(scores)))
    rows = torch.full((3, 1, len(scores)), torch.nan)
    kernels.choose(chosen, rows.numpy(), np.array([1]), tensor.numpy(), asked)
    for found, of_torch in zip(chosen, expected, strict=True):
        assert_close(torch.from_numpy(found), of_torch, atol=1e-6, rtol=1e-5)
    indices, kept, _ = expected
    assert_close(rows[1:2], torch.zeros_like(tensor).scatter(-1, indices, kept))
    assert rows[::2].isnan().all(), "other rows are not this router's"


@pytest.mark.parametrize("num_first", [0, 4], ids=["read once", "read twice, in lines"])
def test_a_pool_may_change_between_both(num_first: int) -> None:
    """Token by token, several at once, token by token again: the state is one."""
    R, P, decay = 2, 2, 0.8
    generator = torch.Generator().manual_seed(1)
    banks = [
        ExpertBank(
            paths=("layers.0.a", "layers.0.b"),
            expert_ids=torch.tensor(ids),
            A=torch.zeros(0),
            B=(),
            singular_values=torch.zeros(0),
        )
        for ids in ([0, 1, 2], [2, 0])
    ]
    texts = [torch.randn(R, 12, P, len(bank.expert_ids), generator=generator) for bank in banks]
    is_evidence = torch.rand(R, 7, generator=generator) > 0.4
    is_newline = torch.rand(R, 12, generator=generator) > 0.7

    def pool() -> EvidencePool:
        known = torch.ones(R, num_first, dtype=torch.bool) if num_first else is_evidence
        pool = EvidencePool(decay, 3, known)
        if num_first:
            for bank, text in zip(banks, texts, strict=True):
                pool.add(bank, text[:, :num_first])
            pool.read_again(is_evidence)
        return pool

    one, other = pool(), pool()
    one.begin_lines(is_newline)
    expected = [lead(one.add(bank, text)) for bank, text in zip(banks, texts, strict=True)]
    start = 0
    for length in (1, 1, 3, 1, 1, 2, 1, 1, 1):
        here = slice(start, start := start + length)
        other.begin_lines(is_newline[:, here])
        for bank, text, whole in zip(banks, texts, expected, strict=True):
            if length == 1:
                state = other.of_token(bank, R, is_lead=True)
                found = torch.from_numpy(kernels.pooled(text[:, here][:, 0].numpy(), state))
                found = found[:, None]
            else:
                found = lead(other.add(bank, text[:, here]))
            assert_close(found, whole[:, here], atol=1e-5, rtol=1e-4)
    assert_close(one.latest, other.latest, atol=1e-5, rtol=1e-4)
