"""The training run itself: transformers' Trainer, with a loss on the own answers only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import has_avx512bf16
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from spectr_demo.evaluation.messages import Request
from spectr_demo.evaluation.tasks import Example
from spectr_demo.training.dataset import MessageDataset, collate, pieces_of
from spectr_demo.training.lora import adapter_on
from spectr_demo.training.messages import IGNORED
from spectr_demo.training.recipe import Recipe

# Of one pass, padding included: it bounds the memory whatever the batch is.
PIECE_TOKENS = 1024


def answer_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The cross-entropy of all labels of a batch of `collate`, summed, float32.

    Logits are computed for the answers only. The vocabulary is a fifth of the cost of a
    SmolLM2-135M step, and prompts need none of it.
    """
    labels = batch["labels"]
    is_labelled = (labels != IGNORED).any(dim=0)
    longest = len(is_labelled) - int(is_labelled.int().argmax())
    with adapter_on(model, batch["is_on"]):
        outputs = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            logits_to_keep=longest + 1,
        )
    # The logits at position t predict the token at t + 1.
    logits = outputs.logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1),
        labels[:, -longest:].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )


class AnswerTrainer(Trainer):
    """Trainer that takes a batch piece by piece; its loss is the mean over the batch's labels."""

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        num_labels = (inputs["labels"] != IGNORED).sum()
        total = torch.zeros((), device=num_labels.device)
        for piece in pieces_of(inputs, PIECE_TOKENS):
            with self.compute_loss_context_manager():
                loss = answer_loss(model, piece) / num_labels
            self.accelerator.backward(loss)
            total += loss.detach()
        return total


def fit(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    foreign: Sequence[Request],
    recipe: Recipe,
    checkpoint_dir: Path,
) -> float | None:
    """Train `model` in place, from the last checkpoint in `checkpoint_dir` if there is one.

    foreign: requests for messages with foreign lines. Returns the seconds, or None for a run that
    was interrupted before.
    """
    on_cpu = model.device.type == "cpu"
    num_steps = recipe.num_steps(len(examples))
    arguments = TrainingArguments(
        output_dir=str(checkpoint_dir),
        max_steps=num_steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=max(1, round(recipe.warmup_fraction * num_steps)),
        train_sampling_strategy="sequential",  # the rows are in order
        max_grad_norm=1.0,
        seed=recipe.seed or 0,
        use_cpu=on_cpu,
        # Weights stay in float32 on a CPU, and products run in bfloat16 where it has those.
        bf16=on_cpu and has_avx512bf16(),
        dataloader_pin_memory=not on_cpu,
        logging_steps=25,
        save_steps=50,
        save_total_limit=1,
        report_to="none",
        remove_unused_columns=False,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else the batch is multiplied and the model copied to every GPU
    trainer = AnswerTrainer(
        model=model,
        args=arguments,
        train_dataset=MessageDataset(examples, foreign, tokenizer, recipe),
        data_collator=lambda rows: collate(rows, tokenizer.pad_token_id or 0),
    )
    last = get_last_checkpoint(str(checkpoint_dir)) if checkpoint_dir.is_dir() else None
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=last)
    return None if last else time.monotonic() - started
