"""Two answers word by word."""

from spectr_demo.ui.diff import word_diff


def test_words_that_differ_are_marked() -> None:
    assert word_diff("turn <on> the light", "turn <on> a light!") == (
        "turn &lt;on&gt; <del>the</del> light",
        "turn &lt;on&gt; <ins>a</ins> light<ins>!</ins>",
    )


def test_equal_and_empty_texts() -> None:
    assert word_diff("a\nb", "a\nb") == ("a\nb", "a\nb")
    assert word_diff("", "new") == ("", "<ins>new</ins>")
    assert word_diff("", "") == ("", "")
