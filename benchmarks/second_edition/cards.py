"""Write README.md and scores.json of the shipped experts from what train.py and score.py found.

    python benchmarks/second_edition/cards.py RESULTS

RESULTS is what train.py wrote; score.py has to run first. The base's scores are those that a card
has already, on the same examples; where it has fewer, the base answers anew (a minute a task on a
CPU). The other baselines need no model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script

from benchmarks.second_edition.build import NUM_SINGLE, foreign_requests
from spectr_demo.base.embedded import EMBEDDED_ID, SMOLLM2_135M
from spectr_demo.base.loading import LoadedBase, load_base
from spectr_demo.config import ASSETS
from spectr_demo.evaluation.generation import generate_answers
from spectr_demo.evaluation.scores import Score, score_answers
from spectr_demo.evaluation.tasks import SPLIT_SEED, TASKS, Example, Split, Task
from spectr_demo.training.card import SCORES_FILE, expert_record, write_card
from spectr_demo.training.recipe import Recipe

HERE = Path(__file__).resolve().parent
NOTE = (
    "Ten experts were trained in one pass of the base, in {minutes:.0f} minutes together.\n"
    "Their single requests are a sample of at most {num_single} training examples.\n"
    "The same GPU gave the expert's answers; the base answered on a CPU.\n"
    "Own part of a message: messages of two requests of different domains, in five formats. The\n"
    "tokens of each part run through that part's expert, chosen by hand."
)
Scores = dict[str, Score]


@cache
def served_base() -> LoadedBase:
    return load_base()


def base_scores(task: Task, split: Split, examples: Sequence[Example]) -> Scores:
    """The base's scores on these examples: the card's if it has them all, else measured."""
    path = ASSETS / "experts" / task.name / SCORES_FILE
    card = json.loads(path.read_text(encoding="utf-8"))
    example = {"prompt": split.heldout[0].prompt, "answer": split.heldout[0].answer}
    is_same = (card["num_heldout"], card["example"]) == (len(split.heldout), example)
    known = {group: Score(**score) for group, score in card["scores"]["base"].items()}
    if is_same and known["all"].num == len(examples):
        return known
    base = served_base()
    prompts = [example.prompt for example in examples]
    answers = generate_answers(
        base.model, base.tokenizer, prompts, max_new_tokens=task.max_new_tokens
    )
    return score_answers(task, examples, answers)


def all_scores(
    task: Task, split: Split, answers: Sequence[str], part: dict[str, Any]
) -> dict[str, Scores]:
    """Scores by who answered; answers: the expert's, to the first held-out examples."""
    examples = split.heldout[: len(answers)]
    baselines = {
        who: score_answers(task, examples, baseline(split.train, examples))
        for who, baseline in task.baselines.items()
    }
    expert = score_answers(task, examples, answers)
    return {
        "base": base_scores(task, split, examples),
        **baselines,
        "expert": {**expert, "own part of a message": Score(**part)},
    }


def answers_of(name: str, record: dict[str, Any]) -> list[str]:
    """An expert's answers to single requests, in the order of the held-out examples."""
    found = {f["case"]: f["parts"][0] for f in record["final"]["singles"]}
    return [found[f"{name}-{i}"] for i in range(sum(c.startswith(f"{name}-") for c in found))]


def command_of(options: dict[str, Any]) -> str:
    kept = ("budget", "reserve", "score_reserve", "winner", "final_steps")
    texts = {key: f"{v:g}" if isinstance(v := options[key], float) else str(v) for key in kept}
    given = " ".join(f"--{key.replace('_', '-')} {text}" for key, text in texts.items())
    return f"python benchmarks/second_edition/train.py --data DATA --out RESULTS {given}"


def write(name: str, record: dict[str, Any], results: dict[str, Any], num_foreign: int) -> None:
    task, final = TASKS[name], results["final"]
    split = task.build(SPLIT_SEED)
    own, foreign = (num / results["batch"] for num in final["mix"][1:])
    recipe = Recipe(
        steps=final["steps"],
        batch_size=results["batch"],
        own_share=own,
        foreign_share=foreign,
        opening_off=final["prefix_off"],
        learning_rate=final["learning_rate"],
    ).for_expert(name)
    measured = results["experts"][name]
    scores = all_scores(task, split, answers_of(name, record), measured["part"]["all"])
    assert scores["expert"]["all"].to_dict() == measured["single"], f"{name}: run score.py first"
    card = expert_record(
        task,
        split,
        recipe,
        base=EMBEDDED_ID,
        fingerprint=f"gguf-sha256:{SMOLLM2_135M.member_sha256}",
        command=command_of(record["options"]),
        num_foreign=num_foreign,
        device=results["device"],
        versions={"torch": results["torch"]},
        scores=scores,
        note=NOTE.format(
            minutes=final["steps"] * final["seconds_per_step"] / 60, num_single=NUM_SINGLE
        ),
    )
    write_card(ASSETS / "experts" / name, task, card)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    folder = parser.parse_args().results
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    turns = json.loads((HERE / "generic.json").read_text(encoding="utf-8"))
    num_foreign = len(foreign_requests(turns["train"]))
    for name in results["experts"]:
        write(name, record, results, num_foreign)


if __name__ == "__main__":
    main()
