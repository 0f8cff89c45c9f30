"""Foreign lines: what the base wrote, short, on one line."""

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from spectr_demo.base.prompts import encode
from spectr_demo.training import foreign
from spectr_demo.training.foreign import ANSWER_TOKENS, foreign_requests, pair, shorten
from tests.conftest import loaded_base


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Paris", "Paris"),
        ("It is Paris. It is a city.", "It is Paris."),
        ("It costs 3.50 dollars. Yes.", "It costs 3.50 dollars."),
        ("one two three four five six seven eight nine ten eleven", "one two three four five six "
         "seven eight nine ten"),
        ("First\nSecond", "First"),
        ("你好。我是", "你好。我是"),
        ("我很高兴。我是", "我很高兴。"),
        (" \n", ""),
    ],
)  # fmt: skip
def test_an_answer_is_cut_to_a_sentence_or_a_few_words(answer: str, expected: str) -> None:
    assert shorten(answer) == expected


def test_a_prompt_without_an_answer_is_left_out() -> None:
    (request,) = pair(["Hello", "Who?"], ["\n", "Me."])
    assert (request.text, request.answer, request.is_own) == ("Who?", "Me.", False)


def test_the_base_answers_its_own_prompts_greedily(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = loaded_base(llama, tokenizer)
    prompts = ["Hello there", "a\n b", "  ", "x" * 1000]
    monkeypatch.setattr(foreign, "generic_prompts", lambda base: prompts)
    requests = foreign_requests(base)
    assert {request.text for request in requests} <= {"Hello there", "a b"}
    ids = torch.tensor([encode(tokenizer, "Hello there")])
    output = llama.generate(ids, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=1)
    answer = shorten(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    assert answer == next((r.answer for r in requests if r.text == "Hello there"), "")

    monkeypatch.setattr(foreign, "generate_answers", None)  # the second time from the cache
    assert foreign_requests(base) == requests
    prompts.append("One more")
    with pytest.raises(TypeError):
        foreign_requests(base)
