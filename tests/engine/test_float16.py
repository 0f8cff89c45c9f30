"""Experts in float16, as a T4 computes: what they add stays finite where bfloat16's does."""

import pytest
import torch
from torch import Tensor

from spectr_demo.config import RouterConfig
from spectr_demo.engine.plan import RoutingPlan
from spectr_demo.gpu import operators
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.routers import ROUTERS, parse_router
from spectr_demo.routing.spectr import align

E, D_IN, SIZES, RANK = 3, 256, (48, 16), 4
NAMES = [f"e{e}" for e in range(E)]
ROUTED: list[str | RouterConfig] = [
    "single:e1",
    "uniform",
    *(key for key, row in ROUTERS.items() if row.score and not row.preset.calibrated),
    RouterConfig(name="lag", prefilter=2),
]


def bank_in(dtype: torch.dtype) -> ExpertBank:
    generator = torch.Generator().manual_seed(0)
    experts = {}
    for e in range(E):
        A = torch.randn(RANK, D_IN, generator=generator)
        B = [torch.randn(D, RANK, generator=generator) for D in SIZES]
        experts[e] = [align(A, b, 0.001) for b in B]
    paths = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]
    return ExpertBank.from_aligned(paths, experts, device=torch.device("cpu"), dtype=dtype)


def added(router: str | RouterConfig, x: Tensor, dtype: torch.dtype, *, is_gpu: bool) -> Tensor:
    """To both layers, (R, T, 2 D_out) float32."""
    bank, plan = bank_in(dtype), RoutingPlan([parse_router(router, NAMES)] * len(x), NAMES)
    ys = [torch.zeros(*x.shape[:2], D, dtype=dtype) for D in SIZES]
    for place, y in enumerate(ys):
        if is_gpu and x.shape[1] == 1:
            bases = [lambda x, y=y: y.clone() for y in ys]
            ys[place] = plan.read_token(bank, place, bases, x.to(dtype))
        else:
            ys[place] = plan.add(y, bank, place, x.to(dtype))
    return torch.cat(ys, dim=-1).float()


@pytest.mark.parametrize("is_gpu", [False, True], ids=["path of a CPU", "path of a GPU"])
@pytest.mark.parametrize("num_tokens", [1, 40])
@pytest.mark.parametrize("router", ROUTED, ids=str)
def test_large_activations_stay_finite(
    router: str | RouterConfig, num_tokens: int, is_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their projections are longer than the largest float16; what is added is not."""
    monkeypatch.setattr(operators, "serve", lambda device: is_gpu)
    # No entry is larger, and each token lies along a direction of an expert.
    along = bank_in(torch.float32).A[torch.arange(2 * num_tokens) % (2 * E * RANK)]
    x = 1e4 * along.sign().view(2, num_tokens, D_IN)
    assert bank_in(torch.float16).project(x).abs().max() > torch.finfo(torch.float16).max
    found, expected = (
        added(router, x, dtype, is_gpu=is_gpu) for dtype in (torch.float16, torch.float32)
    )
    assert found.isfinite().all()
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.005 * scale)
