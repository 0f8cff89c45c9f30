"""The training run itself: transformers' Trainer, with a loss on the answers only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from spectr_demo.evaluation.tasks import Example
from spectr_demo.training.dataset import IGNORED, AnswerDataset, collate
from spectr_demo.training.recipe import Recipe


class AnswerTrainer(Trainer):
    """Trainer whose loss computes logits for the answers only.

    The vocabulary is a fifth of the cost of a SmolLM2-135M step. Prompts need none of it.
    """

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        labels = inputs["labels"]
        longest = int((labels != IGNORED).sum(dim=1).max())
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            logits_to_keep=longest + 1,
        )
        # The logits at position t predict the token at t + 1.
        logits = outputs.logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, -longest:].flatten(), ignore_index=IGNORED
        )
        return (loss, outputs) if return_outputs else loss


def fit(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    recipe: Recipe,
    checkpoint_dir: Path,
) -> float | None:
    """Train `model` in place, from the last checkpoint in `checkpoint_dir` if there is one.

    Returns the seconds, or None for a run that was interrupted before.
    """
    on_cpu = model.device.type == "cpu"
    num_steps = recipe.num_steps(len(examples))
    trainer = AnswerTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(checkpoint_dir),
            max_steps=num_steps,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=max(1, round(recipe.warmup_fraction * num_steps)),
            train_sampling_strategy="group_by_length",
            max_grad_norm=1.0,
            seed=recipe.seed,
            use_cpu=on_cpu,
            dataloader_pin_memory=not on_cpu,
            logging_steps=25,
            save_steps=50,
            save_total_limit=1,
            report_to="none",
            remove_unused_columns=False,
        ),
        train_dataset=AnswerDataset(examples, tokenizer),
        data_collator=lambda rows: collate(rows, tokenizer.pad_token_id or 0),
    )
    last = get_last_checkpoint(str(checkpoint_dir)) if checkpoint_dir.is_dir() else None
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=last)
    return None if last else time.monotonic() - started
