"""Train one expert: a task's examples, the recipe, a held-out score, a PEFT folder with a card.

`train` is the whole of it. The result is an ordinary PEFT folder.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from spectr_demo.base.embedded import EMBEDDED_ID
from spectr_demo.base.files import publish, scratch_dir
from spectr_demo.base.loading import LoadedBase, load_base, read_base_config
from spectr_demo.config import WORKPLACE, base_from_environment, cache_dir
from spectr_demo.evaluation.generation import generate_answers
from spectr_demo.evaluation.scores import Score, score_answers
from spectr_demo.evaluation.tasks import SPLIT_SEED, Split, Task, find_task
from spectr_demo.evaluation.tasks.user_file import is_file
from spectr_demo.training.card import expert_record, write_card
from spectr_demo.training.cost import estimate_training
from spectr_demo.training.foreign import foreign_requests
from spectr_demo.training.lora import with_lora
from spectr_demo.training.messages import MISSING, PATTERNS, fits_a_message, own_request
from spectr_demo.training.recipe import RECIPES, Recipe
from spectr_demo.training.trainer import PIECE_TOKENS, fit

ADAPTER_FILE = "adapter_model.safetensors"
# For the estimate of a run only.
CHARACTERS_PER_TOKEN, TEMPLATE_TOKENS = 3.0, 30
OWN_REQUESTS = 7 / 3  # of a message without foreign lines, on average
FOREIGN_TOKENS, FOREIGN_ANSWER_TOKENS = 18, 15  # of a foreign line


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
    output_dir = output_dir or expert_folder(name, base)
    task = check(name, output_dir, overwrite)
    split = task.build(SPLIT_SEED)
    recipe = _feasible((recipe or Recipe()).for_expert(task.name), split)
    base = base or base_from_environment()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if base is not None:  # said before gigabytes are fetched
        _say_cost(read_base_config(base), split, recipe, device)
    # Where a CPU multiplies by packed weights, in bfloat16, gradients through them are wrong.
    loaded = load_base(base, dtype=torch.float32 if device.type == "cpu" else None)
    if base is None:
        _say_cost(loaded.model.config, split, recipe, device)

    foreign = foreign_requests(loaded) if recipe.num_foreign else []
    if recipe.num_foreign and not foreign:  # the base answers nothing
        own_share = recipe.own_share + recipe.foreign_share
        recipe = replace(recipe, own_share=own_share, foreign_share=0.0)
    model = with_lora(loaded.model, recipe)
    checkpoint_dir = _checkpoint_dir(task, loaded, recipe, split)
    train_seconds = fit(model, loaded.tokenizer, split.train, foreign, recipe, checkpoint_dir)

    # What is scored is what is shipped: the weights after rounding to 16 bits.
    lora = [p for p in model.parameters() if p.requires_grad]
    for parameter in lora:
        parameter.data = parameter.data.half().to(parameter.dtype)
    scores = _evaluate(model, loaded.tokenizer, task, split, num_eval)
    for parameter in lora:
        parameter.data = parameter.data.half()
    base_id = str(loaded.model.name_or_path)
    options = _options(base_id, task.name, recipe)
    record = expert_record(
        task,
        split,
        recipe,
        base=base_id,
        fingerprint=loaded.fingerprint,
        command=" ".join(["python -m spectr_demo train", shlex.quote(name), *options]),
        num_foreign=len(foreign),
        device=_device_name(device),
        train_seconds=train_seconds,
        scores=scores,
    )
    _save(model, task, record, output_dir)
    shutil.rmtree(checkpoint_dir)
    return output_dir


def _feasible(recipe: Recipe, split: Split) -> Recipe:
    """The recipe, without messages if no example fits one."""
    if any(fits_a_message(own_request(example)) for example in split.train):
        return recipe
    return replace(recipe, own_share=0.0, foreign_share=0.0)


def _checkpoint_dir(task: Task, loaded: LoadedBase, recipe: Recipe, split: Split) -> Path:
    """The cache folder of a run with exactly these settings on exactly these data."""
    data = [[example.prompt, example.answer] for example in split.train]
    settings = json.dumps([task.name, loaded.fingerprint, recipe.to_json(), data])
    run = f"{task.name}-{hashlib.sha256(settings.encode()).hexdigest()[:10]}"
    return cache_dir() / "training" / run


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
    num = len(split.train)
    prompt = sum(len(e.prompt) for e in split.train) / num / CHARACTERS_PER_TOKEN
    answer = sum(len(e.answer) for e in split.train) / num / CHARACTERS_PER_TOKEN + 1
    mixed = "".join(PATTERNS)
    num_own = recipe.num_single + OWN_REQUESTS * recipe.num_own
    num_own += recipe.num_foreign * mixed.count("O") / len(PATTERNS)
    num_foreign = recipe.num_foreign * mixed.count("F") / len(PATTERNS)
    answers = num_own * answer + num_foreign * (1 - MISSING) * FOREIGN_ANSWER_TOKENS
    prompts = num_own * prompt + num_foreign * FOREIGN_TOKENS + recipe.batch_size * TEMPLATE_TOKENS
    cost = estimate_training(
        config,
        rank=recipe.rank,
        tokens_per_step=round(prompts + answers),
        answer_tokens_per_step=round(answers),
        tokens_at_once=max(PIECE_TOKENS, round(prompt + answer) + TEMPLATE_TOKENS),
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


def _options(base_id: str, name: str, recipe: Recipe) -> list[str]:
    """The options of `train` that give this base and recipe to the expert of this name."""
    # No option changes the learning rate: it tells which preset this was.
    rates = {preset.learning_rate: key for key, preset in RECIPES.items()}
    preset_name = rates.get(recipe.learning_rate, "default")
    preset = RECIPES[preset_name].for_expert(name).to_json()
    return [
        *([] if base_id == EMBEDDED_ID else [f"--base {base_id}"]),
        *([] if preset_name == "default" else [f"--recipe {preset_name}"]),
        *(
            f"--{key.replace('_', '-')} {value}"
            for key, value in recipe.to_json().items()
            if preset.get(key) != value and not key.endswith("_share")  # they follow from the data
        ),
    ]


def _save(model: Any, task: Task, record: dict[str, Any], output_dir: Path) -> None:
    """Write the PEFT folder. The adapter file comes last, so its presence means finished."""
    with scratch_dir(output_dir.parent) as scratch:
        # LoRA only: otherwise PEFT asks the Hub whether the vocabulary was resized.
        model.save_pretrained(scratch, save_embedding_layers=False)
        write_card(scratch, task, record)
        for file in sorted(scratch.iterdir(), key=lambda f: f.name == ADAPTER_FILE):
            publish(file, output_dir / file.name)
