"""Alignment: the decomposition itself, hand-computed cases, ranks that are not full."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from spectr_demo.routing.spectr import align, subspace_overlap

sizes = st.integers(1, 24)


def test_hand_computed() -> None:
    """`2 * [[0, 3], [0, 0]]`: one direction, e_2 in and e_1 out, with singular value 6."""
    A = torch.tensor([[0.0, 3.0]])
    B = torch.tensor([[1.0], [0.0]])
    aligned = align(A, B, 2.0)
    assert_close(aligned.A, torch.tensor([[0.0, 1.0]]))
    assert_close(aligned.B, torch.tensor([[6.0], [0.0]]))
    assert_close(aligned.B @ aligned.A, torch.tensor([[0.0, 6.0], [0.0, 0.0]]))
    assert_close(aligned.singular_values, torch.tensor([6.0]))


@given(r=sizes, D_in=sizes, D_out=sizes, seed=st.integers(0, 9), scaling=st.floats(0.1, 8))
def test_same_function_in_its_own_svd_basis(
    r: int, D_in: int, D_out: int, seed: int, scaling: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(r, D_in, generator=generator)
    B = torch.randn(D_out, r, generator=generator)
    aligned = align(A, B, scaling)
    assert aligned.A.shape == A.shape
    assert aligned.B.shape == B.shape
    delta = scaling * B @ A
    assert_close(aligned.B @ aligned.A, delta, atol=1e-4 * float(delta.norm()), rtol=1e-4)
    expected = torch.linalg.svdvals(delta)[:r]
    values = aligned.singular_values
    top = float(values[0])
    assert_close(values[: len(expected)], expected, atol=1e-4 * top, rtol=1e-4)
    assert (values[:-1] >= values[1:]).all()
    rank = int((values > 0).sum())
    assert rank <= min(r, D_in, D_out)
    gram = aligned.A @ aligned.A.mT
    assert_close(gram, torch.diag((values > 0).float()), atol=1e-5, rtol=0)


@given(padding=st.integers(1, 4), seed=st.integers(0, 9))
def test_padding_a_rank_changes_nothing(padding: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(3, 16, generator=generator), torch.randn(12, 3, generator=generator)
    plain = align(A, B, 1.0)
    padded = align(
        torch.cat([A, torch.zeros(padding, 16)]), torch.cat([B, torch.zeros(12, padding)], 1), 1.0
    )
    assert_close(padded.A[:3], plain.A, atol=1e-5, rtol=1e-4)
    assert_close(padded.B[:, :3], plain.B, atol=1e-4, rtol=1e-4)
    assert padded.A[3:].abs().max() == 0
    assert padded.B[:, 3:].abs().max() == 0


@pytest.mark.parametrize("distance", [0, 1e-6, 1e-3, 1e-1])
def test_rows_that_depend_on_each_other(distance: float) -> None:
    """Two nearly equal rows of A whose columns of B nearly cancel: the product is small beside
    its parts, and what is left of it is still exact, in directions that are orthonormal."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(8, 64, generator=generator), torch.randn(96, 8, generator=generator)
    A[4] = A[3] + distance * A[4]
    B[:, 4] = -0.99 * B[:, 3]
    aligned = align(A, B, 1.0)
    product = B.double() @ A.double()
    precision = 1e-6 * torch.linalg.svdvals(product)[0]
    assert_close(aligned.B.double() @ aligned.A.double(), product, atol=5 * precision, rtol=0)
    values = aligned.singular_values
    assert_close(values.double(), torch.linalg.svdvals(product)[:8], atol=5 * precision, rtol=0)
    gram = aligned.A @ aligned.A.mT
    assert_close(gram, torch.diag((values > 0).float()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("power", [-12, 0, 12])
def test_rows_of_any_length(power: int) -> None:
    """A's rows and B's columns may differ by any factor, as long as their products do not."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(4, 32, generator=generator), torch.randn(24, 4, generator=generator)
    plain = align(A, B, 1.0)
    factor = torch.tensor([1, 10.0**power, 1, 10.0**-power])
    scaled = align(A * factor[:, None], B / factor, 1.0)
    assert_close(scaled.B @ scaled.A, plain.B @ plain.A, atol=1e-5, rtol=1e-5)
    assert_close(scaled.singular_values, plain.singular_values)
    assert_close(scaled.A, plain.A, atol=1e-5, rtol=1e-5)


def test_only_the_product_counts() -> None:
    """Any other factors of the same update give the same directions, in the same signs."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(4, 32, generator=generator), torch.randn(24, 4, generator=generator)
    change = torch.randn(4, 4, generator=generator)
    plain = align(A, B, 1.0)
    assert (plain.A.sum(-1) > 0).all()
    for other in (-torch.eye(4), change):
        changed = align(other @ A, B @ torch.linalg.inv(other), 1.0)
        assert_close(changed.A, plain.A, atol=1e-5, rtol=1e-4)
        assert_close(changed.B, plain.B, atol=1e-4, rtol=1e-4)


def test_an_untrained_adapter_has_no_direction() -> None:
    aligned = align(torch.randn(4, 8), torch.zeros(6, 4), 1.0)
    assert aligned.A.abs().max() == 0
    assert aligned.B.abs().max() == 0


def test_a_stack_of_layers_equals_each_layer_alone() -> None:
    A, B = torch.randn(5, 4, 16), torch.randn(5, 12, 4)
    scaling = torch.tensor([0.5, 1, 2, 3, 4])
    stacked = align(A, B, scaling)
    for layer in range(5):
        alone = align(A[layer], B[layer], float(scaling[layer]))
        assert_close(stacked.B[layer] @ stacked.A[layer], alone.B @ alone.A, atol=1e-4, rtol=1e-4)
        assert_close(stacked.singular_values[layer], alone.singular_values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_gives_float32(dtype: torch.dtype) -> None:
    aligned = align(torch.randn(2, 8).to(dtype), torch.randn(8, 2).to(dtype), 1.0)
    assert aligned.A.dtype == aligned.B.dtype == torch.float32


def test_overlap_of_known_subspaces() -> None:
    e = torch.eye(4)
    assert subspace_overlap(e[:2], e[:2]) == 1
    assert subspace_overlap(e[:2], e[2:]) == 0
    assert subspace_overlap(e[:2], e[1:3]) == 0.5
    assert subspace_overlap(e[:1], e[:3]) == 1, "the smaller lies in the larger"
    assert subspace_overlap(e[:2], torch.zeros(2, 4)) == 0
    diagonal = (e[0] + e[1])[None] / 2**0.5
    assert subspace_overlap(diagonal, e[:1]) == pytest.approx(0.5)
