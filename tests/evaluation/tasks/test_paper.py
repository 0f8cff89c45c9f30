"""The nine formats on rows of the datasets' own columns, and the errors of other rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from spectr_demo.evaluation.tasks import TASKS, get_task
from spectr_demo.evaluation.tasks.paper import PAPER_TASKS, paper_task

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
