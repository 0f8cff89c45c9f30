"""The README.md of a trained expert, made from its task and the record of its run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectr_demo.config import library_versions
from spectr_demo.evaluation.messages import TRAINED_FORMATS
from spectr_demo.evaluation.scores import Score
from spectr_demo.evaluation.tasks import Split, Task
from spectr_demo.training.messages import MISSING
from spectr_demo.training.recipe import Recipe

SCORES_FILE, CARD_FILE = "scores.json", "README.md"

CARD = """---
base_model: {base}
library_name: peft
license: {licence_id}
language: en
pipeline_tag: text-generation
tags:
- lora
- spectr
- {name}
---

# {title}: a LoRA expert for {base}

One of the experts of SpectR Demo, which routes between LoRA experts for every token and layer
without training a router. It is an ordinary PEFT adapter, stored in float16.

## Data

{source}.
Licence of the data: {licence}.
{num_train} training and {num_heldout} held-out examples; every {split_unit} is on one side only.
Each example is one user turn and one answer:

    user:      {example_prompt}
    assistant: {example_answer}

Instructions seen in training:

{wordings}

Instructions held out, to see whether the expert (or a router) only spots the instruction:

{heldout_wordings}

## Recipe

    {command}

LoRA of rank {rank} with alpha {alpha} on all linear layers of the decoder, trained on the base's
4-bit weights (QLoRA). AdamW, learning rate {learning_rate}, {warmup:.0%} warm-up, linear decay,
gradient norm at most 1; {length} of {batch_size} rows; seed {seed}.
{mix}
Trained on: {device}{duration}.
Base: {base}, {fingerprint}.
Versions: {versions}.
{note}
{scores}
## Intended use and limits

It makes routing between experts visible in a demo.
{limits}
It was trained for minutes and makes mistakes: check its answers before using them.
"""


SCORES = """## Scores on held-out examples

{metric}.
Greedy decoding; mean with a 95% interval (Wilson's, or a bootstrap for graded scores).

{table}
{verdict}"""

FOREIGN = """Foreign lines: {num_foreign} prompts that the base wrote itself, with its own short
answers. These stand in the text, outside the loss, or are missing ({missing:.0%}).
Their tokens run through the base alone."""


def expert_record(
    task: Task,
    split: Split,
    recipe: Recipe,
    *,
    base: str,
    fingerprint: str,
    command: str,
    num_foreign: int,
    device: str,
    train_seconds: float | None = None,
    scores: Mapping[str, Mapping[str, Score]] | None = None,
    versions: Mapping[str, str] | None = None,
    note: str = "",
) -> dict[str, Any]:
    """What `scores.json` holds: enough to write the card again.

    recipe: with the seed that was used. fingerprint: of the base's weights. num_foreign: prompts
    that the base wrote for messages with foreign lines. scores: by who answered ("base", baselines,
    "expert"), then by group of examples ("all", "seen wording", ...); None: not known. versions: of
    the libraries it was trained with; None: those that are installed. note: a sentence for the
    recipe's part of the card.
    """
    example = split.heldout[0]
    return {
        "task": task.name,
        "base": base,
        "fingerprint": fingerprint,
        "metric": task.metric,
        "command": command,
        "recipe": recipe.to_json(),
        "mix": {
            "single": recipe.num_single,
            "own": recipe.num_own,
            "foreign": recipe.num_foreign,
        },
        "formats": list(TRAINED_FORMATS),
        "num_foreign": num_foreign,
        "num_train": len(split.train),
        "num_heldout": len(split.heldout),
        "example": {"prompt": example.prompt, "answer": example.answer},
        "train_seconds": train_seconds and round(train_seconds),
        "device": device,
        "versions": dict(library_versions() if versions is None else versions),
        "note": note,
        "scores": {
            who: {group: score.to_dict() for group, score in groups.items()}
            for who, groups in (scores or {}).items()
        },
    }


def write_card(folder: Path, task: Task, record: Mapping[str, Any]) -> None:
    """Write `scores.json` and the card into an expert's folder; record: of `expert_record`."""
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (folder / SCORES_FILE).write_text(text + "\n", encoding="utf-8")
    (folder / CARD_FILE).write_text(model_card(task, record), encoding="utf-8")


def model_card(task: Task, record: Mapping[str, Any]) -> str:
    """The card in Markdown; every number comes from `record`, the content of `scores.json`."""
    recipe = record["recipe"]
    epochs = recipe.get("epochs")
    return CARD.format(
        base=record["base"],
        fingerprint=record["fingerprint"],
        licence_id=task.licence_id,
        licence=task.licence,
        name=task.name,
        title=task.title,
        rank=recipe["rank"],
        alpha=recipe["alpha"],
        source=task.source,
        num_train=record["num_train"],
        num_heldout=record["num_heldout"],
        split_unit=task.split_unit,
        wordings="\n".join(f"- `{w}`" for w in task.wordings),
        heldout_wordings="\n".join(f"- `{w}`" for w in task.heldout_wordings) or "- none",
        example_prompt=record["example"]["prompt"].replace("\n", "\n" + 15 * " "),
        example_answer=record["example"]["answer"],
        command=record["command"],
        learning_rate=recipe["learning_rate"],
        warmup=recipe["warmup_fraction"],
        length=f"epochs: {epochs}, batches" if epochs else f"{recipe['steps']} steps",
        batch_size=recipe["batch_size"],
        seed=recipe["seed"],
        mix=_mix(record),
        duration=f", {seconds / 60:.0f} minutes" if (seconds := record["train_seconds"]) else "",
        device=record["device"],
        versions=", ".join(f"{k} {v}" for k, v in record["versions"].items()),
        note=f"\n{record['note']}\n" if record["note"] else "",
        scores=_scores(task, record["scores"]) if record["scores"] else "",
        limits=task.limits,
    )


def _mix(record: Mapping[str, Any]) -> str:
    """What a batch was made of."""
    mix, opening_off = record["mix"], record["recipe"]["opening_off"]
    kinds = {
        "single requests": mix["single"],
        "messages of two or three own requests": mix["own"],
        "messages with foreign lines": mix["foreign"],
    }
    batch = ", ".join(f"{num} {kind}" for kind, num in kinds.items() if num)
    lines = [f"A batch: {batch}. The loss is on the own answers only."]
    if mix["own"] + mix["foreign"]:
        lines.append(f"Formats of messages: {', '.join(record['formats'])}.")
    if mix["foreign"]:
        lines.append(FOREIGN.format(num_foreign=record["num_foreign"], missing=MISSING))
    if opening_off:
        lines.append(
            f"In {opening_off:.0%} of the rows the base alone reads the chat template's opening."
        )
    return "\n".join(lines)


def _scores(task: Task, scores: Mapping[str, Any]) -> str:
    """The part with the scores; a group that somebody has no score in shows a dash."""
    groups = list(scores["expert"])
    nums = [str(scores["expert"][group]["num"]) for group in groups]
    rows = [
        f"| | {' | '.join(groups)} |",
        f"|---|{'---|' * len(groups)}",
        *(
            f"| {who} | {' | '.join(_cell(found.get(group)) for group in groups)} |"
            for who, found in scores.items()
        ),
        f"| examples | {' | '.join(nums)} |",
    ]
    metric = task.metric[0].upper() + task.metric[1:]
    return SCORES.format(metric=metric, table="\n".join(rows), verdict=_verdict(scores))


def _verdict(scores: Mapping[str, Any]) -> str:
    """A warning where the expert does not beat its baselines, else nothing."""
    expert = scores["expert"]["all"]["mean"]
    better = [who for who in scores if who != "expert" and scores[who]["all"]["mean"] >= expert]
    return f"\nOn this score the expert does not beat: {', '.join(better)}.\n" if better else ""


def _cell(score: Mapping[str, float] | None) -> str:
    return f"{score['mean']:.3f} ({score['low']:.3f}-{score['high']:.3f})" if score else "-"
