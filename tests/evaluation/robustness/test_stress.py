"""Weak and alike experts, on the tiny model: what must hold for any experts."""

import json
from typing import Any

import pytest

from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation.robustness import stress as module
from spectr_demo.evaluation.robustness.decisions import METHODS
from spectr_demo.evaluation.robustness.stress import stress
from tests.conftest import PROJECTIONS, BuildModel, SaveExpert
from tests.evaluation.robustness.samples import PROMPTS, build, run_stress, texts_for


@pytest.mark.slow
def test_cutting_to_the_full_rank_changes_nothing(stressed: dict[str, Any]) -> None:
    rank = stressed["rank"]
    assert rank["8"] == rank["4"] == stressed["number"]["3"]["mean"]
    assert rank["1"]["spectr"] == rank["1"]["arrow"]


@pytest.mark.slow
def test_twins_without_noise_cannot_be_told_apart(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SIGMAS", (0.0, 1.0))
    result = run_stress(routed_model, num_experts=())
    same, noisy = result["alike"]["0.0"], result["alike"]["1.0"]
    assert same["overlap"] == pytest.approx(1, abs=1e-4)
    assert noisy["overlap"] < 0.9
    assert all(share == {"decisions": 0.5, "majority": 0.5} for share in same["own"].values())
    library = result["number"]["3"]["mean"]
    for method in METHODS:
        for found in (same["either"], result["undertrained"]["0.0"]):
            assert found[method]["decisions"] == pytest.approx(
                library[method]["decisions"], abs=0.01
            )


@pytest.mark.slow
def test_more_distractors_never_help_raw_scores(stressed: dict[str, Any]) -> None:
    number = stressed["number"]
    for method in ("arrow", "spectr", "norm"):
        for seed in ("0", "1", "2"):
            shares = [number[n]["seeds"][seed][method]["decisions"] for n in ("5", "9", "30")]
            shares = [number["3"]["mean"][method]["decisions"], *shares]
            assert shares == sorted(shares, reverse=True)


@pytest.mark.slow
def test_results_are_json_and_depend_on_the_seed_alone(
    routed_model: SpectrModel, stressed: dict[str, Any]
) -> None:
    once, again = stressed, run_stress(routed_model)
    assert json.loads(json.dumps(once, allow_nan=False)) == once == again
    other = run_stress(routed_model, seeds=(5,), num_experts=(30,))
    assert list(other["number"]["30"]["seeds"]) == ["5"]
    assert other["undertrained"] != once["undertrained"]
    assert other["rank"] == once["rank"]


@pytest.mark.slow
def test_experts_of_other_layers_and_ranks(
    build_model: BuildModel, save_expert: SaveExpert
) -> None:
    """An expert is tested where it is, against those that are there."""
    engine = build_model(
        [
            save_expert("red", seed=0, r=2, target_modules=PROJECTIONS[:3]),
            save_expert("green", seed=1, r=6, target_modules=PROJECTIONS[1:]),
            save_expert("blue", seed=2, r=3, target_modules=["q_proj"], layers_to_transform=[1]),
        ]
    )
    result = run_stress(engine, seeds=(0, 1), num_experts=(5,))
    assert json.dumps(result, allow_nan=False)
    assert all(0 <= share["decisions"] <= 1 for share in result["rank"]["2"].values())
    variants = build(engine)
    first = variants.layers["model.layers.0.self_attn.q_proj"]
    assert first.candidates[:9].tolist() == [0, 3, 6, 9, 12, 15, 18, 21, 24]  # red alone
    assert len(first.pairs.expert_ids) == 3  # red twice, blue once


def test_it_needs_two_experts_and_texts(routed_model: SpectrModel) -> None:
    with pytest.raises(ValueError, match="needs two experts and a text"):
        stress(routed_model, {"red": []}, PROMPTS)
    with pytest.raises(ValueError, match="unknown expert"):
        stress(routed_model, texts_for(routed_model, ("teal",)), PROMPTS)
