"""Review snippets: reading, splitting by review, scoring by the first word."""

import io
import tarfile
from pathlib import Path

import pytest

from spectr_demo.evaluation.tasks import Example, Item
from spectr_demo.evaluation.tasks.sentiment import (
    FILES,
    HELDOUT_WORDINGS,
    INNER,
    SENTIMENT,
    WORDINGS,
    read_snippets,
    score,
    split_snippets,
)

MOVIE = "\r\n".join(
    (
        "1\t2.5\tA warm, funny &amp;amp; ''moving'' film.",
        "2\t-1.0\tThe three clichés    and the ending    are dull.",
        "3\t-0.9\tNeither good nor bad, I think.",
        "4\t3.1\tAn instant classic",
        f"5\t2\t{'very ' * 25}good",
    )
)
AMAZON = "\r\n".join(
    (
        "12_1\t-2.75\tit froze twice in a week.",
        "12_2\t1.05\tthe screen is nice though.",
        "13_1\t2\tsee http://example.com for my praise.",
    )
)


def tar_gz(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    inner = tar_gz({FILES["movie"]: MOVIE.encode(), FILES["amazon"]: AMAZON.encode()})
    path = tmp_path / "vaderSentiment.tar.gz"
    path.write_bytes(tar_gz({INNER: inner}))
    return path


def snippets(num_reviews: int = 50) -> list[Item]:
    return [
        Item(
            text=f"Sentence {sentence} of review {review} is {'good' if review % 3 else 'bad'}.",
            answer="positive" if review % 3 else "negative",
            key=f"amazon {review}",
        )
        for review in range(num_reviews)
        for sentence in range(3)
    ]


def example(answer: str) -> Example:
    return Example(
        prompt="t", answer=answer, text="t", key="k", wording="{text}", is_heldout_wording=False
    )


def test_reads_clear_snippets_of_usable_length(archive: Path) -> None:
    assert list(read_snippets(archive)) == [
        Item(text='A warm, funny & "moving" film.', answer="positive", key="movie 1"),
        Item(
            text="The three clichés - and the ending - are dull.", answer="negative", key="movie 2"
        ),
        Item(text="it froze twice in a week.", answer="negative", key="amazon 12"),
        Item(text="the screen is nice though.", answer="positive", key="amazon 12"),
    ]


def test_a_folder_where_the_snippets_should_be_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vaderSentiment.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        folder = tarfile.TarInfo(INNER)
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    with pytest.raises(ValueError, match="a file was needed"):
        list(read_snippets(path))


def test_a_review_is_on_one_side() -> None:
    split = split_snippets(snippets(), seed=0)
    assert {e.key for e in split.heldout}
    assert not {e.key for e in split.train} & {e.key for e in split.heldout}
    assert len(split.train) + len(split.heldout) == 150


def test_the_same_snippet_with_other_punctuation_is_kept_once() -> None:
    items = [
        Item(text=text, answer="positive", key=f"movie {i}")
        for i, text in enumerate(("A delight, all of it!", "a delight all of it", "Not that one"))
    ]
    split = split_snippets(items, seed=0)
    assert len(split.train) + len(split.heldout) == 2


def test_same_seed_same_split() -> None:
    assert split_snippets(snippets(), seed=3) == split_snippets(snippets(), seed=3)
    assert split_snippets(snippets(), seed=3).train != split_snippets(snippets(), seed=4).train


def test_wordings_are_varied_and_some_are_held_out() -> None:
    assert len(set(WORDINGS)) >= 4
    assert not set(WORDINGS) & set(HELDOUT_WORDINGS)
    assert len({wording.split()[0] for wording in WORDINGS}) == len(WORDINGS)
    split = split_snippets(snippets(), seed=0)
    assert {e.wording for e in split.train} <= set(WORDINGS)
    assert {e.wording for e in split.heldout if e.is_heldout_wording} <= set(HELDOUT_WORDINGS)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("negative", 1.0),
        ("Negative.", 1.0),
        (' "NEGATIVE" review', 1.0),
        ("positive", 0.0),
        ("not negative", 0.0),
        ("negatively", 0.0),
        ("...", 0.0),
        ("", 0.0),
    ],
)
def test_score_is_the_first_word(answer: str, right: float) -> None:
    assert score(answer, example("negative")) == right


def test_baselines_answer_every_heldout_example() -> None:
    split = split_snippets(snippets(), seed=0)
    scores = {}
    for name, baseline in SENTIMENT.baselines.items():
        answers = baseline(split.train, split.heldout)
        assert len(answers) == len(split.heldout)
        scores[name] = sum(map(score, answers, split.heldout)) / len(split.heldout)
    # Two reviews of three are good, and say so in a word.
    assert scores["majority class"] < scores["naive Bayes"] == 1.0
