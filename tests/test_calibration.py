"""Calibration: statistics of generic text, each expert's own, kept between starts."""

import json
from pathlib import Path

import pytest
import torch

from spectr_demo import calibration
from spectr_demo.calibration import calibrate
from spectr_demo.config import RouterConfig
from spectr_demo.engine import SpectrModel
from spectr_demo.layers import routed
from spectr_demo.prompts import encode_answered, shared_length
from spectr_demo.routing import Calibration, RoutingPlan, norm_scores, spectr_scores
from tests.conftest import BuildModel

EXCHANGES = [
    {"prompt": "How are you?", "answer": "Well, thank you."},
    {"prompt": "Tell me of a walk in the rain", "answer": "It was wet."},
]


@pytest.fixture(autouse=True)
def few_exchanges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "generic_text.json"
    file.write_text(json.dumps({"calibration": EXCHANGES}))
    monkeypatch.setattr(calibration, "GENERIC_TEXT", file)


def scores_of(model: SpectrModel, known: Calibration | None) -> dict[str, torch.Tensor]:
    """SpectR's scores of all tokens of the exchanges that count, by layer: (N, E)."""
    scores: dict[str, list[torch.Tensor]] = {}

    class Listen(RoutingPlan):
        def delta(self, bank, x):  # type: ignore[no-untyped-def]
            values = spectr_scores(bank.project(x), bank.singular_values, RouterConfig(name="lag"))
            if known is not None:
                values = known.standardise(bank, spectr_scores, values)
            scores.setdefault(bank.path, []).append(values[0, opening:])
            return x.new_zeros(())

    for exchange in EXCHANGES:
        ids = encode_answered(model.tokenizer, exchange["prompt"], exchange["answer"])
        opening = shared_length(model.template_opening, ids)
        plan = Listen([], [])
        plan.is_base_only = False
        with torch.inference_mode(), routed(plan):
            model.model(torch.tensor([ids]))
    return {path: torch.cat(parts) for path, parts in scores.items()}


def test_generic_text_has_mean_zero_and_deviation_one(routed_model: SpectrModel) -> None:
    raw = scores_of(routed_model, None)
    assert max(values.mean() for values in raw.values()) > 0.1
    for values in scores_of(routed_model, routed_model.calibration).values():
        torch.testing.assert_close(values.mean(0), torch.zeros(3), atol=1e-3, rtol=0)
        torch.testing.assert_close(values.std(0, correction=0), torch.ones(3), atol=1e-3, rtol=0)


def test_spread_is_the_variance_of_text_means_relative_to_independent_tokens(
    routed_model: SpectrModel,
) -> None:
    path, bank = next(iter(routed_model.library.banks.items()))
    standard, lengths = [], []
    for exchange in EXCHANGES:
        ids = encode_answered(routed_model.tokenizer, exchange["prompt"], exchange["answer"])
        lengths.append(len(ids) - shared_length(routed_model.template_opening, ids))
    values = scores_of(routed_model, routed_model.calibration)[path]
    for text in values.split(lengths):
        standard.append(text.mean(0).square() * len(text))
    expected = torch.stack(standard).sum(0) / len(EXCHANGES)
    spread = routed_model.calibration.spread(bank, spectr_scores)
    assert spread == pytest.approx(expected.clamp(min=calibration.MIN_SPREAD).mean().item(), 1e-3)


def test_an_experts_statistics_do_not_depend_on_the_others(
    build_model: BuildModel, expert_folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_model(expert_folders)
    expected = whole.calibration
    # Another library of experts that are known already: nothing is read again.
    monkeypatch.setattr(calibration, "_measure", None)
    other = build_model(expert_folders[::-1])
    got = calibrate(other.base, other.library)
    for path, bank in whole.library.banks.items():
        zeros = torch.zeros(1, 1, 3)
        for score in (spectr_scores, norm_scores):
            torch.testing.assert_close(
                expected.standardise(bank, score, zeros),
                got.standardise(other.library.banks[path], score, zeros).flip(-1),
            )


def test_a_broken_cache_is_measured_again(
    build_model: BuildModel, expert_folders: list[str], cache_folder: Path
) -> None:
    _ = build_model(expert_folders).calibration
    files = list((cache_folder / "calibration").iterdir())
    assert len(files) == 3
    files[0].write_bytes(b"cut short")
    again = build_model(expert_folders).calibration
    assert files[0].stat().st_size > 100
    assert again is not None


def test_an_unwritable_cache_is_said_and_costs_nothing_else(
    build_model: BuildModel, expert_folders: list[str], cache_folder: Path
) -> None:
    model = build_model(expert_folders)
    (cache_folder / "calibration").touch()  # a file where the folder should be
    with pytest.warns(UserWarning, match="SPECTR_CACHE"):
        assert model.generate("Hello", "spectr-context", max_new_tokens=3) is not None
