"""Does the advice of `inspect --advise` agree with what experts can do?

    python benchmarks/advice.py [--half report] [--only library]

Of the shipped experts and the adapters of benchmarks/distractors, every other one is in one half:
`choose`, on which the advice's numbers were chosen, or `report`. Parts of a half are measured.

library: its experts together, judged by `advise`.
variants: its shipped experts spoiled: with noise, scaled down, half of their layers left out.
retrained: the same domains, trained for 40 steps with another seed. They are kept in the cache
    folder: the first time takes ten minutes.

Each expert, and the base, answers held-out requests of its domain, by its task's own score; of a
distractor the share of exact answers counts. `spearman` is between an expert's strength and what
its score has beyond the base's.

The advice sees no data; the scores do. Writes benchmarks/results/advice.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script

from benchmarks.common import conditions
from benchmarks.distractors.build import split_of
from benchmarks.distractors.domains import DOMAINS
from spectr_demo.base.loading import LoadedBase, load_base
from spectr_demo.config import cache_dir, shipped_experts
from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation import advice
from spectr_demo.evaluation.generation import routed_answers
from spectr_demo.evaluation.tasks import SPLIT_SEED, TASKS
from spectr_demo.experts.adapters import Adapter, LoraFactors, read_adapter
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.routing.routers import parse_router
from spectr_demo.training.expert import is_finished, train
from spectr_demo.training.recipe import Recipe

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "advice.json"
DISTRACTORS = HERE / "distractors"
HALVES = ("choose", "report")
Factors = Mapping[str, LoraFactors]


def task_of(name: str) -> str:
    """`sql` of `sql-r4` and of `sql, noise 1.5`."""
    return re.split("[-,]", name)[0]


def experts_of(half: str) -> tuple[list[Adapter], list[Adapter]]:
    """The shipped ones, and the others; an adapter of a shipped one's domain is in its half."""
    shipped = [read_adapter(source, Path(source).name) for source in sorted(shipped_experts())]
    folders = sorted(file.parent for file in DISTRACTORS.glob("experts/*/adapter_config.json"))
    others = [read_adapter(str(folder), folder.name) for folder in folders]
    chosen = shipped[HALVES.index(half) :: 2]
    domains, own = {a.name for a in shipped}, {a.name for a in chosen}
    siblings = [a for a in others if task_of(a.name) in own]
    strangers = [a for a in others if task_of(a.name) not in domains]
    return chosen, [*siblings, *strangers[HALVES.index(half) :: 2]]


def noisy(size: float) -> Callable[[Factors], dict[str, LoraFactors]]:
    """size: Frobenius norm of the noise over a factor's own."""

    def spoil(factors: Factors) -> dict[str, LoraFactors]:
        generator = torch.Generator().manual_seed(0)

        def with_noise(factor: torch.Tensor) -> torch.Tensor:
            noise = torch.randn(factor.shape, generator=generator)
            return factor.float() + size * factor.float().norm() / noise.norm() * noise

        return {
            path: replace(f, lora_A=with_noise(f.lora_A), lora_B=with_noise(f.lora_B))
            for path, f in factors.items()
        }

    return spoil


def scaled(by: float) -> Callable[[Factors], dict[str, LoraFactors]]:
    return lambda factors: {path: replace(f, scaling=by * f.scaling) for path, f in factors.items()}


def halved(factors: Factors) -> dict[str, LoraFactors]:
    """On layers of even number alone."""
    return {
        path: f
        for path, f in factors.items()
        if int(re.search(r"layers\.(\d+)\.", path)[1]) % 2 == 0  # type: ignore[index]
    }


SPOILED = {
    "noise 1": noisy(1),
    "noise 2": noisy(2),
    "scaled by 0.3": scaled(0.3),
    "half of the layers": halved,
}


SHORT = Recipe(steps=40, seed=1)


def variants(adapter: Adapter, kinds: list[str]) -> list[Adapter]:
    return [
        Adapter.of(
            SPOILED[kind](adapter.read()),
            name=f"{adapter.name}, {kind}",
            source=adapter.source,
            base_model=adapter.base_model,
            sha256=f"{adapter.sha256}, {kind}",
        )
        for kind in kinds
    ]


def library(base: LoadedBase, half: str, num: int) -> list[dict[str, Any]]:
    shipped, others = experts_of(half)
    engine = engine_of(base, [*shipped, *others])
    found = [
        row | scores(engine, row["name"], num) for row in advice.to_json(advice.advise(engine))
    ]
    engine.detach()
    return found


def scores(engine: SpectrModel, name: str, num: int) -> dict[str, float]:
    """Of an expert and of the base, on held-out requests of its domain: its task's own `score`, for
    distractors the share of exact answers."""
    domain = task_of(name)
    task = TASKS.get(domain)
    split = task.build(SPLIT_SEED) if task else split_of(domain, DOMAINS[domain])
    examples = split.heldout[:num]

    def mean(router: str) -> float:
        answers = routed_answers(
            engine,
            parse_router(router, engine.library.names),
            [engine.encode(example.prompt) for example in examples],
            max_new_tokens=48,
        )
        values = [
            task.score(answer, example) if task else answer.strip() == example.answer
            for answer, example in zip(answers, examples, strict=True)
        ]
        return round(float(np.mean(values)), 4)

    return {"score": mean(f"single:{name}"), "base": mean("base")}


def spoiled(base: LoadedBase, half: str, num: int) -> list[dict[str, Any]]:
    """Two kinds of each shipped expert, so that each kind comes as often as another."""
    kinds = list(SPOILED)
    shipped, _ = experts_of(half)
    return [
        row
        for i, adapter in enumerate(shipped)
        for row in rows_of(base, variants(adapter, [kinds[i % 4], kinds[(i + 2) % 4]]), num)
    ]


def retrained(base: LoadedBase, half: str, num: int) -> list[dict[str, Any]]:
    shipped, _ = experts_of(half)
    return [row for adapter in shipped for row in rows_of(base, [trained_anew(adapter.name)], num)]


def trained_anew(domain: str) -> Adapter:
    folder = cache_dir() / "advice" / f"{domain}, {SHORT.steps} steps"
    if not is_finished(folder):
        train(domain, output_dir=folder, recipe=SHORT, num_eval=1)
    return read_adapter(str(folder), folder.name)


def rows_of(base: LoadedBase, adapters: list[Adapter], num: int) -> list[dict[str, Any]]:
    """Strength and score of each of some experts of one domain."""
    engine, rows = engine_of(base, adapters), []
    for e, each in enumerate(adapters):
        written = advice.write(engine, e)
        rows.append(
            {
                "name": each.name,
                "request": written.requests[0],
                "answer": written.answers[0],
                "strength": round(advice.strength(written.readings), 4),
                **scores(engine, each.name, num),
            }
        )
        print(rows[-1], flush=True)
    engine.detach()
    return rows


def engine_of(base: LoadedBase, adapters: list[Adapter]) -> SpectrModel:
    return SpectrModel(base, ExpertLibrary.from_adapters(adapters, base.model))


def agreement(rows: list[dict[str, Any]]) -> float:
    """Spearman between strength and what an expert's score has beyond the base's: both leave out
    what the base can do by itself."""
    strengths = [row["strength"] for row in rows]
    gains = [row["score"] - row["base"] for row in rows]
    return round(float(spearmanr(strengths, gains).statistic), 3)


PARTS = {"library": library, "variants": spoiled, "retrained": retrained}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--half", choices=HALVES, default="report")
    parser.add_argument(
        "--only", choices=PARTS, help="the other parts stay as they are in the file"
    )
    parser.add_argument("--num", type=int, default=20, help="requests that score an expert")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    # Batches are faster with weights that are expanded from the same 4 bits.
    with patch("spectr_demo.base.quantization.has_avx512bf16", return_value=False):
        base = load_base(None, dtype=torch.bfloat16)
    file = arguments.output
    for part in [arguments.only] if arguments.only else PARTS:
        rows = PARTS[part](base, arguments.half, arguments.num)
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        found |= conditions("python benchmarks/advice.py", base)
        of_half = found.setdefault(arguments.half, {})
        of_half[part] = rows
        measured = [each for each in PARTS if each in of_half]
        of_half["spearman"] = {each: agreement(of_half[each]) for each in measured}
        of_half["spearman"]["all"] = agreement([r for each in measured for r in of_half[each]])
        file.write_text(f"{json.dumps(found, indent=1, ensure_ascii=False)}\n", encoding="utf-8")
        print(json.dumps(of_half["spearman"]), flush=True)


if __name__ == "__main__":
    main()
