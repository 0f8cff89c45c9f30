"""On a GPU: an NF4 base in bfloat16, the tiny one; its layers are a multiple of 64 wide."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from peft import PeftModel

from spectr_demo.base.loading import load_base
from spectr_demo.config import GenerationSettings
from spectr_demo.engine.layers import routed
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.plan import RoutingPlan
from spectr_demo.engine.static import TokenStep
from spectr_demo.experts.library import load_experts
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.routers import ROUTERS, parse_router
from spectr_demo.routing.spectr import delta
from tests.conftest import IN_CONTEXT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPT = "every day at noon\nand at night"
COLUMNS = ["base", "single:red", *(key for key in ROUTERS if key not in ("base", "single"))]


@pytest.fixture
def model(base_folder: str, expert_folders: list[str]) -> Iterator[SpectrModel]:
    base = load_base(base_folder, device="cuda")
    yield SpectrModel(base, load_experts(expert_folders, base.model))
    torch.cuda.empty_cache()


def test_base_and_experts_are_on_the_gpu_in_its_dtype(model: SpectrModel) -> None:
    assert model.base.device.type == "cuda"
    for bank in model.library.banks:
        assert bank.A.device.type == "cuda" and bank.A.dtype == model.base.compute_dtype


def test_every_router_runs_and_is_recorded(model: SpectrModel) -> None:
    columns = [IN_CONTEXT if column == "spectr-context" else column for column in COLUMNS]
    step = model.compare(PROMPT, columns, max_new_tokens=12)
    assert step.trace is not None
    for column, output in zip(step.trace.columns, step.columns, strict=True):
        assert output.num_tokens > 0
        total = column.weights[:-1].sum(-1)
        assert np.allclose(total, 0 if column.label == "base" else 1, atol=1e-3)
        assert np.isfinite(column.kl[column.num_prompt :]).all()


@pytest.mark.parametrize("is_copied", [False, True], ids=["all experts", "copies of the chosen"])
@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("router", ["spectr", "spectr-paper", "arrow", "lag", "norm"])
def test_what_layers_add_is_the_reference(
    router: str,
    num_tokens: int,
    is_copied: bool,
    model: SpectrModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chosen in the bank's dtype; compared where the choice is clear."""
    monkeypatch.setattr(ExpertBank, "copying_pays", lambda bank, num, _: is_copied and num < 3)
    names = model.library.names
    config = parse_router(router, names)
    score = ROUTERS[router].score
    assert score is not None
    plan = RoutingPlan([config] * 2, names)
    torch.manual_seed(0)
    num_close = num = 0
    for bank in model.library.banks:
        x = torch.randn(2, num_tokens, bank.A.shape[1], device="cuda", dtype=bank.A.dtype)
        plan.begin_pass(torch.zeros(2, num_tokens, dtype=torch.long, device="cuda"))
        for place, B in enumerate(bank.B):
            y = torch.zeros(2, num_tokens, B.shape[1], device="cuda", dtype=bank.A.dtype)
            rank = bank.singular_values.shape[-1]
            experts = [bank.factors(e, place, rank) for e in range(bank.num_experts)]
            A_star, B_star = (torch.stack(part) for part in zip(*experts, strict=True))
            expected = delta(x.float().cpu(), A_star, B_star, score, config)
            added = plan.add(y, bank, place, x).float().cpu()
            error = (added - expected).norm(dim=-1) / expected.norm(dim=-1)
            num_close += int((error < 3e-2).sum())
            num += error.numel()
    assert num_close >= 0.95 * num


def test_a_single_expert_is_pefts(
    model: SpectrModel, base_folder: str, expert_folders: list[str]
) -> None:
    names = model.library.names
    ids = torch.tensor([model.encode(PROMPT)], device="cuda")
    peft = PeftModel.from_pretrained(load_base(base_folder, device="cuda").model, expert_folders[0])
    with torch.inference_mode():
        theirs = peft(ids).logits.float()
        plan = model.plan([parse_router("single:red", names)], ids.tolist())
        with routed(plan):
            ours = model.model(ids).logits.float()
    assert float((ours - theirs).norm() / theirs.norm()) < 0.03  # both round to bfloat16


def test_the_base_column_is_the_bare_base(model: SpectrModel) -> None:
    ids = torch.tensor([model.encode(PROMPT)] * 2, device="cuda")
    names = model.library.names
    plan = model.plan([parse_router(key, names) for key in ("base", "spectr")], ids.tolist())
    with torch.inference_mode():
        with routed(plan):
            beside = model.model(ids).logits[0]
        alone = model.model(ids).logits[0]
    assert torch.equal(beside, alone)


@pytest.mark.parametrize("columns", [COLUMNS, ["spectr"], ["single:red"], ["lag", "lag"]], ids=str)
def test_a_graph_gives_what_its_kernels_give_one_by_one(
    columns: list[str], model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = [IN_CONTEXT if column == "spectr-context" else column for column in columns]
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: replays.append(replay(self)))
    graphed = model.compare(PROMPT, columns, max_new_tokens=12).trace
    assert len(replays) >= 10
    monkeypatch.setattr(TokenStep, "_capture", lambda self, form: None)
    alone = model.compare(PROMPT, columns, max_new_tokens=12).trace
    assert graphed is not None and alone is not None
    for column, other in zip(graphed.columns, alone.columns, strict=True):
        np.testing.assert_array_equal(column.token_ids, other.token_ids)
        assert (column.experts == other.experts).mean() > 0.99
        np.testing.assert_allclose(column.logprob, other.logprob, atol=0.05)


def test_a_run_is_cancelled_between_two_tokens(model: SpectrModel) -> None:
    steps = model.stream(PROMPT, ["spectr"], GenerationSettings(max_new_tokens=200))
    for _ in range(5):
        next(steps)
    steps.close()
    assert model.generate(PROMPT, "spectr", max_new_tokens=4) is not None
