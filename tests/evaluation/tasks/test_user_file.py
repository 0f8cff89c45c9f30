"""A user's own file as a task: what is read, how it is split, what is said of an unsound one."""

import csv
import json
from pathlib import Path

import pytest

from spectr_demo.evaluation.tasks import find_task

PAIRS = [(f"Double {i}.", str(2 * i)) for i in range(30)]


def write(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def as_json(pairs: list[tuple[str, str]]) -> list[str]:
    return [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in pairs]


def test_json_and_csv_give_one_task(tmp_path: Path) -> None:
    one = find_task(write(tmp_path / "double.jsonl", as_json(PAIRS)))
    with (tmp_path / "double.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "answer", "prompt"), *((1, a, p) for p, a in PAIRS)])
    other = find_task(str(tmp_path / "double.csv"))
    assert one.name == other.name == "double"
    assert one.build(0) == other.build(0)


def test_a_tenth_is_held_out_and_nothing_is_lost(tmp_path: Path) -> None:
    task = find_task(write(tmp_path / "double.jsonl", as_json(PAIRS)))
    split = task.build(0)
    assert (len(split.train), len(split.heldout)) == (27, 3)
    found = {(example.prompt, example.answer) for example in (*split.train, *split.heldout)}
    assert found == set(PAIRS)
    assert task.build(1) != split


def test_an_answer_is_right_if_it_is_the_files(tmp_path: Path) -> None:
    task = find_task(write(tmp_path / "double.jsonl", as_json(PAIRS)))
    example = task.build(0).heldout[0]
    assert task.score(f" {example.answer}\n", example) == 1
    assert task.score(f"{example.answer}0", example) == 0


def test_the_longest_answer_has_room(tmp_path: Path) -> None:
    pairs = [*PAIRS, ("Say it.", "é" * 20)]
    assert find_task(write(tmp_path / "a.jsonl", as_json(pairs))).max_new_tokens == 41
    pairs = [*PAIRS, ("Say it.", "long " * 200)]
    assert find_task(write(tmp_path / "a.jsonl", as_json(pairs))).max_new_tokens == 256


def test_equal_lines_are_one_example_and_blank_ones_none(tmp_path: Path) -> None:
    lines = [*as_json(PAIRS), "", *as_json(PAIRS[:3])]
    split = find_task(write(tmp_path / "a.jsonl", lines)).build(0)
    assert len(split.train) + len(split.heldout) == len(PAIRS)


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("a.jsonl", [*as_json(PAIRS), "{'prompt'"], "line 31 is not JSON"),
        ("a.jsonl", ["[1]", *as_json(PAIRS)], "line 1 is not a JSON object"),
        ("a.jsonl", ['{"prompt": "Hi"}', *as_json(PAIRS)], "line 1 has no text in answer"),
        ("a.jsonl", ['{"prompt": 3, "answer": " "}'], "line 1 has no text in prompt and answer"),
        ("a.jsonl", ['{"prompt": "Double 3.", "answer": "7"}', *as_json(PAIRS)], "line 5 has anot"),
        ("a.jsonl", as_json(PAIRS[:9]), "it has 9 different prompts"),
        ("a.jsonl", [], "it has 0 different prompts"),
        ("a.csv", ["question,answer", "Hi,Ho"], "line 2 has no text in prompt"),
        ("a.csv", ["prompt,answer", "Hi"], "line 2 has no text in answer"),
        ("a.csv", ["prompt,answer", 'Hi,"Ho'], "unexpected end of data"),
    ],
)
def test_an_unsound_file_is_one_message(
    name: str, lines: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="correct the file") as caught:
        find_task(write(tmp_path / name, lines))
    assert message in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_all_that_is_wrong_is_said_at_once_but_not_endlessly(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 1 .*; line 2 .*; line 5 .*; and 4 more"):
        find_task(write(tmp_path / "a.jsonl", ["no"] * 9))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"prompt,answer\nHi,\xff\n")
    with pytest.raises(ValueError, match="cannot be read as UTF-8"):
        find_task(str(tmp_path / "a.csv"))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        find_task(str(tmp_path / "a.jsonl"))


def test_other_names_are_the_projects_tasks() -> None:
    assert find_task("sql").name == "sql"
    with pytest.raises(ValueError, match="Did you mean 'sql'"):
        find_task("sqll")
