"""What an expert has to beat: answers made without any language model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from spectr_demo.evaluation.tasks.task import Example


def copy_input(train: Sequence[Example], heldout: Sequence[Example]) -> list[str]:
    """The input itself."""
    return [example.text for example in heldout]


def majority(train: Sequence[Example], heldout: Sequence[Example]) -> list[str]:
    """The commonest training answer, always."""
    answer, _ = Counter(example.answer for example in train).most_common(1)[0]
    return [answer] * len(heldout)


def naive_bayes(train: Sequence[Example], heldout: Sequence[Example]) -> list[str]:
    """Multinomial naive Bayes over the words and word pairs of the input (scikit-learn)."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    classifier = make_pipeline(CountVectorizer(ngram_range=(1, 2)), MultinomialNB(alpha=0.1))
    classifier.fit([example.text for example in train], [example.answer for example in train])
    return [str(answer) for answer in classifier.predict([example.text for example in heldout])]
