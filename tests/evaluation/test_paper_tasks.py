"""The nine formats on rows of the datasets' own columns; training, scores and errors on them."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from spectr_demo.__main__ import main
from spectr_demo.base.loading import EMBEDDED_ID
from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation.paper_tasks import PAPER_TASKS, paper_scores, paper_task
from spectr_demo.evaluation.tasks import TASKS, get_task
from spectr_demo.training import recipe as training
from spectr_demo.training.recipe import PAPER_RECIPE, Recipe
from tests.conftest import BuildModel, SaveExpert, tiny_llama

# A row of each dataset, made for the tests, with all of its columns; what it asks and its answer.
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "hellaswag": (
        {
            "ind": 4,
            "activity_label": "Cooking",
            "ctx_a": "A man cracks an egg.",
            "ctx_b": "he",
            "ctx": "A man cracks an egg. he",
            "endings": ["sings.", "swims.", "fries it.", "leaves."],
            "source_id": "activitynet~v_1",
            "split": "train",
            "split_type": "indomain",
            "label": "2",
        },
        "How does this continue?\nA man cracks an egg. he\n"
        "A. sings.\nB. swims.\nC. fries it.\nD. leaves.\nAnswer:",
        "C",
    ),
    "qqp": (
        {"question1": "How old?", "question2": "What age?", "label": 1, "idx": 0},
        "Do these two questions ask the same?\nQuestion 1: How old?\nQuestion 2: What age?\n"
        "A. No\nB. Yes\nAnswer:",
        "B",
    ),
    "mrpc": (
        {"sentence1": "He left.", "sentence2": "She stayed.", "label": 0, "idx": 0},
        "Do these two sentences mean the same?\nSentence 1: He left.\nSentence 2: She stayed.\n"
        "A. No\nB. Yes\nAnswer:",
        "A",
    ),
    "cola": (
        {"sentence": "They drank the pub.", "label": 0, "idx": 0},
        "Is this sentence acceptable English?\nSentence: They drank the pub.\n"
        "A. No\nB. Yes\nAnswer:",
        "A",
    ),
    "sst2": (
        {"sentence": "a joy ", "label": 1, "idx": 0},
        "What is the sentiment of this sentence?\nSentence: a joy \n"
        "A. Negative\nB. Positive\nAnswer:",
        "B",
    ),
    "mnli": (
        {"premise": "It rains.", "hypothesis": "It is dry.", "label": 2, "idx": 0},
        "How does the hypothesis relate to the premise?\nPremise: It rains.\n"
        "Hypothesis: It is dry.\nA. Entailment\nB. Neutral\nC. Contradiction\nAnswer:",
        "C",
    ),
    "qnli": (
        {"question": "Who won?", "sentence": "Ann won.", "label": 0, "idx": 0},
        "Does the sentence answer the question?\nQuestion: Who won?\nSentence: Ann won.\n"
        "A. Yes\nB. No\nAnswer:",
        "A",
    ),
    "ag_news": (
        {"text": "Shares fell.", "label": 2},
        "What is the topic of this article?\nShares fell.\n"
        "A. World\nB. Sports\nC. Business\nD. Science and technology\nAnswer:",
        "C",
    ),
    "dbpedia_14": (
        {"label": 13, "title": "Emma", "content": " Emma is a novel."},
        "What is this about?\nEmma: Emma is a novel.\n"
        "A. Company\nB. Educational institution\nC. Artist\nD. Athlete\nE. Office holder\n"
        "F. Means of transportation\nG. Building\nH. Natural place\nI. Village\nJ. Animal\n"
        "K. Plant\nL. Album\nM. Film\nN. Written work\nAnswer:",
        "N",
    ),
}
MRPC = [
    {"sentence1": f"It is {i}.", "sentence2": f"So it is {i % 3}.", "label": i % 2, "idx": i}
    for i in range(12)
]


def save(folder: Path, name: str, split: str, rows: list[dict[str, Any]]) -> None:
    (folder / name).mkdir(exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name / f"{split}.jsonl").write_text(lines, encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MRPC: eight training rows, one of which is held out too, and five held-out ones."""
    folder = tmp_path / "data"
    folder.mkdir()
    save(folder, "mrpc", "train", MRPC[:8])
    save(folder, "mrpc", "validation", MRPC[7:])
    monkeypatch.setenv("SPECTR_PAPER_DATA", str(folder))
    return folder


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_each_format_asks_and_answers_with_a_letter(name: str, tmp_path: Path) -> None:
    row, prompt, answer = ROWS[name]
    save(tmp_path, name, "train", [])
    save(tmp_path, name, PAPER_TASKS[name].heldout, [row])
    task = paper_task(name, tmp_path)
    (example,) = task.build(0).heldout
    assert (example.prompt, example.answer) == (prompt, answer)
    assert task.score(example.answer, example) == 1


@pytest.mark.parametrize(
    ("answer", "score"),
    [("B", 1), (" B. Yes", 1), ("(B)", 1), ("B)", 1), ("B\nA", 1), ("A", 0), ("", 0), ("Be", 0)],
)
def test_score_is_of_the_letter_that_an_answer_begins_with(
    answer: str, score: float, tmp_path: Path
) -> None:
    save(tmp_path, "qqp", "train", [])
    save(tmp_path, "qqp", "validation", [ROWS["qqp"][0]])
    task = paper_task("qqp", tmp_path)
    assert task.score(answer, task.build(0).heldout[0]) == score


def test_a_question_is_on_one_side_only_and_the_seed_decides_the_order(data: Path) -> None:
    task = get_task("mrpc")
    split = task.build(0)
    assert (len(split.train), len(split.heldout)) == (7, 5)
    assert task.build(0) == split != task.build(1)


def test_parquet_files_are_read_alike(data: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    expected = paper_task("mrpc").build(0)
    for name in ("train", "validation"):
        lines = data / "mrpc" / f"{name}.jsonl"
        rows = [json.loads(line) for line in lines.read_text().splitlines()]
        datasets.Dataset.from_list(rows).to_parquet(lines.with_suffix(".parquet"))
        lines.unlink()
    assert paper_task("mrpc").build(0) == expected


def test_the_hubs_rows_are_read_alike(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    expected = paper_task("mrpc").build(0)
    monkeypatch.delenv("SPECTR_PAPER_DATA")

    def load_dataset(dataset: str, config: str | None, split: str) -> Any:
        assert (dataset, config) == ("nyu-mll/glue", "mrpc")
        return datasets.Dataset.from_list({"train": MRPC[:8], "validation": MRPC[7:]}[split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert paper_task("mrpc").build(0) == expected


def test_tasks_are_found_beside_the_ten_and_unknown_names_list_both() -> None:
    assert get_task("ag_news").title == "AG News"
    assert not TASKS.keys() & PAPER_TASKS.keys()
    with pytest.raises(ValueError, match=r"'sql'.*'dbpedia_14'.*Did you mean 'mrpc'"):
        get_task("mprc")


def test_a_missing_file_says_which_and_where_it_goes(data: Path) -> None:
    (data / "mrpc" / "validation.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"mrpc/validation\.jsonl .*save the split"):
        get_task("mrpc").build(0)


def test_without_hub_and_files_the_error_names_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.delenv("SPECTR_PAPER_DATA", raising=False)
    with pytest.raises(OSError, match=r"cannot be read from the Hub .*SPECTR_PAPER_DATA"):
        get_task("ag_news").build(0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence1": "a", "label": 0}, "no column 'sentence2'"),
        ({"sentence1": "a", "sentence2": "b", "label": -1}, "no label"),
    ],
)
def test_other_files_are_refused(data: Path, row: dict[str, Any], message: str) -> None:
    save(data, "mrpc", "validation", [row])
    with pytest.raises(ValueError, match=message):
        get_task("mrpc").build(0)


def test_scores_are_by_router_and_task(
    data: Path, save_expert: SaveExpert, build_model: BuildModel
) -> None:
    engine = build_model([save_expert("mrpc", seed=5), save_expert("other", seed=6)])
    routers = ["base", "single:{own}", "spectr-context"]
    scores = paper_scores(engine, routers, num_examples=3)
    assert list(scores) == routers
    assert {name: row["mrpc"].num for name, row in scores.items()} == dict.fromkeys(routers, 3)


def test_scores_need_an_expert_of_a_task(routed_model: SpectrModel) -> None:
    with pytest.raises(ValueError, match="the experts are red, green, blue; at least one"):
        paper_scores(routed_model, ["base"])


def test_an_epoch_is_every_example_once() -> None:
    assert (PAPER_RECIPE.rank, PAPER_RECIPE.alpha, PAPER_RECIPE.batch_size) == (8, 16, 8)
    assert PAPER_RECIPE.num_steps(3668) == 459
    assert Recipe().num_steps(3668) == 300
    with pytest.raises(ValueError, match="epochs=0"):
        Recipe(epochs=0)


def test_the_default_recipes_run_folder_is_what_it_was_before_there_were_epochs() -> None:
    assert json.dumps(Recipe().to_json()) == (
        '{"steps": 300, "batch_size": 8, "learning_rate": 0.0005, "warmup_fraction": 0.06, '
        '"rank": 8, "alpha": 16, "seed": 0}'
    )


def test_a_command_gives_its_recipe_again() -> None:
    def options(**settings: Any) -> str:
        return " ".join(training._options(EMBEDDED_ID, Recipe(**settings)))

    paper = {"epochs": 1, "learning_rate": 1e-4}
    assert options() == ""
    assert options(steps=20, seed=3) == "--steps 20 --seed 3"
    assert options(**paper) == "--recipe paper"
    assert options(**paper, batch_size=2) == "--recipe paper --batch-size 2"
    assert options(learning_rate=1e-4) == "--recipe paper --steps 300"
    assert training._options("you/base", Recipe()) == ["--base you/base"]


@pytest.mark.parametrize(
    ("more", "steps", "length"),
    [
        (["--batch-size", "4"], 2, "epochs: 1, batches of 4 examples"),
        (["--steps", "1"], 1, "1 steps of 8 examples"),
    ],
)
def test_train_with_the_papers_recipe(
    more: list[str],
    steps: int,
    length: str,
    data: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("spectr_demo.training.recipe.cost.PROBE_SECONDS", 0.01)
    base = tmp_path / "base"
    tiny_llama(len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    taken = []
    fit = training.AnswerTrainer.training_step

    def step(*args: Any, **kwargs: Any) -> Any:
        taken.append(1)
        return fit(*args, **kwargs)

    monkeypatch.setattr(training.AnswerTrainer, "training_step", step)
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
    assert "# MRPC: a LoRA expert for" in card
    assert list(record["scores"]["expert"]) == ["all", "seen wording"]
