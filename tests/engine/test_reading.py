"""Calibration: the statistics of generic prompts, by hand."""

import json
from pathlib import Path

import pytest
import torch

from spectr_demo.base import generic
from spectr_demo.base.prompts import shared_length
from spectr_demo.config import RouterConfig
from spectr_demo.engine.layers import routed
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.reading import Listening
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.calibration import Calibration
from spectr_demo.routing.routers import calibrated_scores
from spectr_demo.routing.spectr import Score

PROMPTS = ["How are you?", "Tell me of a walk in the rain"]


@pytest.fixture(autouse=True)
def few_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "generic_text.json"
    file.write_text(json.dumps({"bases": {"tiny": PROMPTS}}))
    monkeypatch.setattr(generic, "GENERIC_TEXT", file)


def scores_of(
    model: SpectrModel, score: Score, known: Calibration | None
) -> dict[ExpertBank, torch.Tensor]:
    """The scores of all tokens of the prompts that count, by bank: (N, P, E)."""
    scores: dict[ExpertBank, list[torch.Tensor]] = {}

    class Listen(Listening):
        def listen(self, bank, x):  # type: ignore[no-untyped-def]
            values = score(bank.project(x), bank.singular_values, RouterConfig(name="lag"))
            if known is not None:
                values = known.standardise(bank, score, values)
            scores.setdefault(bank, []).append(values[0, opening:])

    for prompt in PROMPTS:
        ids = model.encode(prompt)
        opening = shared_length(model.template.opening, ids)
        with torch.inference_mode(), routed(Listen()):
            model.model(torch.tensor([ids]))
    return {bank: torch.cat(parts) for bank, parts in scores.items()}


@pytest.mark.parametrize("score", calibrated_scores())
def test_generic_text_has_mean_zero_and_deviation_one(
    routed_model: SpectrModel, score: Score
) -> None:
    raw = scores_of(routed_model, score, None)
    assert max(values.mean() for values in raw.values()) > 0.1
    for values in scores_of(routed_model, score, routed_model.calibration).values():
        mean, std = values.mean(0), values.std(0, correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-3, rtol=0)
        torch.testing.assert_close(std, torch.ones_like(std), atol=1e-3, rtol=0)
