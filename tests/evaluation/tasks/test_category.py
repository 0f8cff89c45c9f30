"""Definition to category: reading WordNet's noun file, a balanced split without leaks, scoring."""

import io
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from spectr_demo.evaluation.tasks import Example, category

LICENCE = "  1 This software and database is being provided to you, the LICENSEE  "
NOUNS = [
    "00004475 04 n 01 haircut 0 001 @ 00002137 n 0000 | (informal) the act of cutting the hair  ",
    '00004476 05 n 01 cat 0 001 @ 00002137 n 0000 | small feline mammal; "the cat sat"  ',
    "00004477 07 n 01 tact 0 001 @ 00002137 n 0000 | a sense of what is appropriate  ",
    '00004478 28 n 01 noon 0 001 @ 00002137 n 0000 | the middle (or so) of the day "at noon"  ',
]
# Six definitions a class, and one that two classes share.
GLOSSES = [
    (f"{adjective} thing of the {answer} class", answer)
    for answer in category.CLASSES.values()
    for adjective in ("a small", "a large", "an old", "a new", "a rare", "a common")
] + [("this one is in two", "food"), ("This one is in two.", "plant")]


def write_archive(path: Path, lines: list[str]) -> Path:
    content = "\n".join(lines).encode()
    member = tarfile.TarInfo(category.DATA_FILE)
    member.size = len(content)
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(member, io.BytesIO(content))
    return path


def example(answer: str) -> Example:
    return Example(
        prompt="", answer=answer, text="", key="k", wording="{text}", is_heldout_wording=False
    )


@pytest.fixture(autouse=True)
def _few_of_each_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(category, "HELDOUT_PER_CLASS", 2)
    monkeypatch.setattr(category, "TRAIN_PER_CLASS", 3)


def test_reads_the_definitions_of_the_chosen_classes(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "wordnet.tgz", [LICENCE, *NOUNS])
    assert list(category.read_glosses(path)) == [
        ("the act of cutting the hair", "act"),
        ("small feline mammal", "animal"),
        ("the middle of the day", "time"),
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_split_is_balanced_and_by_definition(seed: int) -> None:
    split = category.split_glosses(GLOSSES, seed)
    classes = category.CLASSES.values()
    assert Counter(e.answer for e in split.train) == dict.fromkeys(classes, 3)
    assert Counter(e.answer for e in split.heldout) == dict.fromkeys(classes, 2)
    assert not {e.key for e in split.train} & {e.key for e in split.heldout}
    assert category.split_glosses(GLOSSES, seed) == split
    assert category.split_glosses(GLOSSES, seed + 1).train != split.train


def test_a_definition_in_two_classes_and_a_too_short_or_long_one_are_dropped() -> None:
    glosses = [
        *GLOSSES[-2:],
        ("only three words", "food"),
        ("word " * 21, "food"),
        *[(f"the one good dish {number}", "food") for number in range(9)],
    ]
    split = category.split_glosses(glosses, seed=0)
    kept = [*split.train, *split.heldout]
    assert len(kept) == 5
    assert all(e.text.startswith("the one good dish") for e in kept)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("food", 1.0),
        ("Food", 1.0),
        (' "food".\n', 1.0),
        ("foods", 0.0),
        ("a food", 0.0),
        ("food, plant", 0.0),
        ("plant", 0.0),
        ("", 0.0),
    ],
)
def test_score_is_the_exact_word(answer: str, right: float) -> None:
    assert category.score(answer, example("food")) == right


def test_no_wording_names_a_class() -> None:
    wordings = (*category.WORDINGS, *category.HELDOUT_WORDINGS)
    assert len(category.WORDINGS) >= 4
    assert len(set(wordings)) == len(wordings)
    for wording in wordings:
        assert not set(category.normalised(wording).split()) & set(category.CLASSES.values())


def test_prompts_are_wordings_with_the_text_in_them() -> None:
    split = category.split_glosses(GLOSSES, seed=0)
    assert {e.wording for e in split.train} <= set(category.WORDINGS)
    for e in (*split.train, *split.heldout):
        assert e.prompt == e.wording.replace("{text}", e.text)
        assert e.is_heldout_wording == (e.wording in category.HELDOUT_WORDINGS)
        assert category.score(e.answer, e) == 1.0
        assert category.score(e.text, e) == 0.0


def test_baselines_answer_every_heldout_definition() -> None:
    split = category.split_glosses(GLOSSES, seed=0)
    for baseline in category.CATEGORY.baselines.values():
        answers = baseline(split.train, split.heldout)
        assert len(answers) == len(split.heldout)
        assert set(answers) <= set(category.CLASSES.values())
