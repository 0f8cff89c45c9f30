"""Domains that no task of the package has: pairs of a text and its answer, and instructions.

For build.py. Half of them are made up here by a rule. The others are read from archives that
`spectr_demo/evaluation/tasks/` fetches too, but for the names of colours.
"""

# ruff: noqa: SIM905 (lists of words read better as one text)
from __future__ import annotations

import csv
import io
import json
import random
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache

from spectr_demo.evaluation.tasks import category, to_es
from spectr_demo.evaluation.tasks.category import normalised, read_glosses
from spectr_demo.evaluation.tasks.download import Archive, fetch
from spectr_demo.evaluation.tasks.task import Item

COLORS = Archive(
    url="https://registry.npmjs.org/color-name-list/-/color-name-list-14.29.0.tgz",
    sha256="f752799d73906aa5ed09e56e76cb213e0a5af1758d6b73cc8b89ef2d9fe5d509",
)
MOST_ITEMS = 3000
MORSE = dict(
    zip(
        "abcdefghijklmnopqrstuvwxyz",
        (
            ".- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- "
            "...- .-- -..- -.-- --.."
        ).split(),
        strict=True,
    )
)
SPOKEN = (
    "Alfa Bravo Charlie Delta Echo Foxtrot Golf Hotel India Juliett Kilo Lima Mike November Oscar "
    "Papa Quebec Romeo Sierra Tango Uniform Victor Whiskey X-ray Yankee Zulu"
).split()
ROMAN = (
    (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"),
    (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
)  # fmt: skip
UNITS = (
    ("kilometres", "metres", 1000), ("metres", "centimetres", 100), ("kilograms", "grams", 1000),
    ("litres", "millilitres", 1000), ("hours", "minutes", 60), ("weeks", "days", 7),
    ("days", "hours", 24), ("feet", "inches", 12), ("yards", "feet", 3), ("dozens", "pieces", 12),
)  # fmt: skip
HUES = "red orange yellow green blue purple violet pink brown grey gray black white gold".split()
NAMES = {
    "f": "Anna Clara Emma Julia Laura Maria Nora Rosa Sofia Vera".split(),
    "m": "Adam Bruno David Felix Henry Jonas Leon Martin Paul Victor".split(),
}
# (relation of the first to the second, of the second to the third) -> of the first to the third,
# for a woman and for a man.
FAMILY = {
    ("parent", "parent"): ("grandmother", "grandfather"),
    ("sibling", "parent"): ("aunt", "uncle"),
    ("parent", "sibling"): ("mother", "father"),
    ("child", "sibling"): ("niece", "nephew"),
    ("child", "child"): ("granddaughter", "grandson"),
    ("sibling", "sibling"): ("sister", "brother"),
}
SAID = {
    "parent": ("mother", "father"),
    "sibling": ("sister", "brother"),
    "child": ("daughter", "son"),
}
# A correct verb, and the wrong one that stands in its place.
ERRORS = {
    "is": "are", "are": "is", "was": "were", "were": "was", "has": "have", "have": "has",
    "does": "do", "goes": "go", "an": "a", "children": "childs", "men": "mans", "went": "goed",
}  # fmt: skip

Pairs = Callable[[random.Random], Iterator[Item]]


def item(text: str, answer: str, key: str = "") -> Item:
    """A pair; the text itself is what the split is made by, unless a key is given."""
    return Item(text=text, answer=answer, key=key or text.lower())


# ---------------------------------------------------------------- words and phrases


@cache
def words() -> tuple[str, ...]:
    """Nouns of WordNet that are tagged in its corpus: the common ones. Lower-case, one word."""
    with tarfile.open(fetch(category.ARCHIVE)) as archive:
        data = archive.extractfile("package/dict/index.noun")
        assert data is not None
        lines = data.read().decode().splitlines()
    found = []
    for fields in (line.split() for line in lines if not line.startswith(" ")):
        num_synsets = int(fields[2])
        if int(fields[-num_synsets - 1]) > 0 and re.fullmatch("[a-z]{3,9}", fields[0]):
            found.append(fields[0])
    return tuple(sorted(found))


@cache
def phrases() -> tuple[str, ...]:
    """The first two to four words of glosses of WordNet, lower-case."""
    found = set()
    for gloss, _ in read_glosses(fetch(category.ARCHIVE)):
        first = gloss.lower().split()[: 2 + len(gloss) % 3]
        if len(first) > 1 and all(re.fullmatch("[a-z]+", word) for word in first):
            found.add(" ".join(first))
    return tuple(sorted(found))


def of_words(answer: Callable[[str], str | None], longest: int = 9) -> Pairs:
    """Pairs of a common word and what a rule makes of it; None leaves a word out."""

    def pairs(rng: random.Random) -> Iterator[Item]:
        for word in words():
            made = answer(word) if len(word) <= longest else None
            if made is not None:
                yield item(word, made)

    return pairs


def of_phrases(answer: Callable[[str], str]) -> Pairs:
    def pairs(rng: random.Random) -> Iterator[Item]:
        for phrase in rng.sample(phrases(), MOST_ITEMS):
            yield item(phrase, answer(phrase))

    return pairs


def plural(word: str) -> str | None:
    """The regular plural; None where it could be another (-f, -o, -us, -is, -man)."""
    if re.search("(f|fe|o|us|is|man|foot|tooth|goose|child|mouse|people|ics|ss?)$", word):
        return f"{word}es" if word.endswith("ss") else None
    if re.search("([xz]|ch|sh)$", word):
        return f"{word}es"
    return re.sub("([^aeiou])y$", r"\1ie", word) + "s"


def leet(word: str) -> str:
    return word.translate(str.maketrans("aeiost", "431057"))


# ---------------------------------------------------------------- numbers and dates


def roman(number: int) -> str:
    out = ""
    for value, letters in ROMAN:
        count, number = divmod(number, value)
        out += letters * count
    return out


def romans(rng: random.Random) -> Iterator[Item]:
    yield from (item(str(n), roman(n)) for n in range(1, 1000))


def binaries(rng: random.Random) -> Iterator[Item]:
    yield from (item(str(n), f"{n:b}") for n in range(1, 512))


def sums(rng: random.Random) -> Iterator[Item]:
    """Chains of two or three numbers below 100, added and subtracted."""
    for _ in range(MOST_ITEMS):
        chain = str(rng.randint(1, 99))
        for _ in range(rng.choice((1, 1, 2))):
            chain += f" {rng.choice('+-')} {rng.randint(1, 99)}"
        numbers = [int(x) for x in re.sub(r"([+-]) ", r"\1", chain).split()]
        yield item(chain, str(sum(numbers)))


def units(rng: random.Random) -> Iterator[Item]:
    for large, small, factor in UNITS:
        for n in range(2, 100):
            yield item(f"{n} {large} in {small}", f"{n * factor} {small}")


def clock(minutes: int) -> str:
    return f"{minutes // 60:02}:{minutes % 60:02}"


def durations(rng: random.Random) -> Iterator[Item]:
    """Two times of a day, and the hours and minutes between them."""
    for _ in range(MOST_ITEMS):
        start, stop = sorted(5 * x for x in rng.sample(range(288), 2))
        yield item(f"from {clock(start)} to {clock(stop)}", clock(stop - start))


def dates(rng: random.Random) -> Iterator[Item]:
    """Days from 1950 to 2049 in three ways of writing them."""
    for _ in range(MOST_ITEMS):
        day = date(1950, 1, 1) + timedelta(days=rng.randrange(36500))
        way = rng.choice(("%B {} %Y", "{} %B %Y", "%b {}, %Y"))
        yield item(day.strftime(way.format(day.day)), day.isoformat(), str(day))


def spoken_codes(rng: random.Random) -> Iterator[Item]:
    """Codes of two to four letters in the alphabet of radio operators."""
    for _ in range(MOST_ITEMS):
        letters = [rng.randrange(26) for _ in range(rng.randint(2, 4))]
        code = "".join(chr(65 + n) for n in letters)
        yield item(code, " ".join(SPOKEN[n] for n in letters))


def families(rng: random.Random) -> Iterator[Item]:
    """Three people and two facts; asked is what the first is to the third."""
    for _ in range(MOST_ITEMS):
        first, second = rng.choice(list(FAMILY))
        sexes = [rng.choice("fm") for _ in range(3)]
        a, b, c = (rng.choice(NAMES[sex]) for sex in sexes)
        if len({a, b, c}) < 3:
            continue
        is_man = [sex == "m" for sex in sexes]
        facts = (
            f"{a} is the {SAID[first][is_man[0]]} of {b}. {b} is the {SAID[second][is_man[1]]} "
            f"of {c}."
        )
        question = f"{facts} What is {a} to {c}?"
        yield item(question, FAMILY[first, second][is_man[0]])


# ---------------------------------------------------------------- read from archives


def colors(rng: random.Random) -> Iterator[Item]:
    """Names of colours that name a hue, with their code in hex."""
    with tarfile.open(fetch(COLORS)) as archive:
        data = archive.extractfile("package/src/colornames.csv")
        assert data is not None
        rows = list(csv.DictReader(io.StringIO(data.read().decode())))
    for row in rows:
        if set(row["name"].lower().split()) & set(HUES):
            yield item(row["name"], row["hex"], " ".join(sorted(row["name"].lower().split())))


def translations(language: str) -> Pairs:
    """Texts of Home Assistant's user interface in English and another language."""

    def texts(tree: dict[str, object], path: str = "") -> Iterator[tuple[str, str]]:
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from texts(value, f"{path}/{key}")
            else:
                yield f"{path}/{key}", " ".join(str(value).split())

    def pairs(rng: random.Random) -> Iterator[Item]:
        with zipfile.ZipFile(fetch(to_es.ARCHIVE)) as archive:
            names = set(archive.namelist())
            for name in sorted(n for n in names if n.endswith("/translations/en.json")):
                other = name.replace("/en.json", f"/{language}.json")
                if other not in names:
                    continue
                found = dict(texts(json.loads(archive.read(other))))
                for key, text in texts(json.loads(archive.read(name))):
                    if key in found and to_es.is_usable(text, found[key]):
                        yield item(text, found[key], normalised(text))

    return pairs


def corrections(rng: random.Random) -> Iterator[Item]:
    """Quoted examples of WordNet with one wrong word, and as they were."""
    with tarfile.open(fetch(category.ARCHIVE)) as archive:
        quotes: list[str] = []
        for part in ("noun", "verb", "adj"):
            data = archive.extractfile(f"package/dict/data.{part}")
            assert data is not None
            quotes += re.findall(r'"([^"]{15,70})"', data.read().decode())
    for quote in quotes:
        places = [i for i, word in enumerate(quote.split()) if word in ERRORS]
        if places:
            wrong = quote.split()
            place = rng.choice(places)
            wrong[place] = ERRORS[wrong[place]]
            yield item(" ".join(wrong), " ".join(quote.split()), quote)


# ---------------------------------------------------------------- the table


@dataclass(frozen=True, kw_only=True)
class Domain:
    """pairs: draws the items. wordings, heldout_wordings: instructions with `{text}` in them."""

    pairs: Pairs
    wordings: tuple[str, ...]
    heldout_wordings: tuple[str, ...]
    max_new_tokens: int


def domain(pairs: Pairs, max_new_tokens: int, *wordings: str) -> Domain:
    """The last wording is held out."""
    return Domain(
        pairs=pairs,
        wordings=wordings[:-1],
        heldout_wordings=wordings[-1:],
        max_new_tokens=max_new_tokens,
    )


DOMAINS = {
    "to_de": domain(
        translations("de"), 60,
        "Translate to German: {text}", "{text} (in German)", "In German, please: {text}",
        "How do you say this in German? {text}", "Give the German version: {text}",
    ),
    "to_fr": domain(
        translations("fr"), 60,
        "Translate to French: {text}", "{text} (in French)", "In French, please: {text}",
        "How do you say this in French? {text}", "Give the French version: {text}",
    ),
    "color": domain(
        colors, 10,
        "Hex code of the colour {text}", "Which hex colour is {text}?", "{text} as a hex code",
        "Give the RGB hex of {text}.", "What is the web colour for {text}?",
    ),
    "grammar": domain(
        corrections, 40,
        "Correct the grammar: {text}", "Fix the mistake: {text}", "{text} (correct this)",
        "Write this without the error: {text}", "Repair this sentence: {text}",
    ),
    "sums": domain(
        sums, 8,
        "Compute {text}", "What is {text}?", "{text} =", "Calculate: {text}", "Work out {text}.",
    ),
    "family": domain(
        families, 6,
        "{text}", "Answer with one word. {text}", "{text} Name the relation.",
        "Who is who? {text}",
    ),
    "duration": domain(
        durations, 10,
        "How long is it {text}?", "Time that passes {text}", "Hours and minutes {text}:",
        "Give the duration {text}.",
    ),
    "roman": domain(
        romans, 14,
        "Write {text} in Roman numerals.", "{text} as a Roman numeral", "Roman numeral for {text}",
        "How did the Romans write {text}?",
    ),
    "reverse": domain(
        of_words(lambda word: " ".join(word[::-1]), 6), 18,
        "Spell {text} backwards.", "Reverse the word {text}", "{text} from back to front",
        "Letters of {text} in reverse order:",
    ),
    "iso_date": domain(
        dates, 14,
        "Write {text} as an ISO date.", "{text} in ISO 8601", "ISO format of {text}",
        "Turn {text} into YYYY-MM-DD.",
    ),
    "plural": domain(
        of_words(plural), 10,
        "Plural of {text}", "What is the plural of {text}?", "One {text}, two", "{text} (plural)",
        "More than one {text}:",
    ),
    "morse": domain(
        of_words(lambda word: " ".join(MORSE[letter] for letter in word), 6), 40,
        "Morse code for {text}", "Write {text} in Morse code.", "{text} in Morse:",
        "How is {text} sent in Morse?",
    ),
    "binary": domain(
        binaries, 14,
        "Write {text} in binary.", "{text} as a binary number", "Binary of {text}",
        "Convert {text} to base 2.",
    ),
    "nato": domain(
        spoken_codes, 20,
        "Spell {text} in the NATO alphabet.", "{text} in radio words", "NATO spelling of {text}",
        "How would a pilot spell {text}?",
    ),
    "title_case": domain(
        of_phrases(str.title), 16,
        "Write as a title: {text}", "{text} (in title case)", "Capitalise each word: {text}",
        "Make a headline of this: {text}",
    ),
    "units": domain(
        units, 12,
        "Convert {text}.", "How much is {text}?", "{text}", "Give {text}.", "What are {text}?",
    ),
    "leet": domain(
        of_words(leet), 14,
        "Write {text} in leetspeak.", "{text} in leet", "Leet for {text}",
        "How would a hacker of 1995 write {text}?",
    ),
    "snake_case": domain(
        of_phrases(lambda phrase: phrase.replace(" ", "_")), 20,
        "A variable name for: {text}", "{text} in snake case", "Snake case: {text}",
        "Name a Python variable after: {text}",
    ),
    "initials": domain(
        of_phrases(lambda phrase: "".join(word[0].upper() for word in phrase.split())), 8,
        "Initials of: {text}", "{text} (abbreviate)", "Acronym for {text}",
        "Shorten to first letters: {text}",
    ),
}  # fmt: skip
