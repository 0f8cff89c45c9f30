"""Variants of a library: their scores, their distractors, their statistics over generic text."""

import pytest
import torch
from torch import Tensor

from spectr_demo.base.prompts import encode
from spectr_demo.config import RouterConfig
from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation.robustness.decisions import hear
from spectr_demo.evaluation.robustness.variants import SPECTR, cut
from spectr_demo.routing.spectr import spectr_scores
from tests.conftest import banks_by_path
from tests.evaluation.robustness.samples import PROMPTS, build, inputs


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


def test_distractors_belong_to_another_layer_of_the_projection(routed_model: SpectrModel) -> None:
    variants = build(routed_model, num_distractors=50)
    for path, layer in variants.layers.items():
        drawn = layer.columns[variants.num_blocks * 3 :]
        assert len(drawn) == 100
        assert not ((drawn >= layer.own.start) & (drawn < layer.own.stop)).any()
        assert drawn.max() < len(layer.pairs.expert_ids) == 6
        assert layer.pairs.A.shape[1] == banks_by_path(routed_model.library)[path].A.shape[1]


def test_calibrated_scores_of_generic_text_are_standard(routed_model: SpectrModel) -> None:
    variants = build(routed_model)
    hear(routed_model, variants, PROMPTS, [])
    tokens: dict[str, list[Tensor]] = {}
    for prompt in PROMPTS:
        ids = routed_model.encode(prompt)
        for path, x in inputs(routed_model, "base", ids).items():
            tokens.setdefault(path, []).append(x[0, len(routed_model.template.opening) :])
    for path, parts in tokens.items():
        scores = variants.standardise(path, variants.scores(path, torch.cat(parts)))
        torch.testing.assert_close(scores.mean(0), torch.zeros(scores.shape[1]), atol=1e-4, rtol=0)
        torch.testing.assert_close(
            scores.std(0, correction=0), torch.ones(scores.shape[1]), atol=1e-3, rtol=0
        )


def test_generic_margins(routed_model: SpectrModel) -> None:
    variants = build(routed_model)
    path, x = next(iter(inputs(routed_model, "base", [5, 6, 7]).items()))
    variants.measure(path, x[0])
    scores = variants.scores(path, x[0])[SPECTR][:, variants.layers[path].columns]
    own, others = scores[:, 0], scores[:, 1:3].amax(-1)
    expected = ((own - others) / (own + others)).mean()
    assert float(variants.margins[0, 0]) == pytest.approx(float(expected), abs=1e-5)
    noisy = scores[:, 3 * variants.num_blocks - 1]  # the last sigma's third expert
    others = scores[:, :2].amax(-1)
    expected = ((noisy - others) / (noisy + others)).mean()
    assert float(variants.margins[-1, 2]) == pytest.approx(float(expected), abs=1e-5)
