"""Requests in one message: as people write them, and whose token is whose."""

import pytest
from transformers import PreTrainedTokenizerFast

from spectr_demo.base.prompts import encode, template_opening
from spectr_demo.evaluation.messages import (
    CLOSING,
    FORMATS,
    OPENING,
    PromptEncoder,
    Request,
    Style,
    pieces,
)

SPELL = Request(text="Spell the chord C.", answer="C E G", keeps_case=False)
WHAT = Request(text="What is it", answer="a thing", keeps_case=False)
OWN = Request(text="Seven. Translate that.", answer="Siete", keeps_case=True)


@pytest.mark.parametrize(
    ("format_", "expected"),
    [
        ("lines", "Spell the chord C.\nWhat is it\nSeven. Translate that."),
        ("numbered", "1. Spell the chord C.\n2. What is it\n3. Seven. Translate that."),
        ("bulleted", "- Spell the chord C.\n- What is it\n- Seven. Translate that."),
        ("then", "Spell the chord C.\nThen: What is it\nThen: Seven. Translate that."),
        ("sentence", "Spell the chord C. Then what is it, and then Seven. Translate that."),
    ],
)
def test_each_format_reads_as_people_write(format_: str, expected: str) -> None:
    message = pieces([SPELL, WHAT, OWN], Style(format=format_))
    assert "".join(text for text, _ in message) == expected
    assert [number for _, number in message] == [0, 1, 2]


def test_an_intro_is_the_first_requests_and_a_wish_the_last_ones() -> None:
    style = Style(format="numbered", intro="Two things.", asks_numbers="Number the answers.")
    message = pieces([SPELL, WHAT], style)
    assert message[0] == ("Two things.\n", 0)
    assert message[-1] == ("\nNumber the answers.", 1)


def test_a_style_may_keep_capitals() -> None:
    message = pieces([SPELL, WHAT], Style(format="sentence", lowers=False, after_stop=" And "))
    assert message[1][0] == " And What is it"


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match=r"format is 'linse'.*lines"):
        Style(format="linse")


@pytest.mark.parametrize("format_", FORMATS)
def test_every_token_has_an_owner(tokenizer: PreTrainedTokenizerFast, format_: str) -> None:
    message = pieces([SPELL, WHAT], Style(format=format_))
    ids, owners = PromptEncoder(tokenizer)(message)
    assert ids == encode(tokenizer, "".join(text for text, _ in message))
    for number, (text, _) in enumerate(message):
        own = [i for i, owner in zip(ids, owners, strict=True) if owner == number]
        assert tokenizer.decode(own) == text
    num_opening = len(template_opening(tokenizer))
    assert owners[:num_opening] == [OPENING] * num_opening
    assert owners[-1] == CLOSING
