"""The nine tasks of the SpectR paper (arXiv 2504.03454), each as lettered multiple choice.

A prompt is a question, its lettered options and `Answer:`; the answer is a letter. The wording is
this project's own. Rows come from the Hub, or from files of the same columns: in the folder
`SPECTR_PAPER_DATA`, `<name>/<split>.jsonl` or `<name>/<split>.parquet`. A routed model is scored on
them in `evaluation/paper_scores.py`.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from spectr_demo.config import paper_data_from_environment
from spectr_demo.evaluation.tasks.task import Example, Split, Task

Row = Mapping[str, Any]
Question = tuple[str, Sequence[str], int]  # text, options, index of the right one

NEWS_TOPICS = ("World", "Sports", "Business", "Science and technology")
DBPEDIA_CLASSES = (
    "Company",
    "Educational institution",
    "Artist",
    "Athlete",
    "Office holder",
    "Means of transportation",
    "Building",
    "Natural place",
    "Village",
    "Animal",
    "Plant",
    "Album",
    "Film",
    "Written work",
)
LETTER = re.compile(r"\(?([A-Z])(?:[).:\n]|$)")


@dataclass(frozen=True, kw_only=True)
class PaperTask:
    """A row of the table. dataset, config: on the Hub. heldout: the split that is evaluated, a
    validation split where test labels are not public. question: what a row asks; KeyError where a
    column is missing."""

    name: str
    title: str
    dataset: str
    config: str | None = None
    heldout: str = "validation"
    licence: str
    licence_id: str
    question: Callable[[Row], Question]


def _hellaswag(row: Row) -> Question:
    text = f"How does this continue?\n{row['ctx']}"
    label = row["label"]  # a text, empty in the test split
    return text, row["endings"], -1 if label == "" else int(label)


def _qqp(row: Row) -> Question:
    text = (
        "Do these two questions ask the same?\n"
        f"Question 1: {row['question1']}\nQuestion 2: {row['question2']}"
    )
    return text, ("No", "Yes"), row["label"]


def _mrpc(row: Row) -> Question:
    text = (
        "Do these two sentences mean the same?\n"
        f"Sentence 1: {row['sentence1']}\nSentence 2: {row['sentence2']}"
    )
    return text, ("No", "Yes"), row["label"]


def _cola(row: Row) -> Question:
    text = f"Is this sentence acceptable English?\nSentence: {row['sentence']}"
    return text, ("No", "Yes"), row["label"]


def _sst2(row: Row) -> Question:
    text = f"What is the sentiment of this sentence?\nSentence: {row['sentence']}"
    return text, ("Negative", "Positive"), row["label"]


def _mnli(row: Row) -> Question:
    text = (
        "How does the hypothesis relate to the premise?\n"
        f"Premise: {row['premise']}\nHypothesis: {row['hypothesis']}"
    )
    return text, ("Entailment", "Neutral", "Contradiction"), row["label"]


def _qnli(row: Row) -> Question:
    text = (
        "Does the sentence answer the question?\n"
        f"Question: {row['question']}\nSentence: {row['sentence']}"
    )
    return text, ("Yes", "No"), row["label"]


def _ag_news(row: Row) -> Question:
    return f"What is the topic of this article?\n{row['text']}", NEWS_TOPICS, row["label"]


def _dbpedia(row: Row) -> Question:
    text = f"What is this about?\n{row['title'].strip()}: {row['content'].strip()}"
    return text, DBPEDIA_CLASSES, row["label"]


_glue = partial(
    PaperTask,
    dataset="nyu-mll/glue",
    licence="that of the original data, see its card",
    licence_id="other",
)
PAPER_TASKS = {
    row.name: row
    for row in (
        PaperTask(
            name="hellaswag",
            title="HellaSwag",
            dataset="Rowan/hellaswag",
            licence="MIT",
            licence_id="mit",
            question=_hellaswag,
        ),
        _glue(name="qqp", title="QQP", config="qqp", question=_qqp),
        _glue(name="mrpc", title="MRPC", config="mrpc", question=_mrpc),
        _glue(name="cola", title="CoLA", config="cola", question=_cola),
        _glue(name="sst2", title="SST-2", config="sst2", question=_sst2),
        _glue(
            name="mnli", title="MNLI", config="mnli", heldout="validation_matched", question=_mnli
        ),
        _glue(name="qnli", title="QNLI", config="qnli", question=_qnli),
        PaperTask(
            name="ag_news",
            title="AG News",
            dataset="fancyzhx/ag_news",
            heldout="test",
            licence="not stated",
            licence_id="unknown",
            question=_ag_news,
        ),
        PaperTask(
            name="dbpedia_14",
            title="DBpedia-14",
            dataset="fancyzhx/dbpedia_14",
            heldout="test",
            licence="CC BY-SA 3.0",
            licence_id="cc-by-sa-3.0",
            question=_dbpedia,
        ),
    )
}


def paper_task(name: str, data_dir: str | Path | None = None) -> Task:
    """One of `PAPER_TASKS` as an ordinary task, whose data is read when its split is built.

    data_dir: folder of local files; None is `SPECTR_PAPER_DATA`, or the Hub where that is unset.
    Building raises FileNotFoundError (no such file), ImportError (package datasets), OSError (no
    answer from the Hub) or ValueError (other columns, no labels), each saying what to do.
    """
    row = PAPER_TASKS[name]
    place = row.dataset if row.config is None else f"{row.dataset}, configuration {row.config}"
    return Task(
        name=name,
        title=row.title,
        licence=row.licence,
        licence_id=row.licence_id,
        source=f"{place}, on the Hugging Face Hub: train to learn from, {row.heldout} held out",
        split_unit="question",
        limits="It answers with a letter, and knows only this wording of a question.",
        wordings=("{text}",),
        heldout_wordings=(),
        build=lambda seed: _build(row, data_dir, seed),
        score=score,
        metric="accuracy",
        max_new_tokens=4,
    )


def score(answer: str, example: Example) -> float:
    """1.0 if the answer begins with the right letter, alone or before `)`, `.`, `:`; else 0.0."""
    letter = LETTER.match(answer.strip())
    return float(letter is not None and letter[1] == example.answer)


def _build(row: PaperTask, data_dir: str | Path | None, seed: int) -> Split:
    """Both splits, shuffled; a training question that is held out too is left out of training."""
    folder = data_dir or paper_data_from_environment()
    heldout = list(_examples(row, row.heldout, folder))
    asked = {example.key for example in heldout}
    train = [example for example in _examples(row, "train", folder) if example.key not in asked]
    rng = random.Random(seed)
    rng.shuffle(train)
    rng.shuffle(heldout)
    return Split(train=tuple(train), heldout=tuple(heldout))


def _examples(row: PaperTask, split: str, folder: str | Path | None) -> Iterator[Example]:
    where = f"task {row.name!r}, split {split!r}"
    rows = _hub_rows(row, split) if folder is None else _local_rows(row, split, Path(folder))
    for values in rows:
        try:
            text, options, right = row.question(values)
        except KeyError as error:
            raise ValueError(
                f"{where}: a row has no column {error}; the columns of {row.dataset} were needed"
            ) from error
        if right not in range(len(options)):
            raise ValueError(f"{where}: a row has no label; a split with labels was needed")
        lettered = zip(ascii_uppercase, options, strict=False)
        prompt = "\n".join([text, *(f"{letter}. {o}" for letter, o in lettered), "Answer:"])
        yield Example(
            prompt=prompt,
            answer=ascii_uppercase[right],
            text=prompt,
            key=prompt,
            wording="{text}",
            is_heldout_wording=False,
        )


def _local_rows(row: PaperTask, split: str, folder: Path) -> Iterator[Row]:
    lines, table = (folder / row.name / f"{split}.{kind}" for kind in ("jsonl", "parquet"))
    if lines.is_file():
        with lines.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file)
    elif table.is_file():
        yield from _datasets().Dataset.from_parquet(str(table))
    else:
        raise FileNotFoundError(
            f"task {row.name!r}: there is neither {lines} nor {table.name}; save the split "
            f"{split!r} of {row.dataset} there, or unset SPECTR_PAPER_DATA to read the Hub"
        )


def _hub_rows(row: PaperTask, split: str) -> Iterator[Row]:
    datasets = _datasets()
    try:
        rows = datasets.load_dataset(row.dataset, row.config, split=split)
    except (OSError, ValueError) as error:
        raise OSError(
            f"task {row.name!r}: {row.dataset} cannot be read from the Hub ({error}); connect to "
            f"it, or put {row.name}/{split}.jsonl (or .parquet) into a folder and name that in "
            "SPECTR_PAPER_DATA"
        ) from error
    yield from rows


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"the paper's tasks need a package that cannot be imported ({error}); "
            "run: pip install -r requirements-eval.txt, or spectr-demo[eval]"
        ) from error
    return datasets
