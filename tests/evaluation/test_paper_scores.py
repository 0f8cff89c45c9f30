"""Scores on the paper's tasks, by router and task."""

import json
from pathlib import Path

import pytest

from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation.paper_scores import paper_scores
from tests.conftest import BuildModel, SaveExpert


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MRPC: eight training rows and four held-out ones."""
    folder = tmp_path / "data" / "mrpc"
    folder.mkdir(parents=True)
    rows = [
        {"sentence1": f"It is {i}.", "sentence2": f"So it is {i % 3}.", "label": i % 2, "idx": i}
        for i in range(12)
    ]
    for split, part in {"train": rows[:8], "validation": rows[8:]}.items():
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    monkeypatch.setenv("SPECTR_PAPER_DATA", str(folder.parent))


def test_scores_are_by_router_and_task(save_expert: SaveExpert, build_model: BuildModel) -> None:
    engine = build_model([save_expert("mrpc", seed=5), save_expert("other", seed=6)])
    routers = ["base", "single:{own}", "spectr-context"]
    scores = paper_scores(engine, routers, num_examples=3)
    assert list(scores) == routers
    assert {name: row["mrpc"].num for name, row in scores.items()} == dict.fromkeys(routers, 3)


def test_scores_need_an_expert_of_a_task(routed_model: SpectrModel) -> None:
    with pytest.raises(ValueError, match="the experts are red, green, blue; at least one"):
        paper_scores(routed_model, ["base"])
