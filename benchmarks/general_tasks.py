"""Whether the router costs the base anything in tasks that no expert was trained for.

    python benchmarks/general_tasks.py [--quick] [--json FILE]

The tasks run in lm-evaluation-harness without a network. Two are its own, and their data is made
when they start: in `ruler_vt` variables are followed through a long text, in `ruler_fwe` the most
frequent words of one are named. The third has questions of general knowledge: those of MMLU's
development split, which the harness carries for its few-shot prompts. Each option is a likelihood.

Both routers get the same prompts. `unrouted` is the share of them that is left to the base,
`experts` says who got the others. `same` is the share whose answer, or whose likelihoods, are
exactly the base's.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

import lm_eval
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager, get_task_dict

from benchmarks.common import arguments, conditions
from spectr_demo.config import DEFAULT_ROUTER, RouterConfig
from spectr_demo.engine.model import SpectrModel, load
from spectr_demo.engine.reading import Lane
from spectr_demo.evaluation.harness import SpectrLM

NUM_TOKENS = 1024  # of a generated prompt and its answer
# The harness names RULER's metric by the length: the share of the words asked for that are given.
RULER = {"found": str(NUM_TOKENS)}
METRICS = {
    "ruler_vt": RULER,
    "ruler_fwe": RULER,
    "mmlu_dev": {"acc": "acc", "acc_norm": "acc_norm"},  # by likelihood; for its length in bytes
}
LIMITS = {"ruler_vt": 20, "ruler_fwe": 20, "mmlu_dev": None}  # prompts of each
_QUESTIONS = Path(lm_eval.__file__).parent / "tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
_QUESTION = re.compile(
    r"(.+?)\s*\n\(A\) (.+?)\s+\(B\) (.+?)\s+\(C\) (.+?)\s+\(D\) (.+?)\s*\n"
    r"A: Let's think step by step\..*[Tt]he answer is \(([A-D])\)\.\s*",
    re.DOTALL,
)


def main() -> None:
    options = arguments(__doc__)
    engine = load()
    tasks = all_tasks(engine)
    results = {}
    for name, task in tasks.items():
        limit = 4 if options.quick else LIMITS[name]
        base, base_answers = scored(engine, "base", task, limit)
        routed, answers = scored(engine, DEFAULT_ROUTER, task, limit)
        same = sum(a == b for a, b in zip(answers, base_answers, strict=True))
        results[name] = {"base": base, DEFAULT_ROUTER: {**routed, "same": same / len(answers)}}
    document = {
        **conditions("python benchmarks/general_tasks.py", engine.base),
        "lm_eval": version("lm_eval"),
        "commit": _commit(),
        "results": results,
    }
    text = json.dumps(document, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


def all_tasks(engine: SpectrModel) -> dict[str, Task]:
    """Made once: RULER draws other data each time."""
    # RULER counts tokens with a tokenizer that it loads itself.
    metadata = {"max_seq_lengths": [NUM_TOKENS], "tokenizer": engine.tokenizer.name_or_path}
    mmlu = {
        "task": "mmlu_dev",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(list(questions()))},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",  # as its `continuation` has it
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
    }
    named = ["ruler_vt", "ruler_fwe"]
    with patch("nltk.download"):  # of data that other tasks of RULER need
        return dict(
            get_task_dict([*named, ConfigurableTask(config=mmlu)], TaskManager(metadata=metadata))
        )


def questions() -> Iterator[dict[str, Any]]:
    """Of MMLU's development split, without the four that the harness wrote in another form."""
    for text in json.loads(_QUESTIONS.read_text(encoding="utf-8")).values():
        for block in text.split("\n\nQ: ")[1:]:
            if match := _QUESTION.fullmatch(block):
                question, *choices, letter = match.groups()
                yield {"question": question, "choices": choices, "answer": "ABCD".index(letter)}


def scored(
    engine: SpectrModel, router: str, task: Task, limit: int | None
) -> tuple[dict[str, Any], list[Any]]:
    """A router's scores in one task, and what it answered to each prompt."""
    name = task.config.task
    lanes: dict[tuple[int, ...], Lane] = {}  # of the prompts that the router read, each once
    read = engine.reader.whole

    def whole(config: RouterConfig, ids: Sequence[int]) -> Lane:
        if tuple(ids) not in lanes:
            lanes[tuple(ids)] = read(config, ids)
        return lanes[tuple(ids)]

    lm = SpectrLM(engine, router=router, batch_size=4)
    with patch.object(engine.reader, "whole", whole):
        out = lm_eval.evaluate(
            lm, {name: task}, limit=limit, apply_chat_template=True, bootstrap_iters=0
        )
    samples = sorted(out["samples"][name], key=lambda sample: int(sample["doc_id"]))
    experts = [lane.expert for lane in lanes.values()]
    row = {
        **{label: out["results"][name][f"{key},none"] for label, key in METRICS[name].items()},
        "num": len(samples),
        "unrouted": experts.count(None) / len(experts) if experts else 1.0,
        "experts": Counter(engine.library.names[e] for e in experts if e is not None),
    }
    return row, [sample["resps"] for sample in samples]


def _commit() -> str:
    """Of this checkout; empty where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
