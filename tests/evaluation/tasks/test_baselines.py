"""Answers without a model, on a toy set of words for animals and plants."""

from spectr_demo.evaluation.tasks.baselines import copy_input, majority, naive_bayes
from spectr_demo.evaluation.tasks.task import Example


def example(text: str, answer: str) -> Example:
    return Example(
        prompt=f"What is {text}?",
        answer=answer,
        text=text,
        key=text,
        wording="What is {text}?",
        is_heldout_wording=False,
    )


TRAIN = [
    example("barks at night", "animal"),
    example("barks and bites", "animal"),
    example("bites at night", "animal"),
    example("blooms in spring", "plant"),
    example("green in spring", "plant"),
]
HELDOUT = [
    example("blooms green", "plant"),
    example("it barks", "animal"),
    example("never heard of", "plant"),
]


def test_copy_is_the_input_without_its_wording() -> None:
    assert copy_input(TRAIN, HELDOUT) == ["blooms green", "it barks", "never heard of"]


def test_majority_is_the_commonest_training_answer() -> None:
    assert majority(TRAIN, HELDOUT) == ["animal"] * 3


def test_naive_bayes_goes_by_words_and_else_by_the_commonest_class() -> None:
    assert naive_bayes(TRAIN, HELDOUT) == ["plant", "animal", "animal"]


def test_naive_bayes_goes_by_word_pairs_too() -> None:
    train = [
        example("not good not bad not good", "yes"),
        example("good not bad not good not", "no"),
    ]
    # The words are the same; "not good" stands twice in the first, "good not" in the second.
    heldout = [example("not good", "yes"), example("good not", "no")]
    assert naive_bayes(train, heldout) == ["yes", "no"]
