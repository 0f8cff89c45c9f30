"""Titles from a hand-made tabular list: which are read, how they are split and scored."""

import zipfile
from pathlib import Path

import pytest

from spectr_demo.evaluation.tasks.icd10 import (
    ICD10,
    TABULAR,
    chapter,
    is_usable,
    near,
    normalise,
    read_titles,
    score,
    split_titles,
    usable_items,
)
from spectr_demo.evaluation.tasks.task import Example

XML = """<?xml version="1.0" encoding="utf-8"?>
<ICD10CM.tabular>
  <version>2026</version>
  <chapter>
    <name>7</name>
    <desc>Diseases of the eye and adnexa (H00-H59)</desc>
    <section id="H25-H28">
      <desc>Disorders of lens (H25-H28)</desc>
      <diag>
        <name>H26</name>
        <desc>Other cataract</desc>
        <excludes1><note>congenital cataract (Q12.0)</note></excludes1>
        <diag>
          <name>H26.1</name>
          <desc>Traumatic cataract</desc>
          <inclusionTerm><note>Cataract after injury</note><note>Cataract after a blow</note>
          </inclusionTerm>
        </diag>
      </diag>
    </section>
  </chapter>
</ICD10CM.tabular>
"""

# Disorders of two chapters: no two titles of a chapter are one word apart ...
FAR = [
    (f"{sort} {part} with {sign} and {sign} of {cause} in the {part}", f"{code}.{i}")
    for code, part in (("H26", "lens"), ("K80", "gallbladder"))
    for i, (sort, sign, cause) in enumerate(
        (f"sort{n}", f"sign{n}", f"cause{n}") for n in range(20)
    )
]
# ... and all of these are.
CLOSE = [(f"Cataract of kind {n}", "H26.9") for n in range(20)]


def example(answer: str) -> Example:
    return Example(
        prompt="t", answer=answer, text="t", key="k", wording="{text}", is_heldout_wording=False
    )


def test_titles_and_inclusion_terms_are_read_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "simple_icd.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(TABULAR, XML)
    assert read_titles(path) == [
        ("Other cataract", "H26"),
        ("Traumatic cataract", "H26.1"),
        ("Cataract after injury", "H26.1"),
        ("Cataract after a blow", "H26.1"),
    ]


@pytest.mark.parametrize(
    ("title", "usable"),
    [
        ("Traumatic cataract", True),
        ("Cataract", False),
        ("word " * 12, True),
        ("word " * 13, False),
        ("Traumatic cataract, right eye", False),
        ("Traumatic cataract, bilateral", False),
        ("Copyright cataract", True),
        ("Asthma with any condition in J60-J64", False),
    ],
)
def test_usable_titles(title: str, usable: bool) -> None:
    assert is_usable(title) == usable


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("H26.1", "eye (H00-H59)"),
        ("H59", "eye (H00-H59)"),
        ("H60", "ear (H60-H95)"),
        ("K80.1", "digestive (K00-K95)"),
        ("S72", None),
    ],
)
def test_a_code_is_in_one_chapter(code: str, answer: str | None) -> None:
    assert chapter(code) == answer


def test_ambiguous_and_repeated_titles_and_other_chapters_are_left_out() -> None:
    titles = [
        ("Acute nephritis", "N00.1"),
        ("Nephritis, acute", "N00.2"),
        ("Diabetic neuropathy", "E10"),
        ("Neuropathy, diabetic", "G63"),
        ("Gastric ulcer", "K25"),
        ("Broken arm", "S42"),
    ]
    assert [(item.text, item.answer) for item in usable_items(titles)] == [
        ("Acute nephritis", "genitourinary (N00-N99)"),
        ("Gastric ulcer", "digestive (K00-K95)"),
    ]


def test_order_and_case_of_words_do_not_count() -> None:
    assert normalise("Nephritis, Acute (hereditary)") == normalise("hereditary acute nephritis")


@pytest.mark.parametrize(
    ("other", "is_near"),
    [
        ("ulcer of the stomach", True),
        ("ulcer of stomach", True),
        ("ulcer of the large stomach", True),
        ("ulcer of the zygoma", True),
        ("abscess of the stomach", True),
        ("ulcer of a duodenum", False),
    ],
)
def test_near_is_one_word_changed_added_or_missing(other: str, is_near: bool) -> None:
    keys = normalise("ulcer of the stomach"), normalise(other)
    assert bool(near(keys[0]) & near(keys[1])) == is_near


def test_heldout_titles_are_never_trained_on() -> None:
    split = split_titles(FAR, seed=0)
    assert len(split.train) == 30
    assert len(split.heldout) == 10
    assert not {e.key for e in split.train} & {e.key for e in split.heldout}
    assert {e.answer for e in split.train} == {"eye (H00-H59)", "digestive (K00-K95)"}


def test_near_duplicates_of_training_titles_are_not_held_out() -> None:
    split = split_titles(CLOSE, seed=0)
    assert len(split.train) == 15
    assert not split.heldout


def test_split_depends_on_the_seed_only() -> None:
    assert split_titles(FAR, seed=0) == split_titles(FAR, seed=0)
    assert split_titles(FAR, seed=0) != split_titles(FAR, seed=1)


def test_wordings_and_limits() -> None:
    assert len(ICD10.wordings) >= 4
    assert ICD10.heldout_wordings
    assert not set(ICD10.wordings) & set(ICD10.heldout_wordings)
    assert "Not medical advice" in ICD10.limits


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("skin (L00-L99)", 1.0),
        (" skin (L00-L99)\n", 1.0),
        ("skin", 0.0),
        ("L00-L99", 0.0),
        ("eye (H00-H59)", 0.0),
        ("", 0.0),
    ],
)
def test_score_is_the_chapter_as_it_is_written(answer: str, right: float) -> None:
    assert score(answer, example("skin (L00-L99)")) == right
