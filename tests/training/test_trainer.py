"""The loss on own answers alone, taken piece by piece, and a run on a base without a template."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from spectr_demo.evaluation.messages import Request, Style
from spectr_demo.training import trainer
from spectr_demo.training.dataset import collate
from spectr_demo.training.lora import with_lora
from spectr_demo.training.messages import IGNORED, ONE, RowEncoder, own_request
from spectr_demo.training.recipe import Recipe
from spectr_demo.training.trainer import answer_loss, fit
from tests.training.test_dataset import FOREIGN, example

EXAMPLES = [example("say ab", "ab"), example("a longer one", "c"), example("and d", "d")]


def batch_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    encoder = RowEncoder(tokenizer)
    requests = [own_request(each) for each in EXAMPLES]
    rows = [encoder([request], ONE) for request in requests]
    rows.append(encoder([requests[0], FOREIGN[0]], Style(format="lines")))
    return collate(rows, 1)


def test_the_loss_is_the_models_own(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    batch = batch_of(tokenizer)
    num = int((batch["labels"] != IGNORED).sum())
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    loss = answer_loss(llama, batch) / num
    assert loss.item() == pytest.approx(llama(**inputs).loss.item(), rel=1e-5)


def lora_run(
    tokenizer: PreTrainedTokenizerFast, llama: LlamaForCausalLM, folder: Path, **changes: Any
) -> torch.Tensor:
    """All weights of a LoRA after two steps."""
    recipe = Recipe(steps=2, batch_size=8, seed=0, **changes)
    model = with_lora(llama, recipe)
    fit(model, tokenizer, EXAMPLES, FOREIGN, recipe, folder)
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def test_a_step_does_not_depend_on_the_pieces(
    tokenizer: PreTrainedTokenizerFast,
    llama: LlamaForCausalLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trainer, "has_avx512bf16", lambda: False)
    found = []
    for most_tokens in (10_000, 100):
        monkeypatch.setattr(trainer, "PIECE_TOKENS", most_tokens)
        found.append(lora_run(tokenizer, deepcopy(llama), tmp_path / str(most_tokens)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "change", [{"learning_rate": 1e-4}, {"foreign_share": 0.0}, {"opening_off": 0.0}]
)
def test_each_setting_counts(
    change: dict[str, float],
    tokenizer: PreTrainedTokenizerFast,
    llama: LlamaForCausalLM,
    tmp_path: Path,
) -> None:
    one = lora_run(tokenizer, deepcopy(llama), tmp_path / "one")
    other = lora_run(tokenizer, deepcopy(llama), tmp_path / "other", **change)
    assert not torch.allclose(one, other, atol=1e-5)


def test_a_base_without_template_end_and_padding_tokens_is_trained(
    tmp_path: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = deepcopy(tokenizer)
    plain.chat_template = plain.eos_token = plain.pad_token = None
    head = llama.lm_head.weight.requires_grad_(True)
    before = head.detach().clone()
    recipe = Recipe(steps=2, batch_size=8, seed=0)
    seconds = fit(llama, plain, EXAMPLES, FOREIGN, recipe, tmp_path / "run")
    assert seconds is not None and seconds > 0
    assert not torch.equal(head, before)


def test_foreign_answers_are_outside_the_loss(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    encoder = RowEncoder(tokenizer)
    own = own_request(EXAMPLES[0])
    losses = []
    for answer in ("Me.", "No"):  # after the own line, which cannot read them
        other = Request(text="Who?", answer=answer, keeps_case=False, is_own=False)
        batch = collate([encoder([own, other], Style(format="lines"))], 1)
        losses.append(answer_loss(llama, batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
