"""Compiled code for one token of a bank, function by function, against torch."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from spectr_demo.cpu.filter import project_chosen
from spectr_demo.cpu.numbers import stored
from spectr_demo.cpu.products import Team
from spectr_demo.cpu.token import Factors, add_at, bind, can_route, project

TEAM = Team.of_torch()


def at(x: torch.Tensor) -> tuple[int, bool]:
    """A tensor as compiled code is told of it."""
    return x.data_ptr(), x.dtype == torch.bfloat16


def test_who_can_be_served() -> None:
    token = torch.zeros(4, 1, 8)
    assert can_route(token, token)
    assert not can_route(torch.zeros(4, 2, 8), torch.zeros(4, 2, 8)), "a prompt"
    assert not can_route(torch.zeros(64, 1, 8), torch.zeros(64, 1, 8)), "many rows"
    assert can_route(token.bfloat16(), token.bfloat16())
    assert not can_route(token.bfloat16(), token), "two dtypes"
    assert not can_route(token.half(), token.half())
    apart = torch.zeros(4, 3, 8)[:, :1]
    assert not can_route(apart, token) and not can_route(token, apart)
    half = torch.zeros(2, 8).half()
    assert Factors.of(half, [half], torch.zeros(1, 1, 2)) is None
    meta = torch.zeros(2, 8, device="meta")
    assert Factors.of(meta, [meta], torch.zeros(1, 1, 2)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_stored_factors(dtype: torch.dtype) -> None:
    """In bfloat16 from its bits: exact products, where torch would round each."""
    torch.manual_seed(0)
    R, P, E, r, D, D_out = 3, 2, 5, 4, 37, 23
    x, A = torch.randn(R, 1, D).to(dtype), torch.randn(P * E * r, D).to(dtype)
    B = torch.randn(E * r, D_out).to(dtype)
    S = torch.rand(P, E, r)
    factors = Factors.of(A, [B], S)
    assert factors is not None
    expected = (x[:, 0].double() @ A.double().mT).float().view(R, P, E, r)
    z = torch.empty(R, P, E, r)
    project(z.numpy(), *at(x), factors.A, TEAM)
    assert_close(z, expected)
    kept = torch.stack([torch.randperm(E)[:3] for _ in range(R * P)]).view(R, P, 3)
    chosen = np.empty((R, P, 3, r), np.float32)
    project_chosen(chosen, *at(x), factors.A, kept.numpy(), E, TEAM)
    places = kept[..., None].expand(-1, -1, -1, r)
    assert_close(torch.from_numpy(chosen), expected.gather(2, places))

    weights = torch.rand(R, P, 3)
    weights[0, 1, 1] = 0
    is_merged = np.array([True, False, True])
    y = torch.randn(R, 1, D_out).to(dtype)
    added = y.clone()
    arrays = chosen, weights.numpy(), is_merged, kept.numpy()
    record = bind(*arrays, factors.singular_values)
    add_at(record, *at(added), factors.B[0], 1)
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
    one = Team.of_torch()._replace(size=1)
    products = []
    for team in (one, one._replace(size=2), one._replace(size=5)):
        if team.start == 0:
            pytest.skip("needs torch with GNU OpenMP")
        z = torch.full((3, 2, 50, 4), torch.nan)
        project(z.numpy(), *at(x), stored(A), team)
        products.append(z)
    expected = (x[:, 0].double() @ A.double().mT).float().view_as(products[0])
    assert_close(products[0], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(products[0], products[1]) and torch.equal(products[0], products[2])


def test_a_record_refuses_what_is_not_contiguous() -> None:
    """Compiled code reads such an array by its address alone."""
    z = np.zeros((1, 4, 2, 3), np.float32)
    weights, is_merged = np.zeros((1, 2, 2), np.float32), np.zeros(1, np.bool_)
    singular_values = np.ones((2, 2, 3), np.float32)
    with pytest.raises(ValueError, match="not contiguous"):
        bind(z[:, ::2], weights, is_merged, None, singular_values)
