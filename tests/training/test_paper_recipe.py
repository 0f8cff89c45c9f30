"""The SpectR paper's recipe, from the command line to the card."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from spectr_demo.__main__ import main
from spectr_demo.base.loading import EMBEDDED_ID
from spectr_demo.training.expert import _options
from spectr_demo.training.recipe import Recipe
from spectr_demo.training.trainer import AnswerTrainer
from tests.conftest import tiny_llama

pytestmark = pytest.mark.usefixtures("paper_data")


def test_a_command_gives_its_recipe_again() -> None:
    def options(**settings: Any) -> str:
        return " ".join(_options(EMBEDDED_ID, "sql", Recipe(**settings).for_expert("sql")))

    paper = {
        "epochs": 1,
        "batch_size": 8,
        "learning_rate": 1e-4,
        "own_share": 0.0,
        "foreign_share": 0.0,
        "opening_off": 0.0,
    }
    assert options() == ""
    assert options(steps=20, seed=3) == "--steps 20 --seed 3"
    assert options(**paper) == "--recipe paper"
    assert options(**{**paper, "batch_size": 2}) == "--recipe paper --batch-size 2"
    # An example that fits no message is a matter of the data.
    assert options(own_share=0.0, foreign_share=0.0) == ""
    assert _options("you/base", "sql", Recipe().for_expert("sql")) == ["--base you/base"]


@pytest.mark.parametrize(
    ("more", "steps", "length"),
    [
        (["--batch-size", "4"], 2, "epochs: 1, batches of 4 rows"),
        (["--steps", "1"], 1, "1 steps of 8 rows"),
    ],
)
def test_train_with_the_papers_recipe(
    more: list[str],
    steps: int,
    length: str,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("spectr_demo.training.cost.PROBE_SECONDS", 0.01)
    base = tmp_path / "base"
    tiny_llama(len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    taken = []
    fit = AnswerTrainer.training_step

    def step(*args: Any, **kwargs: Any) -> Any:
        taken.append(1)
        return fit(*args, **kwargs)

    monkeypatch.setattr(AnswerTrainer, "training_step", step)
    command = ["train", "mrpc", "--base", str(base), "--recipe", "paper", *more]
    command += ["--num-eval", "2", "--output", str(tmp_path), "--json"]
    assert main(command) == 0
    assert len(taken) == steps
    record = json.loads(capsys.readouterr().out)["scores"]["mrpc"]
    assert record["recipe"]["learning_rate"] == 1e-4
    assert record["command"] == (
        f"python -m spectr_demo train mrpc --base {base} --recipe paper {' '.join(more)}"
    )
    card = (tmp_path / "mrpc" / "README.md").read_text(encoding="utf-8")
    assert length in card
    assert "A batch: " + length.rpartition("of ")[2].split()[0] + " single requests." in card
    assert "# MRPC: a LoRA expert for" in card
    assert list(record["scores"]["expert"]) == ["all", "seen wording"]
