"""The card of an expert from given facts, whoever trained it."""

import json
from pathlib import Path
from typing import Any

import pytest

from spectr_demo.config import shipped_experts
from spectr_demo.evaluation.scores import Score
from spectr_demo.evaluation.tasks import TASKS, Split
from spectr_demo.training.card import expert_record, model_card, write_card
from spectr_demo.training.recipe import PAPER_RECIPE, Recipe, seed_of

SQL = TASKS["sql"]
SPLIT = SQL.build(0)
FEW = Split(train=SPLIT.train[:20], heldout=SPLIT.heldout[:8])


def score(mean: float) -> Score:
    return Score(mean=mean, low=mean - 0.1, high=mean + 0.1, num=8)


def written(folder: Path, recipe: Recipe | None = None, **facts: Any) -> tuple[str, dict[str, Any]]:
    recipe = (recipe or Recipe(batch_size=32, steps=700)).for_expert("sql")
    facts = {"num_foreign": 328, "device": "a GPU", "versions": {"torch": "2.11"}, **facts}
    record = expert_record(
        SQL, FEW, recipe, base="some/base", fingerprint="sha256:12", command="train.py", **facts
    )
    write_card(folder, SQL, record)
    assert json.loads((folder / "scores.json").read_text(encoding="utf-8")) == record
    return (folder / "README.md").read_text(encoding="utf-8"), record


def test_the_card_says_how_it_was_trained(tmp_path: Path) -> None:
    card, record = written(tmp_path, train_seconds=182.4, note="All ten were trained in one run.")
    for fact in (
        "A batch: 16 single requests, 6 messages of two or three own requests, "
        "10 messages with foreign lines.",
        "Formats of messages: lines, numbered, then, sentence.",
        "328 prompts that the base wrote itself",
        "are missing (20%)",
        "In 50% of the rows the base alone reads the chat template's opening.",
        "learning rate 0.0015, 6% warm-up",
        "700 steps of 32 rows; seed ",
        f"seed {record['recipe']['seed']}.",
        "some/base, sha256:12",
        "Trained on: a GPU, 3 minutes.",
        "All ten were trained in one run.",
        "Versions: torch 2.11.",
        f"Licence of the data: {SQL.licence}.",
        SQL.source,
        "20 training and 8 held-out examples",
        "    train.py\n",
    ):
        assert fact in card
    assert "{" not in card.replace("{text}", "")


def test_scores_that_are_not_known_are_left_out(tmp_path: Path) -> None:
    card, record = written(tmp_path)
    assert record["scores"] == {}
    assert "Scores" not in card


def test_groups_that_only_the_expert_has_show_a_dash(tmp_path: Path) -> None:
    scores = {
        "base": {"all": score(0.1)},
        "expert": {"all": score(0.9), "own part of a message": score(0.8)},
    }
    card, _ = written(tmp_path, scores=scores)
    assert "| | all | own part of a message |" in card
    assert "| base | 0.100 (0.000-0.200) | - |" in card
    assert "| expert | 0.900 (0.800-1.000) | 0.800 (0.700-0.900) |" in card
    assert "does not beat" not in card


def test_a_recipe_of_single_requests_speaks_of_no_messages(tmp_path: Path) -> None:
    card, _ = written(tmp_path, PAPER_RECIPE, num_foreign=0)
    assert "A batch: 8 single requests. The loss is on the own answers only.\n" in card
    assert "oreign" not in card
    assert "opening" not in card
    assert "epochs: 1, batches of 8 rows" in card


@pytest.mark.parametrize("folder", map(Path, shipped_experts()), ids=lambda folder: folder.name)
def test_a_shipped_expert_has_the_card_and_the_shape_of_its_record(folder: Path) -> None:
    record = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card == model_card(TASKS[folder.name], record)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (
        record["recipe"]["rank"],
        record["recipe"]["alpha"],
    )
    assert record["recipe"]["seed"] == seed_of(folder.name)
    nums = {scores["all"]["num"] for scores in record["scores"].values()}
    assert len(nums) == 1, "all answer the same examples"
