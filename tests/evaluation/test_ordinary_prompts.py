"""The lists of prompts for which no shipped expert fits."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spectr_demo import evaluation

ROOT = Path(__file__).parents[2]
SIDES = {"test": 150, "development": 60}
LENGTHS = ("short", "longer")
LISTS = [(side, length) for side in SIDES for length in LENGTHS]
KINDS = {
    "chit-chat",
    "knowledge",
    "advice",
    "writing",
    "code",
    "maths",
    "given text",
    "role play",
    "planning",
    "near miss",
    "other language",
}
LANGUAGES = {"ar", "de", "es", "fr", "hi", "it", "ja", "pt", "ru", "zh"}
UNSPACED = {"ja", "zh"}


@pytest.fixture(scope="module")
def ordinary() -> dict[str, Any]:
    path = Path(evaluation.__file__).with_name("ordinary.json")
    lists: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return lists


@pytest.fixture(scope="module")
def generic() -> list[str]:
    """What the shipped base wrote, by which the router is calibrated."""
    path = ROOT / "assets" / "generic_text.json"
    bases = json.loads(path.read_text(encoding="utf-8"))["bases"]
    return [prompt for prompts in bases.values() for prompt in prompts]


def entries(ordinary: dict[str, Any]) -> Iterator[dict[str, str]]:
    for side, length in LISTS:
        yield from ordinary[side][length]


def normalised(prompt: str) -> str:
    """Without case, punctuation and spaces at the ends."""
    return " ".join(prompt.casefold().split()).strip(" .!?¿¡。？！؟।'\"")


@pytest.mark.parametrize(("side", "length"), LISTS)
def test_a_list_has_its_count_and_every_kind_evenly(
    ordinary: dict[str, Any], side: str, length: str
) -> None:
    prompts = ordinary[side][length]
    assert len(prompts) == SIDES[side]
    kinds = Counter(entry["kind"] for entry in prompts)
    assert kinds.keys() == KINDS
    assert kinds.pop("near miss") == SIDES[side] // 5
    assert kinds.pop("other language") / SIDES[side] == pytest.approx(0.15, abs=0.005)
    assert max(kinds.values()) - min(kinds.values()) <= 1


@pytest.mark.parametrize("side", SIDES)
def test_other_languages_are_all_there_and_named(ordinary: dict[str, Any], side: str) -> None:
    lists = [ordinary[side][length] for length in LENGTHS]
    for entry in (entry for prompts in lists for entry in prompts):
        assert (entry["language"] == "en") == (entry["kind"] != "other language"), entry
    languages = [{entry["language"] for entry in prompts} - {"en"} for prompts in lists]
    assert languages[0] | languages[1] == LANGUAGES
    # 9 foreign prompts are too few for ten languages in each development list.
    assert min(map(len, languages)) >= (10 if side == "test" else 9)


def test_entries_have_three_filled_fields(ordinary: dict[str, Any]) -> None:
    assert ordinary.keys() == {"about", "test", "development", "chat"}
    for entry in entries(ordinary):
        assert entry.keys() == {"kind", "language", "prompt"}
        assert entry["prompt"] == entry["prompt"].strip() != ""


@pytest.mark.parametrize("side", SIDES)
def test_prompts_are_as_long_as_their_list_says(ordinary: dict[str, Any], side: str) -> None:
    for length in LENGTHS:
        for entry in ordinary[side][length]:
            prompt, spaced = entry["prompt"], entry["language"] not in UNSPACED
            size = len(prompt.split()) if spaced else len(prompt)
            # Chinese and Japanese put no spaces between words: characters are counted.
            least, most = {"short": (1, 9 if spaced else 20), "longer": (12 if spaced else 30, 60)}[
                length
            ]
            assert least <= size <= most, entry


def test_no_prompt_is_there_twice_in_the_chat_or_the_calibration(
    ordinary: dict[str, Any], generic: list[str]
) -> None:
    prompts = [entry["prompt"] for entry in entries(ordinary)]
    # The base wrote one prompt twice, with other punctuation.
    written = sorted({*map(normalised, generic)})
    counts = Counter([*map(normalised, prompts + ordinary["chat"]), *written])
    assert [prompt for prompt, count in counts.items() if count > 1] == []


def test_no_two_prompts_are_written_with_nearly_the_same_words(ordinary: dict[str, Any]) -> None:
    words = [frozenset(normalised(entry["prompt"]).split()) for entry in entries(ordinary)]
    close = [
        (sorted(a), sorted(b))
        for i, a in enumerate(words)
        for b in words[:i]
        if len(a & b) > 0.7 * len(a | b)
    ]
    assert close == []


def test_chat_is_the_list_of_the_first_edition(ordinary: dict[str, Any]) -> None:
    chat = ordinary["chat"]
    assert len(chat) == 24
    assert chat[0] == "What is your favourite season, and why?"
    assert chat[-1] == "Why do some people like spicy food?"
