"""Names of colours: reading, splitting by set of words, scoring by distance."""

import io
import tarfile
from itertools import product
from pathlib import Path

import pytest

from spectr_demo.evaluation.tasks import Example, Item
from spectr_demo.evaluation.tasks.color import (
    COLOR,
    COLORS_FILE,
    HELDOUT_WORDINGS,
    WORDINGS,
    mean_color,
    mean_of_words,
    read_colors,
    score,
    split_colors,
)

CSV = """name,hex,good name
Damson Plum,#DDA0DD,x
Across the Bay,#b3e1e8,
Green-Blue,#11887b,
Blue Green,#137e6d,x
Robin's Egg Blue,#6dedfd,
1975 Earth Red,#7b463b,
Crème Brown,#aa8866,
Orange,#ffa500,x
The Very Long Name of a Red,#aa0000,
Bluebird Song,#2222aa,
"""


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "color-name-list.tgz"
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo(COLORS_FILE)
        info.size = len(CSV.encode())
        archive.addfile(info, io.BytesIO(CSV.encode()))
    return path


def colors() -> list[Item]:
    hues = {"red": "#c00000", "green": "#00c000", "blue": "#0000c0", "grey": "#808080"}
    nouns = ("Bay", "Moon", "Silk", "Leaf", "Wolf", "Rain", "Salt", "Dusk", "Fern", "Lace")
    return [
        Item(text=f"{noun} {hue}", answer=code, key=" ".join(sorted((noun.lower(), hue))))
        for (hue, code), noun in product(hues.items(), nouns)
    ]


def example(answer: str, text: str = "t") -> Example:
    return Example(
        prompt=text, answer=answer, text=text, key="k", wording="{text}", is_heldout_wording=False
    )


def test_reads_plain_names_with_a_hue_word(archive: Path) -> None:
    assert list(read_colors(archive)) == [
        Item(text="Damson Plum", answer="#dda0dd", key="damson plum"),
        Item(text="Green-Blue", answer="#11887b", key="blue green"),
        Item(text="Blue Green", answer="#137e6d", key="blue green"),
        Item(text="Robin's Egg Blue", answer="#6dedfd", key="blue egg robin's"),
    ]


def test_a_folder_where_the_names_should_be_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "color-name-list.tgz"
    with tarfile.open(path, "w:gz") as archive:
        folder = tarfile.TarInfo(COLORS_FILE)
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    with pytest.raises(ValueError, match="a file was needed"):
        list(read_colors(path))


@pytest.mark.parametrize("seed", range(5))
def test_a_set_of_words_is_on_one_side(seed: int) -> None:
    reordered = [
        Item(text=" ".join(reversed(item.text.split())), answer=item.answer, key=item.key)
        for item in colors()
    ]
    split = split_colors(colors() + reordered, seed)
    sides = [{frozenset(e.text.split()) for e in side} for side in (split.train, split.heldout)]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_same_seed_same_split() -> None:
    assert split_colors(colors(), seed=3) == split_colors(colors(), seed=3)
    assert split_colors(colors(), seed=3).train != split_colors(colors(), seed=4).train


def test_wordings_are_varied_and_some_are_held_out() -> None:
    assert len(set(WORDINGS)) >= 4
    assert not set(WORDINGS) & set(HELDOUT_WORDINGS)
    assert len({wording.split()[0] for wording in WORDINGS}) == len(WORDINGS)
    split = split_colors(colors(), seed=0)
    assert {e.wording for e in split.train} <= set(WORDINGS)
    assert {e.wording for e in split.heldout if e.is_heldout_wording} <= set(HELDOUT_WORDINGS)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("#dda0dd", 1.0),
        ("The code is #DDA0DD.", 1.0),
        ("#dda0de", 1 - 1 / 220.8),
        ("#00ff00", 0.0),  # 327 away
        ("dda0dd", 0.0),
        ("#dda0d", 0.0),
        ("#dda0dd0", 0.0),
        ("#dda0dg", 0.0),
        ("#dda0dd or #dda0de", 0.0),
        ("#dda0dd #d", 0.0),
        ("Damson Plum", 0.0),
        ("", 0.0),
    ],
)
def test_score_falls_with_the_distance(answer: str, right: float) -> None:
    assert score(answer, example("#dda0dd")) == pytest.approx(right, abs=1e-4)


def test_mean_color_is_one_answer() -> None:
    train = [example("#000000"), example("#ff8040")]
    assert mean_color(train, [example("#123456")] * 2) == ["#804020"] * 2


def test_mean_of_words_knows_words_and_falls_back() -> None:
    train = [
        example("#ff0000", "Deep Red"),
        example("#dd0000", "Red Wolf"),
        example("#0000ee", "Deep Sea"),
    ]
    heldout = [example("#ee0000", text) for text in ("Red", "Unseen red", "Never Heard")]
    assert mean_of_words(train, heldout) == ["#ee0000", "#ee0000", "#9f004f"]


def test_mean_of_words_beats_the_mean() -> None:
    split = split_colors(colors(), seed=0)
    scores = {
        name: sum(map(score, baseline(split.train, split.heldout), split.heldout))
        for name, baseline in COLOR.baselines.items()
    }
    assert scores["mean colour"] < scores["mean of the words"]
