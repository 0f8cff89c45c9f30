"""Prompts: the template around them, and what every prompt opens with."""

from copy import deepcopy

import pytest
from transformers import PreTrainedTokenizerFast

from spectr_demo.base.prompts import (
    encode,
    encode_answer,
    encode_answered,
    newline_ids,
    pad_left,
    request_lines,
    request_start,
    shared_length,
    template_closing,
    template_opening,
    user_turn,
)


def test_the_opening_ends_where_the_request_starts(tokenizer: PreTrainedTokenizerFast) -> None:
    opening = template_opening(tokenizer)
    ids = encode(tokenizer, "Zebra?")
    assert shared_length(opening, ids) == len(opening) > 0
    assert tokenizer.decode(ids[len(opening) :]).startswith("Zebra?")


def test_another_opening_counts_only_as_far_as_it_is_the_same(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    system = {"role": "system", "content": "Be brief."}
    ids = encode(tokenizer, [system, {"role": "user", "content": "Hi"}])
    assert shared_length(template_opening(tokenizer), ids) < len(template_opening(tokenizer))


def test_the_last_request_of_a_conversation(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Second?"},
    ]
    opening, turn = template_opening(tokenizer), user_turn(tokenizer)
    for messages, request in ((turns[:1], "First?"), (turns, "Second?")):
        ids = encode(tokenizer, messages)
        start = request_start(ids, opening, turn)
        assert tokenizer.decode(ids[start:]).startswith(request)
    plain = deepcopy(tokenizer)
    plain.chat_template = None
    assert request_start(encode(plain, "Hi"), template_opening(plain), user_turn(plain)) == 0


@pytest.mark.parametrize(
    ("message", "lines"),
    [
        ("Paint it red", ["Paint it red"]),
        ("Paint it red\nCount to two", ["Paint it red\n", "Count to two"]),
        ("One\n\n  Two\n\nThree", ["One\n\n", "  Two\n\n", "Three"]),
        ("1\n2\n3\n4", ["1\n", "2\n", "3\n", "4"]),
        ("1\n2\n3\n4\n5", ["1\n2\n3\n4\n5"]),  # more than a few requests: a text
    ],
)
def test_the_lines_of_a_request_as_if_each_were_the_last(
    tokenizer: PreTrainedTokenizerFast, message: str, lines: list[str]
) -> None:
    turns = [
        {"role": "user", "content": "Hello\nthere"},
        {"role": "assistant", "content": "Hi\n!"},
        {"role": "user", "content": message},
    ]
    ids = encode(tokenizer, turns)
    start = request_start(ids, template_opening(tokenizer), user_turn(tokenizer))
    found = request_lines(ids, start, template_closing(tokenizer), newline_ids(tokenizer))
    assert len(found) == len(lines)
    read = ""
    for (prompt, line_start), line in zip(found, lines, strict=True):
        read += line
        assert prompt == encode(tokenizer, [*turns[:2], {"role": "user", "content": read}])
        assert tokenizer.decode(prompt[line_start:]) == f"{line}<|im_end|>\n<|im_start|>assistant\n"
    assert found[-1][0] == ids


def test_lines_without_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = deepcopy(tokenizer)
    plain.chat_template = None
    assert template_closing(plain) == []
    ids = encode(plain, "One\nTwo\n")
    found = request_lines(ids, 0, [], newline_ids(plain))
    assert [(plain.decode(prompt), start) for prompt, start in found] == [
        ("One\n", 0),
        ("One\nTwo\n", 4),
    ]


def test_newlines_of_a_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    assert [tokenizer.decode([i]) for i in newline_ids(tokenizer)] == ["\n"]


def test_pad_left() -> None:
    ids, mask = pad_left([[5, 6, 7], [8]], pad=1)
    assert ids.tolist() == [[5, 6, 7], [1, 1, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_without_a_template_there_is_no_opening(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = deepcopy(tokenizer)
    plain.chat_template = None
    assert template_opening(plain) == []
    assert plain.decode(encode(plain, "Hi")) == "Hi"


def test_an_answered_prompt_ends_with_the_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode_answered(tokenizer, "Hi", "Yes")
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[-4:-1]) == "Yes"
    assert ids == [*encode(tokenizer, "Hi"), *encode_answer(tokenizer, "Yes")]


def test_an_answer_has_no_end_where_the_base_has_none(tokenizer: PreTrainedTokenizerFast) -> None:
    endless = deepcopy(tokenizer)
    endless.eos_token = None
    assert endless.decode(encode_answer(endless, "Yes")) == "Yes"


@pytest.mark.parametrize(
    ("one", "other", "length"),
    [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2], [1, 3], 1), ([1], [1, 2], 1)],
)
def test_shared_length(one: list[int], other: list[int], length: int) -> None:
    assert shared_length(one, other) == length


def test_an_empty_prompt_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="empty"):
        encode(tokenizer, "  ")
