"""Greedy generation on the tiny model."""

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from spectr_demo.evaluation.generation import generate_answers


def test_answers_come_back_in_order_and_do_not_depend_on_the_batch(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = ["a longer question about ships", "hi", "three words here", "x"]
    together = generate_answers(llama, tokenizer, prompts, max_new_tokens=6, batch_size=3)
    alone = [generate_answers(llama, tokenizer, [p], max_new_tokens=6)[0] for p in prompts]
    assert together == alone
    assert len(set(alone)) > 1


def test_generation_follows_the_weights(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = generate_answers(llama, tokenizer, ["hello there"], max_new_tokens=6)
    with torch.no_grad():
        llama.lm_head.weight.neg_()
    assert generate_answers(llama, tokenizer, ["hello there"], max_new_tokens=6) != before
