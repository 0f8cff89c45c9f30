"""What the loss is on: labels of answers, masked prompts, padding on the left."""

from copy import deepcopy

from transformers import PreTrainedTokenizerFast

from spectr_demo.base.prompts import encode_answered
from spectr_demo.evaluation.tasks import Example
from spectr_demo.training.dataset import IGNORED, AnswerDataset, collate, labelled


def example(prompt: str, answer: str) -> Example:
    return Example(
        prompt=prompt, answer=answer, text=prompt, key="k", wording="w", is_heldout_wording=False
    )


def test_loss_is_on_the_answer_and_its_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    row = labelled(example("say ab", "ab"), tokenizer)
    learned = [label for label in row["labels"] if label != IGNORED]
    assert tokenizer.decode(learned) == "ab<|im_end|>"
    assert tokenizer.decode(row["input_ids"]).endswith("<|im_start|>assistant\nab<|im_end|>")
    assert row["labels"][-3:] == row["input_ids"][-3:]


def test_a_base_without_a_chat_template_reads_plain_text(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    plain = deepcopy(tokenizer)
    plain.chat_template = None
    row = AnswerDataset([example("say ab", "ab")], plain)[0]
    assert plain.decode(row["input_ids"]) == "say abab<|im_end|>"
    assert row["labels"] == [IGNORED] * 6 + row["input_ids"][6:]


def test_the_ids_are_those_that_an_answered_prompt_has_everywhere(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids = labelled(example("say ab", "ab"), tokenizer)["input_ids"]
    assert ids == encode_answered(tokenizer, "say ab", "ab")


def test_collate_pads_on_the_left_and_masks_it() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [IGNORED, IGNORED, 7]},
        {"input_ids": [8, 9], "labels": [IGNORED, 9]},
    ]
    batch = collate(rows, pad_token_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [1, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7], [IGNORED, IGNORED, 9]]
