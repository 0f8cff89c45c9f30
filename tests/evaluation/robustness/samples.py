"""Texts of the tiny model's experts, and the inputs of its layers."""

from typing import Any

import torch
from torch import Tensor

from spectr_demo.base.prompts import encode
from spectr_demo.engine.layers import routed
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.plan import RoutingPlan
from spectr_demo.evaluation.reading import Text
from spectr_demo.evaluation.robustness.stress import RANKS, SIGMAS, stress
from spectr_demo.evaluation.robustness.variants import Variants, with_noise
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.routers import parse_router
from tests.conftest import EXPERT_NAMES

PROMPTS = ["How are you?", "What is a river, and where does it go?"]


def texts_for(engine: SpectrModel, names: tuple[str, ...] = EXPERT_NAMES) -> dict[str, list[Text]]:
    return {
        name: [
            Text(
                prompt_ids=tuple(encode(engine.tokenizer, f"{name} {i}")),
                answer_ids=tuple(b + 2 for b in f"{i} is {name}".encode()),
            )
            for i in range(2)
        ]
        for name in names
    }


def run_stress(engine: SpectrModel, **options: Any) -> dict[str, Any]:
    return stress(engine, texts_for(engine), PROMPTS, **{"num_experts": (5, 9, 30), **options})


class Spy(RoutingPlan):
    """Keeps the input of every layer; routes by one router."""

    def __init__(self, engine: SpectrModel, router: str) -> None:
        names = engine.library.names
        super().__init__([parse_router(router, names)], names)
        self.is_base_only = False
        self.inputs: dict[str, Tensor] = {}

    def add(self, y: Tensor, bank: ExpertBank, place: int, x: Tensor) -> Tensor:
        self.inputs[bank.paths[place]] = x
        return super().add(y, bank, place, x)


def inputs(engine: SpectrModel, router: str, ids: list[int]) -> dict[str, Tensor]:
    spy = Spy(engine, router)
    with torch.inference_mode(), routed(spy):
        engine.model.get_decoder()(input_ids=torch.tensor([ids]), use_cache=False)
    return spy.inputs


def build(engine: SpectrModel, num_distractors: int = 4) -> Variants:
    noisy = with_noise(engine.library, SIGMAS, seed=0)
    return Variants(engine.library, RANKS, noisy, (0, 1), num_distractors)
