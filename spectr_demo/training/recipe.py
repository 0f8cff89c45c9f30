"""The recipe that made the shipped experts: QLoRA on one task, a held-out score, a PEFT folder.

LoRA (Hu et al. 2021, arXiv 2106.09685) of rank 8 on every linear layer of the decoder, trained on
top of the 4-bit base that will be served (QLoRA, Dettmers et al. 2023, arXiv 2305.14314). The loss
is on the answer only. The result is an ordinary PEFT folder with a model card.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from spectr_demo.base.loading import EMBEDDED_ID, load_base, read_base_config
from spectr_demo.config import WORKPLACE, base_from_environment, cache_dir
from spectr_demo.evaluation.heldout import Score, generate_answers, score_answers
from spectr_demo.evaluation.tasks import SPLIT_SEED, Example, Split, Task
from spectr_demo.evaluation.user_file import find_task, is_file
from spectr_demo.training.card import model_card
from spectr_demo.training.cost import estimate_training

ADAPTER_FILE = "adapter_model.safetensors"
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORED = -100
# For the estimate of a run only.
CHARACTERS_PER_TOKEN, TEMPLATE_TOKENS = 3.0, 30


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one training run.

    steps: optimiser steps. epochs: passes over the training examples; given, they replace the
    steps. warmup_fraction: share of the steps in which the learning rate rises;
    then it decays linearly to 0.
    """

    steps: int = 300
    epochs: int | None = None
    batch_size: int = 8
    learning_rate: float = 5e-4
    warmup_fraction: float = 0.06
    rank: int = 8
    alpha: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        offenders = [
            f"{name}={value}"
            for name, value in asdict(self).items()
            if name not in ("seed", "warmup_fraction") and value is not None and value <= 0
        ]
        if offenders:
            raise ValueError(
                f"recipe: {', '.join(offenders)}; these must be positive; pass larger values"
            )

    def num_steps(self, num_examples: int) -> int:
        """Optimiser steps on so many training examples."""
        if self.epochs is None:
            return self.steps
        return math.ceil(self.epochs * num_examples / self.batch_size)

    def to_json(self) -> dict[str, Any]:
        """The settings that count: steps or epochs, not both."""
        unused = "epochs" if self.epochs is None else "steps"
        return {name: value for name, value in asdict(self).items() if name != unused}


# Rank 8, alpha 16 and batches of 8 are the default's too (SpectR, arXiv 2504.03454).
PAPER_RECIPE = Recipe(epochs=1, learning_rate=1e-4)
RECIPES = {"default": Recipe(), "paper": PAPER_RECIPE}


class AnswerDataset(Dataset[dict[str, list[int]]]):
    """Tokenized examples: `input_ids` of prompt and answer, `labels` IGNORED on the prompt."""

    def __init__(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> None:
        self.rows = [encode(example, tokenizer) for example in examples]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def encode(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Token ids of one example with the base's chat template; the end token is learned too."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": example.prompt}], tokenize=False, add_generation_prompt=True
    )
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
    answer_ids = [*answer_ids, tokenizer.eos_token_id]
    return {
        "input_ids": prompt_ids + answer_ids,
        "labels": [IGNORED] * len(prompt_ids) + answer_ids,
    }


def collate(rows: Sequence[dict[str, list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad on the left, so that all answers end in the last column.

    Returns input_ids, attention_mask and labels, each (R, T) int64. Left padding lets the loss
    ask the model for the last positions only (see AnswerTrainer).
    """
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([[fill] * (width - len(row[key])) + row[key] for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(width)[None] >= width - lengths[:, None]).long()
    return {
        "input_ids": padded("input_ids", pad_token_id),
        "attention_mask": mask,
        "labels": padded("labels", IGNORED),
    }


class AnswerTrainer(Trainer):
    """Trainer whose loss computes logits for the answers only.

    The vocabulary is a fifth of the cost of a SmolLM2-135M step, and prompts need none of it.
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


def train(
    name: str,
    *,
    base: str | None = None,
    output_dir: Path | None = None,
    recipe: Recipe | None = None,
    num_eval: int = 200,
    overwrite: bool = False,
) -> Path:
    """Train, score and save the expert `name`; return its folder.

    name: a task that `get_task` finds, or a file of your own, see `user_file`. base: Hub id or
    folder, default the embedded base. output_dir: default `expert_folder(name)`. num_eval: held-out
    examples to answer; of the project's tasks, half of them with wordings never seen in training.
    A run that was interrupted continues from its last checkpoint in the cache folder.
    Raises ValueError (unknown task, unsound file, bad settings), FileExistsError (a finished expert
    is there and `overwrite` is false), ModuleNotFoundError (the task's packages) or OSError
    (unwritable folder), all before any training.
    """
    recipe = recipe or Recipe()
    output_dir = output_dir or expert_folder(name, base)
    task = check(name, output_dir, overwrite)
    split = task.build(SPLIT_SEED)
    base = base or base_from_environment()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if base is not None:  # said before gigabytes are fetched
        _say_cost(read_base_config(base), split, recipe, device)
    # Where a CPU multiplies by packed weights, in bfloat16, gradients through them are wrong.
    loaded = load_base(base, dtype=torch.float32 if device.type == "cpu" else None)
    if base is None:
        _say_cost(loaded.model.config, split, recipe, device)
    tokenizer = loaded.tokenizer

    # peft takes seconds to import, and nothing above needs it.
    from peft import LoraConfig, get_peft_model

    set_seed(recipe.seed)
    model = get_peft_model(
        loaded.model,
        LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            target_modules=TARGET_MODULES,
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        ),
    )
    # The folder of a run with exactly these settings on exactly these data.
    data = [[example.prompt, example.answer] for example in split.train]
    settings = json.dumps([task.name, loaded.fingerprint, recipe.to_json(), data])
    run = f"{task.name}-{hashlib.sha256(settings.encode()).hexdigest()[:10]}"
    checkpoint_dir = cache_dir() / "training" / run
    train_seconds = _fit(model, tokenizer, split, recipe, checkpoint_dir)

    # What is scored is what is shipped: the weights after rounding to 16 bits.
    lora = [p for p in model.parameters() if p.requires_grad]
    for parameter in lora:
        parameter.data = parameter.data.half().to(parameter.dtype)
    scores = _evaluate(model, tokenizer, task, split, num_eval)
    for parameter in lora:
        parameter.data = parameter.data.half()
    base_id = str(loaded.model.name_or_path)
    command = " ".join(
        ["python -m spectr_demo train", shlex.quote(name), *_options(base_id, recipe)]
    )
    device_name = _device_name(device)
    record = _record(task, command, base_id, split, recipe, scores, train_seconds, device_name)
    _save(model, record, model_card(task, record), output_dir)
    shutil.rmtree(checkpoint_dir)
    return output_dir


def expert_name(name: str) -> str:
    """What the expert of a task, or of a user's file, is called."""
    return Path(name).stem if is_file(name) else name


def expert_folder(name: str, base: str | None = None) -> Path:
    """Where an expert goes by default: to the shipped ones, or `experts/<base>/<name>` here if it
    is another base's, or a user's file's."""
    base = base or base_from_environment() or EMBEDDED_ID
    if base == EMBEDDED_ID and not is_file(name):
        return WORKPLACE / "assets" / "experts" / name
    return Path("experts") / Path(base).name / expert_name(name)


def is_finished(folder: Path) -> bool:
    """Whether the folder holds an expert that was trained to its end."""
    return (folder / ADAPTER_FILE).exists()


def _say_cost(config: PreTrainedConfig, split: Split, recipe: Recipe, device: torch.device) -> None:
    """Print what the run will take; tokens are counted as text, before any tokenizer is there."""
    prompts = [
        len(example.prompt) / CHARACTERS_PER_TOKEN + TEMPLATE_TOKENS for example in split.train
    ]
    answers = [len(example.answer) / CHARACTERS_PER_TOKEN + 1 for example in split.train]
    num = len(split.train)
    cost = estimate_training(
        config,
        rank=recipe.rank,
        tokens_per_step=round(recipe.batch_size * (sum(prompts) + sum(answers)) / num),
        answer_tokens_per_step=round(recipe.batch_size * sum(answers) / num),
        num_steps=recipe.num_steps(num),
        device=device,
    )
    print(f"Training needs: {cost}", file=sys.stderr)


def check(name: str, output_dir: Path, overwrite: bool) -> Task:
    """The task, once everything it needs is there; raises what `train` raises before training."""
    task = find_task(name)
    task.check_packages()
    _check_output(output_dir, overwrite)
    return task


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "CPU"


def _check_output(output_dir: Path, overwrite: bool) -> None:
    if is_finished(output_dir) and not overwrite:
        raise FileExistsError(
            f"output folder {output_dir}: holds a finished expert; a folder without "
            f"{ADAPTER_FILE} was needed; choose another folder or pass overwrite"
        )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"output folder {output_dir}: cannot be written ({error.strerror}); a writable folder "
            "was needed; choose another one"
        ) from error


def _fit(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    recipe: Recipe,
    checkpoint_dir: Path,
) -> float | None:
    """Train `model` in place; return the seconds, or None for a run that was interrupted."""
    on_cpu = model.device.type == "cpu"
    num_steps = recipe.num_steps(len(split.train))
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
        train_dataset=AnswerDataset(split.train, tokenizer),
        data_collator=lambda rows: collate(rows, tokenizer.pad_token_id),
    )
    last = get_last_checkpoint(str(checkpoint_dir)) if checkpoint_dir.is_dir() else None
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=last)
    return None if last else time.monotonic() - started


def _evaluate(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, split: Split, num_eval: int
) -> dict[str, dict[str, Score]]:
    """Scores of the base, of the task's baselines, and of the expert, on the same examples."""
    model.eval()
    examples = split.heldout[:num_eval]
    prompts = [example.prompt for example in examples]
    with model.disable_adapter():
        base = generate_answers(
            model, tokenizer, prompts, max_new_tokens=task.max_new_tokens, description="base"
        )
    baselines = {who: baseline(split.train, examples) for who, baseline in task.baselines.items()}
    expert = generate_answers(
        model, tokenizer, prompts, max_new_tokens=task.max_new_tokens, description=task.name
    )
    return {
        who: score_answers(task, examples, answers)
        for who, answers in {"base": base, **baselines, "expert": expert}.items()
    }


def _record(
    task: Task,
    command: str,
    base_id: str,
    split: Split,
    recipe: Recipe,
    scores: dict[str, dict[str, Score]],
    train_seconds: float | None,
    device: str,
) -> dict[str, Any]:
    """What `scores.json` holds: enough to write the card again."""
    example = split.heldout[0]
    return {
        "task": task.name,
        "base": base_id,
        "metric": task.metric,
        "command": command,
        "recipe": recipe.to_json(),
        "num_train": len(split.train),
        "num_heldout": len(split.heldout),
        "example": {"prompt": example.prompt, "answer": example.answer},
        "train_seconds": train_seconds and round(train_seconds),
        "device": device,
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("torch", "transformers", "peft", "bitsandbytes")
        },
        "scores": {
            who: {group: score.to_dict() for group, score in groups.items()}
            for who, groups in scores.items()
        },
    }


def _options(base_id: str, recipe: Recipe) -> list[str]:
    """The options of `train` that give this base and recipe."""
    # No option changes the learning rate: it tells which preset this was.
    rates = {preset.learning_rate: name for name, preset in RECIPES.items()}
    name = rates.get(recipe.learning_rate, "default")
    preset = RECIPES[name].to_json()
    return [
        *([] if base_id == EMBEDDED_ID else [f"--base {base_id}"]),
        *([] if name == "default" else [f"--recipe {name}"]),
        *(
            f"--{key.replace('_', '-')} {value}"
            for key, value in recipe.to_json().items()
            if preset.get(key) != value
        ),
    ]


def _save(model: Any, record: dict[str, Any], card: str, output_dir: Path) -> None:
    """Write the PEFT folder; the adapter file comes last, so that its presence means finished."""
    partial = output_dir.with_name(f".{output_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    # LoRA only: otherwise PEFT asks the Hub whether the vocabulary was resized.
    model.save_pretrained(partial, save_embedding_layers=False)
    (partial / "scores.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (partial / "README.md").write_text(card, encoding="utf-8")
    for file in sorted(partial.iterdir(), key=lambda f: f.name == ADAPTER_FILE):
        os.replace(file, output_dir / file.name)
    partial.rmdir()
