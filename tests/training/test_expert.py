"""Training an expert of a tiny random model: what is saved, scored, continued and refused."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from spectr_demo.base.loading import EMBEDDED_ID
from spectr_demo.config import ASSETS
from spectr_demo.evaluation.tasks import SPLIT_SEED, TASKS, Split, Task
from spectr_demo.evaluation.tasks.baselines import copy_input
from spectr_demo.training import cost as training_cost
from spectr_demo.training import expert as training
from spectr_demo.training.expert import expert_folder, is_finished, train
from spectr_demo.training.recipe import RECIPES, Recipe, seed_of
from tests.conftest import tiny_llama
from tests.training.test_dataset import FOREIGN


@pytest.fixture(scope="module")
def few_questions() -> Task:
    """The sql task with 20 training and 8 held-out examples, and two baselines.

    One baseline is right about the first example, the other is never right.
    """
    split = TASKS["sql"].build(0)
    few = Split(train=split.train[:20], heldout=split.heldout[:8])
    return replace(
        TASKS["sql"],
        build=lambda seed: few,
        baselines={
            "first answer": lambda train, heldout: [heldout[0].answer] * len(heldout),
            "copy of the input": copy_input,
        },
    )


@pytest.fixture(autouse=True)
def tiny_base(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    few_questions: Task,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Training uses a fresh tiny model, few examples and an empty cache folder."""

    def load_base(base: str | None, dtype: torch.dtype | None) -> SimpleNamespace:
        assert dtype == (None if torch.cuda.is_available() else torch.float32)
        model = tiny_llama(len(tokenizer))
        model.name_or_path = model.config._name_or_path = "tiny/llama"
        return SimpleNamespace(model=model, tokenizer=tokenizer, fingerprint="tiny")

    monkeypatch.setattr(training, "load_base", load_base)
    monkeypatch.setattr(training, "foreign_requests", lambda base: FOREIGN)
    monkeypatch.setattr(training_cost, "PROBE_SECONDS", 0.01)
    monkeypatch.delenv("SPECTR_BASE_MODEL", raising=False)
    monkeypatch.setitem(TASKS, "sql", few_questions)
    monkeypatch.setenv("SPECTR_CACHE", str(tmp_path / "cache"))


def test_another_seed_has_the_same_split(
    tmp_path: Path, few_questions: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an expert of another seed would be tested on what it was trained on."""
    seeds = []

    def build(seed: int) -> Split:
        seeds.append(seed)
        return few_questions.build(seed)

    monkeypatch.setitem(TASKS, "sql", replace(few_questions, build=build))
    recipe = Recipe(steps=1, batch_size=2, seed=5)
    train("sql", output_dir=tmp_path / "sql", recipe=recipe, num_eval=2)
    assert seeds == [SPLIT_SEED]


def test_two_steps_make_an_ordinary_peft_folder(
    tmp_path: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = torch.tensor([tokenizer("how many flights?")["input_ids"]])
    before = llama(ids).logits
    folder = train(
        "sql", output_dir=tmp_path / "sql", recipe=Recipe(steps=2, batch_size=2), num_eval=4
    )

    assert {f.name for f in folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "scores.json",
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["inference_mode"] is True
    assert config["base_model_name_or_path"] == "tiny/llama"
    weights = load_file(folder / "adapter_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float16}
    assert any(w.abs().max() > 0 for key, w in weights.items() if "lora_B" in key)

    loaded = PeftModel.from_pretrained(tiny_llama(len(tokenizer)), folder)
    assert not torch.allclose(loaded(ids).logits, before)
    with loaded.disable_adapter():
        torch.testing.assert_close(loaded(ids).logits, before)

    scores = json.loads((folder / "scores.json").read_text())
    assert scores["recipe"]["steps"] == 2
    assert scores["recipe"]["seed"] == seed_of("sql")
    assert (scores["fingerprint"], scores["num_foreign"]) == ("tiny", 1)
    assert scores["scores"]["expert"]["all"]["num"] == 4
    assert (
        scores["command"]
        == "python -m spectr_demo train sql --base tiny/llama --steps 2 --batch-size 2"
    )
    card = (folder / "README.md").read_text()
    assert "base_model: tiny/llama" in card
    assert scores["example"]["prompt"] in card
    assert all(wording in card for wording in TASKS["sql"].wordings)


def test_the_baselines_of_the_task_are_scored_and_said_to_be_better(tmp_path: Path) -> None:
    folder = train("sql", output_dir=tmp_path, recipe=Recipe(steps=1, batch_size=2), num_eval=4)
    scores = json.loads((folder / "scores.json").read_text())["scores"]
    assert list(scores) == ["base", "first answer", "copy of the input", "expert"]
    assert scores["first answer"]["all"]["mean"] >= 0.25
    assert scores["copy of the input"]["all"]["mean"] == 0
    assert [scores["first answer"][group]["num"] for group in scores["base"]] == [4, 2, 2]
    # After one step the expert answers nothing right.
    card = (folder / "README.md").read_text()
    assert f"| first answer | {scores['first answer']['all']['mean']:.3f} (" in card
    assert "does not beat: base, first answer, copy of the input." in card


def test_a_hub_base_is_estimated_before_it_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(base: str | None, dtype: torch.dtype | None) -> SimpleNamespace:
        raise OSError(f"{base} cannot be fetched")

    monkeypatch.setattr(training, "read_base_config", lambda base: tiny_llama(300).config)
    monkeypatch.setattr(training, "load_base", unreachable)
    with pytest.raises(OSError, match="big/llama cannot be fetched"):
        train("sql", base="big/llama", output_dir=tmp_path)
    captured = capsys.readouterr()
    assert captured.err.startswith("Training needs: 0M parameters; about ")
    assert captured.out == ""


def test_the_default_base_is_estimated_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("sql", output_dir=tmp_path, recipe=Recipe(steps=1, batch_size=2), num_eval=2)
    assert capsys.readouterr().err.count("Training needs: ") == 1


@pytest.mark.parametrize(
    ("base", "folder"),
    [
        (None, ASSETS / "experts" / "sql"),
        (EMBEDDED_ID, ASSETS / "experts" / "sql"),
        ("meta-llama/Llama-3.2-1B", Path("experts/Llama-3.2-1B/sql")),
        ("/models/llama/", Path("experts/llama/sql")),
    ],
)
def test_only_experts_of_the_default_base_go_to_the_shipped_ones(
    base: str | None, folder: Path
) -> None:
    assert expert_folder("sql", base) == folder


def test_the_base_of_the_environment_decides_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTR_BASE_MODEL", "meta-llama/Llama-3.2-1B")
    assert expert_folder("sql") == Path("experts/Llama-3.2-1B/sql")


def test_an_interrupted_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(steps=2, batch_size=2)

    def run() -> Path:
        return train("sql", output_dir=tmp_path / "sql", recipe=recipe, num_eval=2)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "_evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    checkpoints = tmp_path / "cache" / "training"
    (checkpoint,) = checkpoints.glob("sql-*/checkpoint-2")
    assert not is_finished(tmp_path / "sql")
    learned = load_file(checkpoint / "adapter_model.safetensors")

    saved = load_file(run() / "adapter_model.safetensors")
    assert saved.keys() == learned.keys()
    for key, weight in saved.items():
        torch.testing.assert_close(weight, learned[key].half())
    assert json.loads((tmp_path / "sql" / "scores.json").read_text())["train_seconds"] is None
    assert is_finished(tmp_path / "sql")
    assert not any(checkpoints.iterdir())


def test_a_finished_expert_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(FileExistsError, match=r"holds a finished expert.*overwrite"):
        train("sql", output_dir=tmp_path)


def test_an_unwritable_output_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written"):
        train("sql", output_dir=tmp_path / "file" / "sql")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "cron_descriptor" else find_spec(name),
    )
    with pytest.raises(ModuleNotFoundError, match=r"cron_descriptor.*requirements-train\.txt"):
        train("cron", output_dir=tmp_path)


def test_unknown_task(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="smart_home"):
        train("smarthome", output_dir=tmp_path)


def test_a_users_file_becomes_an_expert(tmp_path: Path) -> None:
    file = tmp_path / "my sums.jsonl"
    rows = [{"prompt": f"{i} + {i}", "answer": str(2 * i)} for i in range(20)]
    file.write_text("\n".join(map(json.dumps, rows)))
    recipe = Recipe(steps=1, batch_size=2)
    folder = train(str(file), output_dir=tmp_path / "expert", recipe=recipe, num_eval=2)
    record = json.loads((folder / "scores.json").read_text())
    assert (record["task"], record["num_train"], record["num_heldout"]) == ("my sums", 18, 2)
    assert f"train '{file}' --base tiny/llama --steps 1" in record["command"]
    assert list(record["scores"]["expert"]) == ["all", "seen wording"]
    assert "Prompts and answers of my sums.jsonl" in (folder / "README.md").read_text()


def test_another_file_of_the_same_name_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_evaluate", interrupted)
    for step in (1, 2):
        rows = [{"prompt": f"{i} + {step}", "answer": str(i + step)} for i in range(20)]
        file = tmp_path / "sums.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(KeyboardInterrupt):
            train(str(file), output_dir=tmp_path / "sums", recipe=Recipe(steps=1, batch_size=2))
    assert len(list((tmp_path / "cache" / "training").glob("sums-*"))) == 2


def test_an_expert_of_a_file_does_not_go_to_the_shipped_ones() -> None:
    folder = Path("experts/SmolLM2-135M-Instruct/sums")
    assert expert_folder("data/sums.jsonl") == folder
    assert expert_folder("data/sums.CSV", EMBEDDED_ID) == folder
    assert expert_folder("sums.jsonl", "/models/llama") == Path("experts/llama/sums")


def test_examples_that_fit_no_message_are_trained_alone(tmp_path: Path) -> None:
    file = tmp_path / "poems.jsonl"
    rows = [{"prompt": f"Poem {i}", "answer": f"{i}\nends"} for i in range(20)]
    file.write_text("\n".join(map(json.dumps, rows)))
    recipe = Recipe(steps=1, batch_size=4)
    folder = train(str(file), output_dir=tmp_path / "poems", recipe=recipe, num_eval=1)
    record = json.loads((folder / "scores.json").read_text())
    assert record["mix"] == {"single": 4, "own": 0, "foreign": 0}
    assert record["command"].endswith("--base tiny/llama --steps 1 --batch-size 4")


def test_a_base_that_answers_nothing_gives_no_foreign_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "foreign_requests", lambda base: [])
    folder = train("sql", output_dir=tmp_path, recipe=Recipe(steps=1, batch_size=8), num_eval=1)
    record = json.loads((folder / "scores.json").read_text())
    assert record["mix"] == {"single": 4, "own": 4, "foreign": 0}


def test_foreign_lines_are_written_by_the_base_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the LoRA is attached, and only if the recipe has them."""
    asked = []

    def written(base: SimpleNamespace) -> object:
        asked.append(any("lora" in name for name, _ in base.model.named_modules()))
        return FOREIGN

    monkeypatch.setattr(training, "foreign_requests", written)
    for recipe in (Recipe(steps=1, batch_size=2), RECIPES["paper"]):
        recipe = replace(recipe, steps=1, epochs=None)
        train("sql", output_dir=tmp_path, recipe=recipe, num_eval=1, overwrite=True)
    assert asked == [False]


def test_experts_begin_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a seed from its name; a seed that is given counts more."""
    monkeypatch.setattr(training, "fit", lambda *given: given[-1].mkdir(parents=True))
    found = {}
    for name, seed in (("one", None), ("two", None), ("three", 7), ("four", 7)):
        file = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": f"{i} + {i}", "answer": str(2 * i)} for i in range(20)]
        file.write_text("\n".join(map(json.dumps, rows)))
        recipe = Recipe(steps=1, batch_size=2, seed=seed)
        folder = train(str(file), output_dir=tmp_path / name, recipe=recipe, num_eval=1)
        weights = load_file(folder / "adapter_model.safetensors")
        found[name] = weights[next(key for key in weights if "lora_A" in key)]
    assert not torch.allclose(found["one"], found["two"])
    assert torch.equal(found["three"], found["four"])
