"""Prompts: the template around them, and what every prompt opens with."""

from copy import deepcopy

import pytest
from transformers import PreTrainedTokenizerFast

from spectr_demo.prompts import encode, encode_answered, shared_length, template_opening


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


def test_without_a_template_there_is_no_opening(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = deepcopy(tokenizer)
    plain.chat_template = None
    assert template_opening(plain) == []
    assert plain.decode(encode(plain, "Hi")) == "Hi"


def test_an_answered_prompt_ends_with_the_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode_answered(tokenizer, "Hi", "Yes")
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[-4:-1]) == "Yes"


@pytest.mark.parametrize(
    ("one", "other", "length"),
    [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2], [1, 3], 1), ([1], [1, 2], 1)],
)
def test_shared_length(one: list[int], other: list[int], length: int) -> None:
    assert shared_length(one, other) == length


def test_an_empty_prompt_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="empty"):
        encode(tokenizer, "  ")
