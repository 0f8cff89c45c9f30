"""Weak and alike experts, on the tiny model: what must hold for any experts."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from tqdm import tqdm

from spectr_demo.base.prompts import encode, shared_length
from spectr_demo.config import RouterConfig
from spectr_demo.engine.layers import routed
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.plan import RoutingPlan
from spectr_demo.evaluation.accuracy import routing_accuracy
from spectr_demo.evaluation.reading import Text
from spectr_demo.evaluation.robustness import stress as module
from spectr_demo.evaluation.robustness.stress import METHODS, RANKS, SIGMAS, read_generic, stress
from spectr_demo.evaluation.robustness.variants import (
    SPECTR,
    GenericText,
    Variants,
    cut,
    with_noise,
)
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.context import EvidencePool
from spectr_demo.routing.routers import ROUTERS, parse_router
from spectr_demo.routing.spectr import select, spectr_scores
from tests.conftest import EXPERT_NAMES, PROJECTIONS, BuildModel, SaveExpert, banks_by_path

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


def run(engine: SpectrModel, **options: Any) -> dict[str, Any]:
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


def test_full_rank_is_the_routers_own_score(routed_model: SpectrModel) -> None:
    variants, banks = build(routed_model), banks_by_path(routed_model.library)
    config = RouterConfig(name="spectr")
    for path, x in inputs(routed_model, "base", encode(routed_model.tokenizer, "red")).items():
        bank, layer = banks[path], variants.layers[path]
        expected = spectr_scores(bank.project(x), bank.singular_values, config)[0, :, 0]
        scores = variants.scores(path, x[0])[SPECTR][:, layer.columns]
        torch.testing.assert_close(scores[:, :3], expected)
        torch.testing.assert_close(scores[:, 3:6], expected)  # cut to 8, and the rank is 4
        torch.testing.assert_close(scores[:, 6:9], expected)  # to 4
        cut_to_2 = cut(routed_model.library, 2)
        direct = [(x[0] @ expert[path].A.T).norm(dim=-1) for expert in cut_to_2]
        torch.testing.assert_close(scores[:, 9:12], torch.stack(direct, dim=-1))


def test_accuracy_is_that_of_the_routers(routed_model: SpectrModel) -> None:
    """Against the routers' own code and `routing_accuracy`, on the same activations."""
    result = run(routed_model)["number"]["3"]["mean"]
    keys = ("arrow", "spectr", "norm", "spectr-calibrated", "spectr-context")
    statistics = own_calibration(routed_model)
    for method, key in zip(METHODS, keys, strict=True):
        rows = []
        for expert, (name, texts) in enumerate(texts_for(routed_model).items()):
            readings = [read_by(routed_model, key, name, text, statistics) for text in texts]
            rows.append(routing_accuracy(readings, expert))
        assert result[method] == {
            "decisions": pytest.approx(sum(row["answer"] for row in rows) / 3, abs=1e-3),
            "majority": pytest.approx(sum(row["majority"] for row in rows) / 3, abs=1e-3),
        }


def read_by(
    engine: SpectrModel, key: str, name: str, text: Text, statistics: dict[str, Tensor]
) -> Any:
    """What a router chooses where the activations are those of expert `name`."""
    config = replace(parse_router(key, engine.library.names, top_k=1), confidence=None)
    score, pool, banks = ROUTERS[key].score, None, banks_by_path(engine.library)
    assert score is not None
    ids = [*text.prompt_ids, *text.answer_ids[:-1]]
    num_opening = shared_length(engine.template_opening, ids)
    places = torch.arange(len(ids))

    def scores_of(router: str, token_ids: Sequence[int]) -> Iterator[Tensor]:
        for path, x in inputs(engine, router, token_ids).items():
            bank = banks[path]
            scores = score(bank.project(x), bank.singular_values, config)
            if config.calibrated:
                mean, std = statistics[path]
                scores = (scores - mean) / std
            if pool is not None:
                scores = pool.add(bank, scores)
            yield scores[:, :, 0]

    if config.reads_first:
        assert config.decay is not None
        is_prompt = places[: len(text.prompt_ids)]
        pool = EvidencePool(config.decay, 3, (is_prompt >= num_opening)[None])
        list(scores_of("base", text.prompt_ids))
        pool.read_again((places >= len(text.prompt_ids))[None])
    choices = [select(scores, config)[0][0] for scores in scores_of(f"single:{name}", ids)]
    return SimpleNamespace(  # what `routing_accuracy` needs of a Reading
        choices=torch.stack(choices, dim=1)[:, None].to(torch.int16).numpy(),  # (T, 1, banks, 1)
        num_prompt=len(text.prompt_ids),
        num_opening=num_opening,
    )


def own_calibration(engine: SpectrModel) -> dict[str, Tensor]:
    """Mean and standard deviation of SpectR's scores on the generic prompts, by layer."""
    values: dict[str, list[Tensor]] = {}
    banks = banks_by_path(engine.library)
    for prompt in PROMPTS:
        ids = engine.encode(prompt)
        for path, x in inputs(engine, "base", ids).items():
            bank = banks[path]
            z = bank.project(x[:, len(engine.template_opening) :])
            scores = spectr_scores(z, bank.singular_values, RouterConfig(name="spectr"))
            values.setdefault(path, []).append(scores[0, :, 0])
    return {
        path: torch.stack([torch.cat(v).mean(0), torch.cat(v).std(0, correction=0)])
        for path, v in values.items()
    }


def test_cutting_to_the_full_rank_changes_nothing(routed_model: SpectrModel) -> None:
    result = run(routed_model)
    assert result["rank"]["8"] == result["rank"]["4"] == result["number"]["3"]["mean"]
    assert result["rank"]["1"]["spectr"] == result["rank"]["1"]["arrow"]


def test_twins_without_noise_cannot_be_told_apart(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SIGMAS", (0.0, 1.0))
    result = run(routed_model)
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


def test_more_distractors_never_help_raw_scores(routed_model: SpectrModel) -> None:
    number = run(routed_model)["number"]
    for method in ("arrow", "spectr", "norm"):
        for seed in ("0", "1", "2"):
            shares = [number[n]["seeds"][seed][method]["decisions"] for n in ("5", "9", "30")]
            shares = [number["3"]["mean"][method]["decisions"], *shares]
            assert shares == sorted(shares, reverse=True)


def test_distractors_belong_to_another_layer_of_the_projection(routed_model: SpectrModel) -> None:
    variants = build(routed_model, num_distractors=50)
    for path, layer in variants.layers.items():
        drawn = layer.columns[variants.num_blocks * 3 :]
        assert len(drawn) == 100
        assert not ((drawn >= layer.own.start) & (drawn < layer.own.stop)).any()
        assert drawn.max() < len(layer.pairs.expert_ids) == 6
        assert layer.pairs.A.shape[1] == banks_by_path(routed_model.library)[path].A.shape[1]


def test_results_are_json_and_depend_on_the_seed_alone(routed_model: SpectrModel) -> None:
    once, again = run(routed_model), run(routed_model)
    assert json.loads(json.dumps(once, allow_nan=False)) == once == again
    other = run(routed_model, seeds=(5,))
    assert list(other["number"]["30"]["seeds"]) == ["5"]
    assert other["undertrained"] != once["undertrained"]
    assert other["rank"] == once["rank"]


def test_calibrated_scores_of_generic_text_are_standard(routed_model: SpectrModel) -> None:
    variants = build(routed_model)
    with tqdm(disable=True) as bar:
        read_generic(routed_model, variants, PROMPTS, bar)
    tokens: dict[str, list[Tensor]] = {}
    for prompt in PROMPTS:
        ids = routed_model.encode(prompt)
        for path, x in inputs(routed_model, "base", ids).items():
            tokens.setdefault(path, []).append(x[0, len(routed_model.template_opening) :])
    for path, parts in tokens.items():
        scores = variants.standardise(path, variants.scores(path, torch.cat(parts)))
        torch.testing.assert_close(scores.mean(0), torch.zeros(scores.shape[1]), atol=1e-4, rtol=0)
        torch.testing.assert_close(
            scores.std(0, correction=0), torch.ones(scores.shape[1]), atol=1e-3, rtol=0
        )


def test_generic_margins(routed_model: SpectrModel) -> None:
    variants = build(routed_model)
    statistics = GenericText(variants)
    path, x = next(iter(inputs(routed_model, "base", [5, 6, 7]).items()))
    statistics.add(path, x[0])
    statistics.finish()
    scores = variants.scores(path, x[0])[SPECTR][:, variants.layers[path].columns]
    own, others = scores[:, 0], scores[:, 1:3].amax(-1)
    expected = ((own - others) / (own + others)).mean()
    assert float(variants.margins[0, 0]) == pytest.approx(float(expected), abs=1e-5)
    noisy = scores[:, 3 * variants.num_blocks - 1]  # the last sigma's third expert
    others = scores[:, :2].amax(-1)
    expected = ((noisy - others) / (noisy + others)).mean()
    assert float(variants.margins[-1, 2]) == pytest.approx(float(expected), abs=1e-5)


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
    result = run(engine)
    assert json.dumps(result, allow_nan=False)
    assert all(0 <= share["decisions"] <= 1 for share in result["rank"]["2"].values())
    variants = build(engine)
    first = variants.layers["model.layers.0.self_attn.q_proj"]
    assert first.candidates[:9].tolist() == [0, 3, 6, 9, 12, 15, 18, 21, 24]  # red alone
    assert len(first.pairs.expert_ids) == 3  # red twice, blue once


def test_diagnostics(routed_model: SpectrModel) -> None:
    result = run(routed_model)["diagnostics"]
    assert len(result["variants"]) == 3 * (len(RANKS) + len(SIGMAS))
    row = next(r for r in result["variants"] if r["variant"] == "rank 1")
    assert row["effective_rank"] == pytest.approx(1)
    assert row["leading_share"] == 1
    assert row["accuracy"].keys() == set(METHODS)
    assert all(
        rho is None or -1 <= rho <= 1
        for by_method in result["spearman"].values()
        for rho in by_method.values()
    )


def test_it_needs_two_experts_and_texts(routed_model: SpectrModel) -> None:
    with pytest.raises(ValueError, match="needs two experts and a text"):
        stress(routed_model, {"red": []}, PROMPTS)
    with pytest.raises(ValueError, match="unknown expert"):
        stress(routed_model, texts_for(routed_model, ("teal",)), PROMPTS)
