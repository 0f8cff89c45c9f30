"""Snippets of reviews, answered with whether the reviewer is positive or negative.

The snippets (movies from Rotten Tomatoes, products from Amazon) come with the mean of about
twenty people's ratings, from the data of VADER (Hutto and Gilbert 2014). Held out are whole
snippets, and of Amazon whole reviews.
"""

from __future__ import annotations

import html
import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from spectr_demo.evaluation.tasks.baselines import majority, naive_bayes
from spectr_demo.evaluation.tasks.download import Archive, fetch
from spectr_demo.evaluation.tasks.task import Example, Item, Split, Task, split_by_key

WORDINGS = (
    "Positive or negative? {text}",
    "{text} Is this review positive or negative?",
    "Sentiment of this review: {text}",
    "How does the reviewer feel? {text}",
)
HELDOUT_WORDINGS = (
    "Classify the opinion: {text}",
    "{text} What is the sentiment?",
)

ARCHIVE = Archive(
    url=(
        "https://files.pythonhosted.org/packages/77/8c/"
        "4a48c10a50f750ae565e341e697d74a38075a3e43ff0df6f1ab72e186902/vaderSentiment-3.3.2.tar.gz"
    ),
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
# The snippets are in an archive inside the archive.
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = {
    "movie": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "amazon": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
}

HELDOUT_FRACTION = 0.08
MIN_RATING = 1.0  # of -4 to 4; what is closer to 0 is neutral or disputed
WORDS = range(4, 26)  # shorter ones are titles; longer ones cost training time


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    if member is None:
        raise ValueError(f"{name} in the archive is a folder or a link; a file was needed")
    return member.read()


def _plain(text: str) -> str:
    """Without HTML entities (some are escaped twice), lost dashes and quotes of two signs."""
    text = html.unescape(html.unescape(text))
    text = re.sub(r"\s{3,}", " - ", text.strip())
    return " ".join(re.sub(r"''|``", '"', text).split())


def read_snippets(path: Path) -> Iterator[Item]:
    """The clearly positive or negative snippets of usable length in vaderSentiment's archive."""
    with (
        tarfile.open(path) as outer,
        tarfile.open(fileobj=io.BytesIO(_read(outer, INNER))) as inner,
    ):
        for source, name in FILES.items():
            for line in _read(inner, name).decode("utf-8").splitlines():
                number, rating, snippet = line.split("\t", 2)
                text = _plain(snippet)
                if (
                    abs(float(rating)) >= MIN_RATING
                    and len(text.split()) in WORDS
                    and "http" not in text
                ):
                    # An Amazon snippet is numbered review_sentence, a movie's by itself.
                    yield Item(
                        text=text,
                        answer="positive" if float(rating) > 0 else "negative",
                        key=f"{source} {number.split('_')[0]}",
                    )


def split_snippets(snippets: Sequence[Item], seed: int) -> Split:
    """Split by key; of snippets that differ in punctuation and case only, one is kept."""
    items = list(
        {" ".join(re.findall(r"\w+", item.text.lower())): item for item in snippets}.values()
    )
    return split_by_key(items, HELDOUT_FRACTION, WORDINGS, HELDOUT_WORDINGS, seed)


def build(seed: int) -> Split:
    """Build the split; the first call fetches the snippets (2.5 MB)."""
    return split_snippets(list(read_snippets(fetch(ARCHIVE))), seed)


def score(answer: str, example: Example) -> float:
    """1.0 where the first word of the answer is the reference, in any case, else 0.0."""
    first = re.search(r"\w+", answer)
    return float(first is not None and first[0].lower() == example.answer)


SENTIMENT = Task(
    name="sentiment",
    title="Review to sentiment",
    licence="MIT (vaderSentiment)",
    licence_id="apache-2.0",
    source="The movie and Amazon review snippets in the source package of vaderSentiment 3.3.2",
    split_unit="movie snippet or Amazon review",
    limits=(
        "It learned sentences about movies and electronics that people rated clearly positive or "
        "negative; it has no answer for a neutral one."
    ),
    wordings=WORDINGS,
    heldout_wordings=HELDOUT_WORDINGS,
    build=build,
    score=score,
    metric="accuracy",
    max_new_tokens=6,
    baselines={"majority class": majority, "naive Bayes": naive_bayes},
    packages=("pooch", "sklearn"),
)
