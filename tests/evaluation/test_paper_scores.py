"""Scores on the paper's tasks, by router and task."""

import pytest

from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation.paper_scores import paper_scores
from tests.conftest import BuildModel, SaveExpert

pytestmark = pytest.mark.usefixtures("paper_data")


def test_scores_are_by_router_and_task(save_expert: SaveExpert, build_model: BuildModel) -> None:
    engine = build_model([save_expert("mrpc", seed=5), save_expert("other", seed=6)])
    routers = ["base", "single:{own}", "spectr-context"]
    scores = paper_scores(engine, routers, num_examples=3)
    assert list(scores) == routers
    assert {name: row["mrpc"].num for name, row in scores.items()} == dict.fromkeys(routers, 3)


def test_scores_need_an_expert_of_a_task(routed_model: SpectrModel) -> None:
    with pytest.raises(ValueError, match="the experts are red, green, blue; at least one"):
        paper_scores(routed_model, ["base"])
