"""LAG's filter for one token: the longest arrows, read in 8 bits where that is enough."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectr_demo.cpu.filter import Arrows, keep
from spectr_demo.cpu.numbers import stored
from spectr_demo.cpu.products import Team

TEAM = Team.of_torch()


def at(x: torch.Tensor) -> tuple[int, bool]:
    """A tensor as compiled code is told of it."""
    return x.data_ptr(), x.dtype == torch.bfloat16


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
    arrows = Arrows.of(A[::rank])
    kept = np.empty((2, 2, num_kept), np.int64)
    keep(kept, *at(tokens), stored(A), arrows, rank, TEAM)
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
    arrows = Arrows.of(A)
    A[lengths.argsort(descending=True)[100:]] = torch.nan
    kept = np.empty((1, 1, 20), np.int64)
    keep(kept, *at(x), stored(A), arrows, 1, TEAM)
    assert kept.flatten().tolist() == longest.tolist()


def test_what_is_not_a_number_keeps_experts_of_the_bank() -> None:
    """A diverging model must not become a read of other memory."""
    A = torch.ones(4, 3)
    lost = torch.full((1, 1, 3), torch.nan)
    kept = np.empty((1, 1, 2), np.int64)
    keep(kept, *at(lost), stored(A), Arrows.of(A), 1, Team.of_torch())
    assert set(kept.flatten().tolist()) <= {0, 1, 2, 3}
