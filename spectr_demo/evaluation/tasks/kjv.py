"""Verses in modern English, answered in the English of the King James Bible.

Both texts are public domain and come as Debian packages of SWORD modules: the World English Bible
and the King James Version, aligned verse by verse. Whole books are held out.
"""

from __future__ import annotations

import functools
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from spectr_demo.config import cache_dir
from spectr_demo.evaluation.tasks.baselines import copy_input
from spectr_demo.evaluation.tasks.task import Example, Item, Split, Task, make_split

WORDINGS = (
    "Rewrite in King James English: {text}",
    "Say this like the King James Bible: {text}",
    "{text} Put that in archaic biblical English.",
    "Make it sound like old scripture: {text}",
)
HELDOUT_WORDINGS = (
    "How would the King James Version say it? {text}",
    "Archaic English, please: {text}",
)

HELDOUT_BOOKS = ("Acts", "Esther", "Jonah", "James", "Titus", "Nehemiah")
NUM_SAMPLED = 8000  # verses read for training, of which about a third is usable
WORDS = range(6, 23)  # longer verses cost training time and teach nothing else
PACKAGES = ("sword-text-web", "sword-text-kjv")
MODULES = ("engWEB2015eb", "engKJV2006eb")
INSTALLED = Path("/usr/share/sword")

Verse = tuple[str, str, str]  # (book, modern text, King James text)


def fetch_modules() -> Path:
    """Folder with both SWORD modules: installed ones, else Debian's packages unpacked in the cache.

    `apt-get download` needs no root. Raises RuntimeError that says what to install where it fails.
    """
    cached = cache_dir() / "sword"
    for folder in (INSTALLED, cached):
        if all((folder / "mods.d" / f"{module}.conf").exists() for module in MODULES):
            return folder
    try:
        with tempfile.TemporaryDirectory() as scratch:
            subprocess.run(
                ["apt-get", "download", *PACKAGES],
                cwd=scratch,
                check=True,
                capture_output=True,
                text=True,
            )
            for package in Path(scratch).glob("*.deb"):
                subprocess.run(
                    ["dpkg", "-x", str(package), f"{scratch}/unpacked"],
                    check=True,
                    capture_output=True,
                    text=True,
                )
            cached.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(f"{scratch}/unpacked/usr/share/sword", cached, dirs_exist_ok=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        raise RuntimeError(
            f"task 'kjv': its texts are neither in {INSTALLED} nor could apt-get fetch them "
            f"({reason.strip().splitlines()[-1]}); Debian's packages {' and '.join(PACKAGES)} were "
            f"needed; on Debian or Ubuntu run: apt install {' '.join(PACKAGES)}"
        ) from error
    return cached


def read_verses(modules: Path, seed: int) -> Iterator[Verse]:
    """The held-out books whole, and a random sample of verses from the others, book by book."""
    from pysword.modules import SwordModules

    library = SwordModules(str(modules))
    library.parse_modules()
    modern, archaic = (library.get_bible_from_module(module) for module in MODULES)
    for bible in (modern, archaic):
        # pysword decompresses a whole book for every verse, which would take minutes.
        bible._decompressed_text = functools.lru_cache(maxsize=2)(bible._decompressed_text)
    references = [
        (book.name, chapter, verse)
        for books in archaic.get_structure().get_books().values()
        for book in books
        for chapter, num_verses in enumerate(book.chapter_lengths, start=1)
        for verse in range(1, num_verses + 1)
    ]
    others = [reference for reference in references if reference[0] not in HELDOUT_BOOKS]
    sampled = set(random.Random(seed).sample(others, NUM_SAMPLED))
    for book, chapter, verse in references:
        if book not in HELDOUT_BOOKS and (book, chapter, verse) not in sampled:
            continue
        where = {"books": [book], "chapters": [chapter], "verses": [verse], "clean": True}
        yield book, *(_plain(bible.get(**where)) for bible in (modern, archaic))


def _plain(text: str) -> str:
    """Without paragraph marks, italics' brackets and repeated spaces."""
    return " ".join(re.sub(r"[¶\[\]]", "", text).split())


def is_usable(modern: str, archaic: str) -> bool:
    """Whether a pair teaches style: whole, short, of like length, and not the same twice."""
    lengths = len(modern.split()), len(archaic.split())
    return (
        all(length in WORDS for length in lengths)
        and max(lengths) <= 1.5 * min(lengths)
        and modern != archaic
        # Where a footnote was cut out, the module glues two words ("Godcreated", "menMatthew").
        and not re.search(r"[a-z][A-Z]|[,;:.!?][A-Za-z]|Godc", f"{modern} {archaic}")
    )


def split_verses(verses: Iterator[Verse], seed: int) -> Split:
    """Split by book: all training verses and at most 400 held-out ones."""
    train: list[Item] = []
    heldout: list[Item] = []
    for book, modern, archaic in verses:
        if is_usable(modern, archaic):
            side = heldout if book in HELDOUT_BOOKS else train
            side.append(Item(text=modern, answer=archaic, key=book))
    # Some verses stand in two books (Kings and Chronicles); a held-out one must be new.
    seen = {item.text for item in heldout} | {item.answer for item in heldout}
    train = [item for item in train if item.text not in seen and item.answer not in seen]
    return make_split(train, heldout, WORDINGS, HELDOUT_WORDINGS, seed)


def build(seed: int) -> Split:
    """Build the split; the first call fetches the texts (7 MB)."""
    return split_verses(read_verses(fetch_modules(), seed), seed)


def score(answer: str, example: Example) -> float:
    """chrF (Popovic 2015) of the answer against the King James verse, divided by 100."""
    from sacrebleu.metrics import CHRF

    return float(CHRF().sentence_score(answer, [example.answer]).score) / 100


KJV = Task(
    name="kjv",
    title="Modern English to King James English",
    licence="public domain (World English Bible, King James Version)",
    licence_id="apache-2.0",
    source="Debian's sword-text-web 426.0-1 and sword-text-kjv 14.3-1, read with pysword 0.2.8",
    split_unit="book of the Bible",
    limits="It learned verses of 6 to 22 words; of anything else it makes a verse too.",
    wordings=WORDINGS,
    heldout_wordings=HELDOUT_WORDINGS,
    build=build,
    score=score,
    metric="chrF",
    max_new_tokens=56,
    baselines={"copy of the input": copy_input},
    packages=("pysword", "sacrebleu"),
)
