"""What a plan adds, against the method written out: `routing.spectr.delta`."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from spectr_demo.config import RouterConfig
from spectr_demo.engine.layers import routed
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.plan import RoutingPlan
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.routers import ROUTERS, parse_router
from spectr_demo.routing.spectr import delta

SCORED = [key for key, row in ROUTERS.items() if row.score and not row.preset.calibrated]
CONFIGS: list[str | RouterConfig] = [
    *SCORED,
    RouterConfig(name="lag", prefilter=2, top_k=2, composition="parameters"),
    RouterConfig(name="norm", top_k=2, weighting="softmax", temperature=0.5),
]


@pytest.mark.parametrize(
    ("num_tokens", "is_copied"),
    [(1, False), (5, False), (5, True)],
    ids=["compiled", "torch", "torch, copies of the chosen"],
)
@pytest.mark.parametrize("router", CONFIGS, ids=str)
def test_every_path_gives_the_reference(
    router: str | RouterConfig,
    num_tokens: int,
    is_copied: bool,
    routed_model: SpectrModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = routed_model.library.names
    config = parse_router(router, names)
    score = ROUTERS[config.name].score
    assert score is not None
    monkeypatch.setattr(
        ExpertBank, "copying_pays", lambda bank, num, _: is_copied and num < bank.num_experts
    )
    generator = torch.Generator().manual_seed(0)
    plan = RoutingPlan([config] * 2, names)
    for bank in routed_model.library.banks:
        x = torch.randn(2, num_tokens, bank.A.shape[1], generator=generator)
        plan.begin_pass(torch.zeros(2, num_tokens, dtype=torch.long))
        for place, B in enumerate(bank.B):
            y = torch.randn(2, num_tokens, B.shape[1], generator=generator)
            rank = bank.singular_values.shape[-1]
            experts = [bank.factors(e, place, rank) for e in range(bank.num_experts)]
            A_star, B_star = (torch.stack(part) for part in zip(*experts, strict=True))
            expected = y + delta(x, A_star, B_star, score, config)
            assert_close(plan.add(y, bank, place, x), expected, atol=1e-4, rtol=1e-4)


def test_a_pass_begins_by_position_too(routed_model: SpectrModel) -> None:
    """Token ids may come by name, by position, or as embeddings."""
    names = routed_model.library.names
    plan = RoutingPlan([parse_router("spectr", names)], names)
    seen: list[torch.Tensor] = []
    plan.begin_pass = seen.append  # type: ignore[method-assign]
    ids = torch.tensor([routed_model.encode("hi\nthere")])
    embed = routed_model.model.get_input_embeddings()
    decoder = routed_model.model.get_decoder()
    with torch.inference_mode(), routed(plan):
        by_name = decoder(input_ids=ids).last_hidden_state
        by_position = decoder(ids).last_hidden_state
        by_embeddings = decoder(inputs_embeds=embed(ids)).last_hidden_state
    assert_close(by_name, by_position)
    assert_close(by_name, by_embeddings)
    assert torch.equal(seen[0], ids) and torch.equal(seen[1], ids)
    assert (seen[2] == -1).all() and seen[2].shape == ids.shape


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_same_experts_are_composed_in_each_rows_own_way(
    order: tuple[int, int], routed_model: SpectrModel
) -> None:
    """Where a request is read, two rows may have the same weights and two compositions."""
    names = routed_model.library.names
    ways = [
        RouterConfig(name="spectr-context", top_k=2, composition=composition, confidence=None)
        for composition in ("parameters", "outputs")  # type: ignore[arg-type]
    ]
    ids = [routed_model.encode("paint it red")] * 2

    def logits(routers: list[RouterConfig]) -> torch.Tensor:
        prompts = ids[: len(routers)]
        with torch.inference_mode(), routed(routed_model.plan(routers, prompts)):
            return routed_model.model(torch.tensor(prompts)).logits

    routers = [parse_router(ways[i], names) for i in order]
    alone = [logits([router])[0] for router in routers]
    assert not torch.allclose(*alone, atol=0.1)
    for found, expected in zip(logits(routers), alone, strict=True):
        assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_experts_are_attached_once(routed_model: SpectrModel) -> None:
    """A second time they would be wrapped twice, and every answer would change."""
    layers = len(list(routed_model.model.modules()))
    with pytest.raises(ValueError, match="experts attached already"):
        SpectrModel(routed_model.base, routed_model.library)
    assert len(list(routed_model.model.modules())) == layers
    routed_model.detach()
    SpectrModel(routed_model.base, routed_model.library).detach()


def test_a_base_whose_template_fails_is_left_as_it_was(
    routed_model: SpectrModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The experts are not attached, so it can be tried again."""
    routed_model.detach()
    broken = copy.deepcopy(tokenizer)
    broken.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ValueError, match="the chat template refuses"):
        SpectrModel(replace(routed_model.base, tokenizer=broken), routed_model.library)
    SpectrModel(routed_model.base, routed_model.library).detach()
