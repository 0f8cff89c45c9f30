"""The README.md of a trained expert, made from its task and the record of its run."""

from __future__ import annotations

from typing import Any

from spectr_demo.evaluation.tasks import Task

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
4-bit weights (QLoRA). AdamW, learning rate {learning_rate}, {warmup:.0%} warm-up, linear decay;
{length} of {batch_size} examples; loss on the answer only; seed {seed}.
Trained on: {device}{duration}.
Versions: {versions}.

## Scores on held-out examples

{metric}.
Greedy decoding; mean with a 95% interval (Wilson's, or a bootstrap for graded scores).

{scores}
{verdict}
## Intended use and limits

It makes routing between experts visible in a demo.
{limits}
It was trained for minutes and makes mistakes: check its answers before using them.
"""


def model_card(task: Task, record: dict[str, Any]) -> str:
    """The card in Markdown; every number comes from `record`, the content of `scores.json`."""
    recipe = record["recipe"]
    epochs = recipe.get("epochs")
    groups = list(record["scores"]["expert"])
    rows = [
        f"| | {' | '.join(groups)} |",
        f"|---|{'---|' * len(groups)}",
        *(
            f"| {who} | {' | '.join(_cell(scores[group]) for group in groups)} |"
            for who, scores in record["scores"].items()
        ),
        f"| examples | {' | '.join(str(record['scores']['expert'][g]['num']) for g in groups)} |",
    ]
    return CARD.format(
        base=record["base"],
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
        duration=f", {seconds / 60:.0f} minutes" if (seconds := record["train_seconds"]) else "",
        device=record["device"],
        versions=", ".join(f"{k} {v}" for k, v in record["versions"].items()),
        metric=task.metric[0].upper() + task.metric[1:],
        scores="\n".join(rows),
        verdict=_verdict(record["scores"]),
        limits=task.limits,
    )


def _verdict(scores: dict[str, Any]) -> str:
    """A warning where the expert does not beat its baselines, else nothing."""
    expert = scores["expert"]["all"]["mean"]
    better = [who for who in scores if who != "expert" and scores[who]["all"]["mean"] >= expert]
    return f"\nOn this score the expert does not beat: {', '.join(better)}.\n" if better else ""


def _cell(score: dict[str, float]) -> str:
    return f"{score['mean']:.3f} ({score['low']:.3f}-{score['high']:.3f})"
