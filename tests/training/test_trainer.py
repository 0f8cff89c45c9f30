"""The loss on answers alone, and a run on a base without a chat template."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from spectr_demo.training.dataset import collate, labelled
from spectr_demo.training.recipe import Recipe
from spectr_demo.training.trainer import AnswerTrainer, fit
from tests.training.test_dataset import example


def test_loss_equals_the_models_own(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [
        labelled(example("say ab", "ab"), tokenizer),
        labelled(example("a longer one", "c"), tokenizer),
    ]
    batch = collate(rows, tokenizer.pad_token_id)
    trainer = AnswerTrainer.__new__(AnswerTrainer)
    assert trainer.compute_loss(llama, batch).item() == pytest.approx(
        llama(**batch).loss.item(), rel=1e-5
    )


def test_a_base_without_template_end_and_padding_tokens_is_trained(
    tmp_path: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = deepcopy(tokenizer)
    plain.chat_template = plain.eos_token = plain.pad_token = None
    head = llama.lm_head.weight.requires_grad_(True)
    before = head.detach().clone()
    examples = [example("say ab", "ab"), example("a longer one", "c")]
    seconds = fit(llama, plain, examples, Recipe(steps=2, batch_size=2), tmp_path / "run")
    assert seconds is not None and seconds > 0
    assert not torch.equal(head, before)
