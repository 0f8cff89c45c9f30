"""On a GPU: the kernels, compiled."""

from dataclasses import replace

import pytest
import torch

from tests.gpu.cases import CASES, Case, check_add_chosen, check_project_kept, check_weigh

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_add_what_the_reference_adds(case: Case) -> None:
    check_add_chosen(case, "cuda")


@pytest.mark.parametrize("case", [c for c in CASES if not c.kept], ids=lambda case: case.name)
def test_kernels_weigh_as_the_reference_does(case: Case) -> None:
    """Of many tokens: in place, some met what another thread had written."""
    check_weigh(replace(case, T=64), "cuda")


@pytest.mark.parametrize(("E", "F", "r"), [(1, 1, 1), (5, 5, 6), (1000, 20, 3), (12, 3, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_project_as_the_reference_does(E: int, F: int, r: int, dtype: torch.dtype) -> None:
    check_project_kept("cuda", E=E, F=F, r=r, dtype=dtype, x_dtype=dtype)
