"""A task from a user's own file: one prompt and its answer a line, as JSON or CSV."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path

from spectr_demo.evaluation.tasks.task import Example, Split, Task

FIELDS = ("prompt", "answer")
SUFFIXES = (".jsonl", ".csv")
HELDOUT_FRACTION, MAX_HELDOUT = 0.1, 200
LEAST_PROMPTS = 10
MAX_NEW_TOKENS = 256


def is_file(name: str) -> bool:
    """Whether this names a user's file, not a task of the project."""
    return Path(name).suffix.lower() in SUFFIXES


def read_task(path: Path) -> Task:
    """The task of a file, named like it: a tenth of the prompts are held out, at most 200.

    Prompts are used as they are. An answer is right if it is the file's, but for the space around
    it. Raises ValueError that lists what is wrong with the file, with line numbers.
    """
    pairs = _read_pairs(path)
    longest = max(len(answer.encode()) for answer in pairs.values())
    return Task(
        name=path.stem,
        title=path.stem,
        licence="not stated",
        licence_id="unknown",
        source=f"Prompts and answers of {path.name}",
        split_unit="prompt",
        limits=f"It knows what {path.name} shows.",
        wordings=("{text}",),
        heldout_wordings=(),
        build=lambda seed: _split(pairs, seed),
        score=lambda answer, example: float(answer.strip() == example.answer),
        metric="exact match",
        # A token is at least a byte; the end token is one more.
        max_new_tokens=min(longest + 1, MAX_NEW_TOKENS),
    )


def _split(pairs: dict[str, str], seed: int) -> Split:
    examples = [
        Example(
            prompt=prompt,
            answer=answer,
            text=prompt,
            key=prompt,
            wording="{text}",
            is_heldout_wording=False,
        )
        for prompt, answer in pairs.items()
    ]
    random.Random(seed).shuffle(examples)
    num_heldout = min(MAX_HELDOUT, max(1, round(HELDOUT_FRACTION * len(examples))))
    return Split(train=tuple(examples[num_heldout:]), heldout=tuple(examples[:num_heldout]))


def _read_pairs(path: Path) -> dict[str, str]:
    """Answers by prompt, in the order of the file; one prompt has one answer."""
    if not path.is_file():
        raise ValueError(
            f"there is no file {path}; give the path of a {' or '.join(SUFFIXES)} file"
        )
    pairs: dict[str, str] = {}
    problems = []
    try:
        for line, row in _rows(path):
            if isinstance(row, str):
                problems.append(f"line {line} {row}")
                continue
            prompt, answer = (_text(row.get(field)) for field in FIELDS)
            if prompt is None or answer is None:
                missing = [field for field in FIELDS if _text(row.get(field)) is None]
                problems.append(f"line {line} has no text in {' and '.join(missing)}")
            elif pairs.setdefault(prompt, answer) != answer:
                problems.append(f"line {line} has another answer to the prompt of an earlier line")
    except (UnicodeDecodeError, csv.Error) as error:
        problems.append(f"it cannot be read as UTF-8 text ({error})")
    if not problems and len(pairs) < LEAST_PROMPTS:
        problems.append(f"it has {len(pairs)} different prompts")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{path}: {'; '.join(problems[:5])}{more}. At least {LEAST_PROMPTS} different prompts "
            "were needed, each with one answer, both text, in the fields (or columns) 'prompt' and "
            "'answer': correct the file"
        )
    return pairs


def _rows(path: Path) -> Iterator[tuple[int, dict[str, object] | str]]:
    """Line number and row; a text that says what is wrong where a line is no JSON object."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() == ".csv":
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                yield reader.line_num, row
            return
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except ValueError as error:
                yield line, f"is not JSON ({error})"
            else:
                yield line, value if isinstance(value, dict) else "is not a JSON object"


def _text(value: object) -> str | None:
    return value.strip() or None if isinstance(value, str) else None
