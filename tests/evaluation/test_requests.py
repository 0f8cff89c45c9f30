"""Whom single requests are for: the router's own choice, votes of layers, and the raw metric."""

import pytest
import torch

from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation.listening import late_means, listen
from spectr_demo.evaluation.requests import (
    METRICS,
    evidence,
    metrics_of,
    raw_detector,
    whom,
    whom_figures,
)
from spectr_demo.routing.detection import Evidence, standing
from spectr_demo.routing.routers import parse_router
from tests.conftest import IN_CONTEXT

PROMPTS = ["red ships", "What is green, and what is a longer prompt?", "blue"]


def test_evidence_is_that_of_the_engines_reader(routed_model: SpectrModel) -> None:
    router = parse_router(IN_CONTEXT, routed_model.library.names)
    ids = [routed_model.encode(prompt) for prompt in PROMPTS]
    measured = metrics_of(routed_model)[METRICS[0]]
    found = evidence(routed_model, ids, measured.detectors)
    for row, one in enumerate(ids):
        lane = routed_model.reader.whole(router, one)
        own = standing(found.certainty[row], measured.ordinary)
        torch.testing.assert_close(own, lane.standing, atol=1e-3, rtol=0)
        for expert in range(3):
            is_named = whom(found, measured.ordinary, expert)["one"][row]
            assert is_named == float(lane.expert == expert)
        for bank, layers in lane.by_layer.items():
            torch.testing.assert_close(found.by_layer[bank][row], layers, atol=1e-3, rtol=0)


def test_the_raw_metric_is_spectrs_score_standardised(routed_model: SpectrModel) -> None:
    bank = routed_model.library.banks[0]
    x = torch.randn(50, bank.A.shape[1], generator=torch.Generator().manual_seed(0))
    lengths = bank.project(x).float().norm(dim=-1)
    expected = (lengths - lengths.mean(0)) / lengths.std(0, correction=0)
    torch.testing.assert_close(raw_detector(bank, x).scores(x), expected, atol=1e-3, rtol=0)


def test_the_metrics_differ(routed_model: SpectrModel) -> None:
    ids = [routed_model.encode(prompt) for prompt in PROMPTS]
    one, other = (
        evidence(routed_model, ids, measured.detectors).certainty
        for measured in metrics_of(routed_model).values()
    )
    assert not torch.allclose(one, other, atol=1e-2)


def test_prompts_are_heard_without_padding_and_late_tokens_count_most(
    routed_model: SpectrModel,
) -> None:
    ids = [routed_model.encode(prompt) for prompt in PROMPTS]
    bank, heard = routed_model.library.banks[0], []
    for some in (ids, ids[:1]):
        requests = routed_model.reader.requests(some)
        inputs: list[torch.Tensor] = []
        listen(
            routed_model,
            requests,
            lambda of, x, kept=inputs: kept.append(x) if of is bank else None,
        )
        (x,) = inputs
        num = sum(len(one) - len(routed_model.template.opening) for one in some)
        assert len(x) == num
        heard.append(late_means(requests, x)[0])
    torch.testing.assert_close(*heard, atol=1e-4, rtol=1e-4)
    requests = routed_model.reader.requests(ids)
    assert late_means(requests, torch.ones(len(requests.owners))).tolist() == pytest.approx([1] * 3)
    last = requests.owners == 2
    assert (requests.late[last].diff() > 0).all()


def test_votes_and_layers_by_hand(routed_model: SpectrModel) -> None:
    banks = routed_model.library.banks[:2]
    num_layers = sum(len(bank.paths) for bank in banks)
    found = Evidence(torch.tensor([0]), torch.ones(1), torch.ones(1), torch.full((3,), num_layers))
    for bank, favourite in zip(banks, (0, 1), strict=True):
        scores = torch.zeros(1, len(bank.paths), 3)
        scores[..., favourite] = 1
        found.add(bank, scores)
    num_first = len(banks[0].paths)
    assert num_first > num_layers / 2, "three projections against one"
    first, second, third = (whom(found, torch.zeros(2, 3), expert) for expert in range(3))
    assert first["layers"] == [pytest.approx(num_first / num_layers)]
    assert first["one"] == first["vote"] == [1]
    assert second["layers"] == [pytest.approx(1 - num_first / num_layers)]
    assert second["one"] == second["vote"] == third["layers"] == [0]


def test_figures_are_means_over_domains_by_wording() -> None:
    def rows(*values: float) -> dict[str, dict[str, list[float]]]:
        return {metric: {"one": list(values)} for metric in METRICS}

    figures = whom_figures(
        {"sql": rows(1, 0, 0), "cron": rows(1)}, {"sql": [False, True, True], "cron": [True]}
    )
    assert figures[METRICS[0]] == {
        "all": {"one": pytest.approx((1 / 3 + 1) / 2, abs=1e-4)},
        "seen wording": {"one": 1},
        "held-out wording": {"one": 0.5},
    }
