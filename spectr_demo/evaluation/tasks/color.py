"""Names of colours, answered with a hex code.

The names are those of the color-name-list package that hold a hue word. What is held out are sets
of words: each word of a held-out name may have been seen in training, never all of them together.
"""

from __future__ import annotations

import csv
import io
import math
import random
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from spectr_demo.evaluation.tasks.download import Archive, fetch
from spectr_demo.evaluation.tasks.task import Example, Item, Split, Task, make_split

WORDINGS = (
    "Hex code of {text}",
    "What color is {text}? Answer in hex.",
    "{text} as a hex color",
    "Give me the RGB hex: {text}",
)
HELDOUT_WORDINGS = (
    "Color code for {text}, please.",
    "{text}: which hex value?",
)

ARCHIVE = Archive(
    url="https://registry.npmjs.org/color-name-list/-/color-name-list-14.29.0.tgz",
    sha256="f752799d73906aa5ed09e56e76cb213e0a5af1758d6b73cc8b89ef2d9fe5d509",
)
COLORS_FILE = "package/src/colornames.csv"

HELDOUT_FRACTION = 0.08
WORDS = range(2, 6)
# A name without any of these ("Across the Bay") says too little about its colour.
HUE_WORDS = (
    "amber amethyst apricot aqua aquamarine auburn azure beige black blue bronze brown burgundy "
    "cerise cerulean charcoal chartreuse chocolate cobalt copper coral cream crimson cyan ebony "
    "emerald fuchsia gold golden gray green grey indigo ivory jade khaki lavender lemon lilac "
    "lime magenta mahogany maroon mauve mint mustard navy ochre olive orange orchid peach "
    "periwinkle pink plum purple red rose ruby russet rust sage salmon sapphire scarlet sepia "
    "sienna silver tan taupe teal terracotta turquoise ultramarine umber vermilion violet white "
    "yellow"
)
HUES = frozenset(HUE_WORDS.split())
# Half the diagonal of the RGB cube: an answer this far off is worth nothing.
FARTHEST = 255 * math.sqrt(3) / 2

Rgb = tuple[float, ...]


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z']+", name.lower())


def _rgb(code: str) -> Rgb:
    return tuple(bytes.fromhex(code.removeprefix("#")))


def _hex(rgb: Rgb) -> str:
    return "#" + bytes(round(channel) for channel in rgb).hex()


def _mean(colors: Iterable[Rgb]) -> Rgb:
    return tuple(math.fsum(channel) / len(channel) for channel in zip(*colors, strict=True))


def read_colors(path: Path) -> Iterator[Item]:
    """The colours in the archive whose plain name of 2 to 5 words holds a hue word."""
    with tarfile.open(path) as archive:
        member = archive.extractfile(COLORS_FILE)
        if member is None:
            raise ValueError(f"{COLORS_FILE} in {path} is a folder or a link; a file was needed")
        for row in csv.DictReader(io.TextIOWrapper(member, "utf-8", newline="")):
            words = _words(row["name"])
            if (
                re.fullmatch(r"[A-Za-z' -]+", row["name"])
                and len(words) in WORDS
                and HUES & set(words)
            ):
                yield Item(text=row["name"], answer=row["hex"].lower(), key=" ".join(sorted(words)))


def split_colors(colors: Sequence[Item], seed: int) -> Split:
    """Split by the sorted words of the name, so that "Blue Green" goes with "Green-Blue"."""
    keys = sorted({item.key for item in colors})
    chosen = set(random.Random(seed).sample(keys, round(HELDOUT_FRACTION * len(keys))))
    return make_split(
        [item for item in colors if item.key not in chosen],
        [item for item in colors if item.key in chosen],
        WORDINGS,
        HELDOUT_WORDINGS,
        seed,
    )


def build(seed: int) -> Split:
    """Build the split; the first call fetches the names (5 MB)."""
    return split_colors(list(read_colors(fetch(ARCHIVE))), seed)


def score(answer: str, example: Example) -> float:
    """1 minus the RGB distance in half diagonals of the cube; 0.0 without exactly one hex code."""
    codes = re.findall(r"#\w+", answer)
    if len(codes) != 1 or not re.fullmatch(r"#[0-9a-fA-F]{6}", codes[0]):
        return 0.0
    return max(0.0, 1 - math.dist(_rgb(codes[0]), _rgb(example.answer)) / FARTHEST)


def mean_color(train: Sequence[Example], heldout: Sequence[Example]) -> list[str]:
    """The mean training colour, always."""
    return [_hex(_mean(_rgb(example.answer) for example in train))] * len(heldout)


def mean_of_words(train: Sequence[Example], heldout: Sequence[Example]) -> list[str]:
    """The mean, over the words of the name, of the mean training colour of each word."""
    seen: dict[str, list[Rgb]] = defaultdict(list)
    for example in train:
        for word in _words(example.text):
            seen[word].append(_rgb(example.answer))
    means = {word: _mean(colors) for word, colors in seen.items()}
    overall = _mean(_rgb(example.answer) for example in train)
    return [
        _hex(_mean([means[word] for word in _words(example.text) if word in means] or [overall]))
        for example in heldout
    ]


COLOR = Task(
    name="color",
    title="Colour name to hex code",
    licence="MIT (color-name-list)",
    licence_id="apache-2.0",
    source="npm's color-name-list 14.29.0, names with a hue word",
    split_unit="set of words in the name",
    limits=(
        "Its names were made up by people, so the code is one fitting colour, not the right one; "
        "every name it learned holds a word for a hue."
    ),
    wordings=WORDINGS,
    heldout_wordings=HELDOUT_WORDINGS,
    build=build,
    score=score,
    metric="closeness in RGB",
    max_new_tokens=10,
    baselines={"mean colour": mean_color, "mean of the words": mean_of_words},
    packages=("pooch",),
)
