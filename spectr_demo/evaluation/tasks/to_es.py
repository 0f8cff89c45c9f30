"""Texts of a user interface in English, answered in Spanish.

Both come from the translation files of Home Assistant (package homeassistant), paired by key. The
split is by source text, and a held-out text differs from every training text by more than a word.
"""

from __future__ import annotations

import json
import random
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from spectr_demo.evaluation.tasks.baselines import copy_input
from spectr_demo.evaluation.tasks.download import Archive, fetch
from spectr_demo.evaluation.tasks.task import Example, Item, Split, Task, make_split

WORDINGS = (
    "Translate to Spanish: {text}",
    "{text} (in Spanish)",
    "How do you say this in Spanish? {text}",
    "In Spanish, please: {text}",
)
HELDOUT_WORDINGS = ('What is "{text}" in Spanish?', "Give the Spanish version: {text}")

ARCHIVE = Archive(
    url=(
        "https://files.pythonhosted.org/packages/90/d3/"
        "894e3376eeddc1da7f7bd99e229512c3c7505e7b0e17b9372a221259ea54/"
        "homeassistant-2024.3.3-py3-none-any.whl"
    ),
    sha256="6e1ec2c07441d63fdcfb8acd2c4bbb6f68bc97330855784d3623d10c38fe3577",
)
HELDOUT_FRACTION = 0.15
WORDS = range(2, 17)  # of the English text; longer ones cost training time and teach nothing else
MAX_ANSWER_WORDS = 20

Pair = tuple[str, str]  # (English, Spanish)


def _texts(
    tree: dict[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path of keys, text) of every text in a translation file."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _texts(value, (*path, key))
        else:
            yield (*path, key), value


def read_pairs(path: Path) -> Iterator[Pair]:
    """The English and Spanish text of every key that has both, component by component."""
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        for name in sorted(names):
            spanish_name = f"{name.removesuffix('en.json')}es.json"
            if not name.endswith("/translations/en.json") or spanish_name not in names:
                continue
            spanish = dict(_texts(json.loads(archive.read(spanish_name))))
            for key, text in _texts(json.loads(archive.read(name))):
                if key in spanish:
                    yield " ".join(text.split()), " ".join(spanish[key].split())


def normalised(text: str) -> str:
    """Lower-case words without punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


def is_usable(english: str, spanish: str) -> bool:
    """Whether a pair teaches translation: plain, short, of like length, and mostly translated."""
    words = set(normalised(spanish).split())
    return (
        len(english.split()) in WORDS
        and len(spanish.split()) <= MAX_ANSWER_WORDS
        and len(english) <= 2 * len(spanish)
        and len(spanish) <= 2 * len(english) + 8
        # What is mostly names stays as it is; copying it would teach nothing.
        and 2 * len(words & set(normalised(english).split())) <= len(words)
        # Placeholders, references, markup, web addresses, file names and identifiers.
        and not re.search(r"[{}\[\]<>*`_|\\%/@#]|\w\.\w", f"{english} {spanish}")
    )


def _variants(text: str) -> set[str]:
    """The text's words, and its words less any one of them.

    Two texts share a variant where one becomes the other by changing, adding or dropping a word.
    """
    words = normalised(text).split()
    shorter = (words[:i] + words[i + 1 :] for i in range(len(words)))
    return {" ".join(words), *(" ".join(rest) for rest in shorter)}


def split_pairs(pairs: Iterable[Pair], seed: int) -> Split:
    """Split by source text; held-out texts one word away from a training text are dropped."""
    translations: defaultdict[str, Counter[Pair]] = defaultdict(Counter)
    for english, spanish in pairs:
        if is_usable(english, spanish):
            translations[normalised(english)][english, spanish] += 1
    items = []
    for key, counts in sorted(translations.items()):
        (english, spanish), _ = counts.most_common(1)[0]
        items.append(Item(text=english, answer=spanish, key=key))
    random.Random(seed).shuffle(items)
    num_heldout = round(HELDOUT_FRACTION * len(items))
    heldout, train = items[:num_heldout], items[num_heldout:]
    trained = set().union(*(_variants(item.text) for item in train))
    heldout = [item for item in heldout if not trained & _variants(item.text)]
    return make_split(train, heldout, WORDINGS, HELDOUT_WORDINGS, seed)


def build(seed: int) -> Split:
    """Build the split; the first call fetches the package (35 MB)."""
    return split_pairs(read_pairs(fetch(ARCHIVE)), seed)


def score(answer: str, example: Example) -> float:
    """chrF (Popovic 2015) of the answer against the Spanish text, divided by 100."""
    from sacrebleu.metrics import CHRF

    return float(CHRF().sentence_score(answer, [example.answer]).score) / 100


TO_ES = Task(
    name="to_es",
    title="English to Spanish",
    licence="Apache-2.0 (Home Assistant)",
    licence_id="apache-2.0",
    source="Translation files of homeassistant 2024.3.3, `components/*/translations`",
    split_unit="source text",
    limits=(
        "It learned short texts of a smart home's user interface; everyday and literary English "
        "are outside of it."
    ),
    wordings=WORDINGS,
    heldout_wordings=HELDOUT_WORDINGS,
    build=build,
    score=score,
    metric="chrF",
    max_new_tokens=60,
    baselines={"copy of the input": copy_input},
    packages=("pooch", "sacrebleu"),
)
