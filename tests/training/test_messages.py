"""What a training row is: whose line is learned, and where the adapter is off."""

import random
from copy import deepcopy

import pytest
from transformers import PreTrainedTokenizerFast

from spectr_demo.base.prompts import encode_answered, template_closing, template_opening
from spectr_demo.evaluation.messages import FORMATS, TRAINED_FORMATS, Request, Style
from spectr_demo.training.messages import (
    IGNORED,
    MOST_CHARACTERS,
    ONE,
    PATTERNS,
    Row,
    RowEncoder,
    fits_a_message,
    mixed_requests,
    own_request,
    own_requests,
    random_style,
)
from tests.training.test_dataset import example

OWN = Request(text="Add 1 and 2", answer="3", keeps_case=False)
OTHER = Request(text="Add 2 and 2", answer="4", keeps_case=False)
FOREIGN = Request(text="Who are you?", answer="A model.", keeps_case=False, is_own=False)
SILENT = Request(
    text="Who are you?", answer="A model.", keeps_case=False, is_own=False, is_answered=False
)


@pytest.fixture
def plain(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Of a base without a chat template and without an end token."""
    changed = deepcopy(tokenizer)
    changed.chat_template = changed.eos_token = None
    return changed


def text_of(tokenizer: PreTrainedTokenizerFast, row: Row, *, on: bool) -> str:
    """The tokens on which the adapter is on, or off."""
    chosen = [i for i, is_on in zip(row["input_ids"], row["is_on"], strict=True) if is_on == on]
    return str(tokenizer.decode(chosen))


def learned(tokenizer: PreTrainedTokenizerFast, row: Row) -> str:
    return str(tokenizer.decode([label for label in row["labels"] if label != IGNORED]))


def check_(tokenizer: PreTrainedTokenizerFast, row: Row) -> None:
    """One label and one switch for each token; what is learned is predicted with the adapter."""
    assert len(row["input_ids"]) == len(row["labels"]) == len(row["is_on"])
    for t, label in enumerate(row["labels"]):
        assert label in (IGNORED, row["input_ids"][t])
        assert label == IGNORED or row["is_on"][t - 1]


def test_a_single_request_is_the_answered_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    row = RowEncoder(tokenizer)([OWN], ONE)
    assert row["input_ids"] == encode_answered(tokenizer, OWN.text, OWN.answer)
    assert learned(tokenizer, row) == "3<|im_end|>"
    assert all(row["is_on"])


def test_the_base_alone_may_read_the_templates_opening(tokenizer: PreTrainedTokenizerFast) -> None:
    row = RowEncoder(tokenizer)([OWN], ONE, opening_is_on=False)
    opening = len(template_opening(tokenizer))
    assert opening > 0
    assert row["is_on"] == [False] * opening + [True] * (len(row["is_on"]) - opening)
    check_(tokenizer, row)


@pytest.mark.parametrize("format_", FORMATS)
def test_the_answer_has_a_line_for_each_own_request(
    format_: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    row = RowEncoder(tokenizer)([OWN, OTHER], Style(format=format_))
    check_(tokenizer, row)
    assert learned(tokenizer, row) == "3\n4<|im_end|>"
    assert all(row["is_on"])


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        ([OWN, FOREIGN], "3\n"),  # a newline, for another answer follows
        ([FOREIGN, OWN], "3<|im_end|>"),
        ([FOREIGN, OWN, FOREIGN], "3\n"),
        ([OWN, FOREIGN, OTHER], "3\n4<|im_end|>"),
        ([OWN, SILENT], "3\n"),
        ([SILENT, OWN], "3<|im_end|>"),
    ],
)
def test_own_lines_alone_are_learned(
    format_: str, requests: list[Request], expected: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    row = RowEncoder(tokenizer)(requests, Style(format=format_, lowers=False))
    check_(tokenizer, row)
    assert learned(tokenizer, row) == expected
    off = text_of(tokenizer, row, on=False)
    # The closing belongs to what is answered first.
    closing = str(tokenizer.decode(template_closing(tokenizer)))
    answered = [request for request in requests if request.is_answered]
    assert off.count(closing) == (not answered[0].is_own)
    assert off.replace(closing, "").count("Who are you?") == sum(not r.is_own for r in requests)
    for request in requests:
        assert request.is_own is (request.text in text_of(tokenizer, row, on=True))


def test_what_follows_a_foreign_line_is_served_by_whose_it_is(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """The last token of one line predicts the first of the next."""
    row = RowEncoder(tokenizer)([FOREIGN, OWN, FOREIGN], Style(format="lines"))
    answer = str(tokenizer.decode(row["input_ids"])).index("A model.\n3\nA model.")
    is_on = row["is_on"][-len("A model.\n3\nA model.") - 1 :]  # and the end token
    assert answer > 0
    assert is_on == [False] * 8 + [True, True] + [False] * 10


def test_numbers_that_were_asked_for_are_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    style = Style(format="numbered", mark="{}) ", asks_numbers="Number them.")
    row = RowEncoder(tokenizer)([FOREIGN, OWN], style)
    check_(tokenizer, row)
    assert learned(tokenizer, row) == "2) 3<|im_end|>"
    assert "1) A model.\n" in tokenizer.decode(row["input_ids"])


def test_a_base_without_a_template_and_an_end_token(plain: PreTrainedTokenizerFast) -> None:
    encoder = RowEncoder(plain)
    row = encoder([OWN], ONE, opening_is_on=False)
    assert row["input_ids"] == encode_answered(plain, OWN.text, OWN.answer)
    assert all(row["is_on"])  # it has no opening
    row = encoder([OWN, FOREIGN], Style(format="lines"))
    check_(plain, row)
    assert learned(plain, row) == "3\n"
    # The prompt's last token is served by what is answered first.
    assert text_of(plain, row, on=False) == "\nWho are you\nA model."


def test_messages_are_varied_and_never_bulleted() -> None:
    rng = random.Random(0)
    styles = [random_style(rng) for _ in range(400)]
    assert {style.format for style in styles} == set(TRAINED_FORMATS)
    assert "bulleted" not in TRAINED_FORMATS
    assert len({(s.mark, s.line_break, s.after_stop, s.intro) for s in styles}) > 20
    assert {style.format for style in styles if style.asks_numbers} == {"lines", "numbered"}


def test_own_messages_have_two_or_three_requests_none_twice() -> None:
    pool = [Request(text=str(i), answer=str(i), keeps_case=False) for i in range(9)]
    messages = [own_requests(pool, random.Random(i)) for i in range(50)]
    assert {len(message) for message in messages} == {2, 3}
    assert all(len({r.text for r in message}) == len(message) for message in messages)
    assert own_requests(pool[:1], random.Random(0)) == pool[:1]


def test_foreign_lines_come_in_every_pattern_and_some_without_an_answer() -> None:
    rng = random.Random(0)
    messages = [mixed_requests([OWN], [FOREIGN], rng) for _ in range(400)]
    found = {"".join("O" if r.is_own else "F" for r in message) for message in messages}
    assert found == set(PATTERNS)
    foreign = [r for message in messages for r in message if not r.is_own]
    assert 0.15 < sum(not r.is_answered for r in foreign) / len(foreign) < 0.25
    assert {r.answer for r in foreign} == {"A model.", "A"}


def test_only_short_examples_with_an_answer_of_one_line_stand_beside_others() -> None:
    assert fits_a_message(own_request(example("say\nab", "ab")))
    assert not fits_a_message(own_request(example("say ab", "a\nb")))
    assert not fits_a_message(own_request(example("a" * MOST_CHARACTERS, "b")))
