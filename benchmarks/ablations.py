"""What each part of reading a request pays: without it, or with another value.

    python benchmarks/ablations.py [--num 50]

Held-out requests are read that are in no table of docs/results.md: 50 of each domain, those after
the first 100. `right`: share whose expert is named (one always is). `taken`: share of ordinary
prompts, of those to choose and tune with, that are surer of an expert than 2% of the requests are.
Then messages of two and three
requests, of the same examples. `parts`: share of their requests that have a lane of their own and
in it their expert. `whole`: share of the single requests with a colon, its text in a line of its
own, that stay one lane. Each row changes one thing. Its difference from the first row has a 95%
interval, from requests drawn again in pairs. Writes benchmarks/results/ablations.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script

from spectr_demo import load
from spectr_demo.base.generic import generic_prompts
from spectr_demo.config import library_versions
from spectr_demo.engine import reading
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.reading import ReadPrompt
from spectr_demo.evaluation.composition import make_messages
from spectr_demo.evaluation.parts import ORDINARY
from spectr_demo.evaluation.requests import Detectors, evidence, metrics_of
from spectr_demo.evaluation.tasks import SPLIT_SEED, TASKS, Example
from spectr_demo.routing import detection, lanes
from spectr_demo.routing.detection import standing
from spectr_demo.routing.routers import parse_router

RESULTS = Path(__file__).resolve().parent / "results" / "ablations.json"
IN_TABLES = 100
AT_ONCE = 50
LOST = 0.02  # of the requests, at the certainty where ordinary prompts are counted
Patches = Mapping[tuple[Any, str], Any]


def lead(scores: Tensor) -> Tensor:
    """In place of the cosine: how far each expert stands out from the mean of all."""
    return scores - scores.mean(-1, keepdim=True)


# What is changed for each row, beside the detectors.
OF_REQUESTS: dict[str, Patches] = {
    "as it is": {},
    "all tokens count the same": {(reading, "_FADING"): 1.0},
    "a token n before the end counts 0.95^n": {(reading, "_FADING"): 0.95},
    "a token n before the end counts 0.7^n": {(reading, "_FADING"): 0.7},
    "only the last token": {(reading, "_FADING"): 0.0},
    "no noise in the cosine": {(detection, "_NOISE"): 0.0},
    "noise of 0.2": {(detection, "_NOISE"): 0.2},
    "leads in place of cosines": {(detection, "certainty"): lead},
}
COSTS = [(lanes, name) for name in ("COST_OF_ITEM", "COST_OF_LINE", "COST_INSIDE_A_LINE")]
# Of each row, what is changed while messages are read, and while they are cut.
OF_CUTS: dict[str, tuple[Patches, Patches]] = {
    "as it is": ({}, {}),
    "no noise in the cosine": ({(detection, "_NOISE"): 0.0}, {}),
    "a cut costs nothing": (
        {},
        {(lanes, "COST_OF_LINE"): 0.0, (lanes, "COST_INSIDE_A_LINE"): 0.0},
    ),
    "every cut costs 0.01": (
        {},
        {(lanes, "COST_OF_ITEM"): 0.01, (lanes, "COST_INSIDE_A_LINE"): 0.01},
    ),
    "every cut costs 0.03": (
        {},
        {(lanes, "COST_OF_ITEM"): 0.03, (lanes, "COST_OF_LINE"): 0.03},
    ),
    "cut at every mark": ({}, dict.fromkeys(COSTS, -1.0)),
}


def certainty(engine: SpectrModel, prompts: Sequence[str], detectors: Detectors) -> Tensor:
    """(R, E) of prompts, each taken for one request."""
    ids = [engine.encode(prompt) for prompt in prompts]
    some = [ids[i : i + AT_ONCE] for i in range(0, len(ids), AT_ONCE)]
    return torch.cat([evidence(engine, each, detectors).certainty for each in some])


def told(
    engine: SpectrModel,
    examples: Mapping[str, Sequence[Example]],
    ordinary: Sequence[str],
    detectors: Detectors,
    *,
    is_relative: bool = True,
) -> tuple[list[float], list[float]]:
    """1 for each request whose expert is named; 1 for each ordinary prompt that is `taken`.
    is_relative: whether certainty is compared with that of ordinary prompts."""
    generic = certainty(engine, generic_prompts(engine.base), detectors)

    def of(prompts: Sequence[str]) -> Tensor:
        found = certainty(engine, prompts, detectors)
        return standing(found, generic) if is_relative else found

    right, most = [], []
    for name, some in examples.items():
        found = of([example.prompt for example in some])
        right += (found.argmax(-1) == engine.library.index(name)).float().tolist()
        most.append(found.amax(-1))
    least = torch.cat(most).quantile(LOST)
    taken = of(ordinary).amax(-1) > least
    return right, taken.float().tolist()


def unstandardised(detectors: Detectors) -> Detectors:
    return {
        bank: replace(d, mean=torch.zeros_like(d.mean), std=torch.ones_like(d.std))
        for bank, d in detectors.items()
    }


def chosen(engine: SpectrModel, read: ReadPrompt) -> list[int | None]:
    """The expert of each lane, one always named."""
    router = replace(parse_router("spectr-context", engine.library.names), confidence=None)
    return [lane.expert for lane in read.lanes(router, None)]


def own_lanes(found: Sequence[int | None], experts: Sequence[int]) -> list[float]:
    """1 for each request that has its own lane and its own expert. The experts of two neighbours
    differ, and so lanes that are right are as many as the requests."""
    if len(found) != len(experts):
        return [0.0] * len(experts)
    return [float(a == b) for a, b in zip(found, experts, strict=True)]


def patched(patches: Patches, work: Callable[[], Any]) -> Any:
    with ExitStack() as stack:
        for (module, name), value in patches.items():
            stack.enter_context(patch.object(module, name, value))
        return work()


def table(rows: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Means, and the difference from the first row with its interval."""
    first = np.array(next(iter(rows.values())))
    drawn = np.random.default_rng(0).integers(len(first), size=(10_000, len(first)))
    out = {}
    for name, values in rows.items():
        difference = np.array(values) - first
        low, high = np.quantile(difference[drawn].mean(1), (0.025, 0.975))
        out[name] = {
            "mean": round(float(np.mean(values)), 4),
            "difference": round(float(difference.mean()), 4),
            "interval": [round(float(low), 4), round(float(high), 4)],
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num", type=int, default=50, help="requests of each domain")
    parser.add_argument("--messages", type=int, default=150)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    engine = load()
    examples = {
        name: TASKS[name].build(SPLIT_SEED).heldout[IN_TABLES : IN_TABLES + arguments.num]
        for name in engine.library.names
    }
    plain, raw = (measured.detectors for measured in metrics_of(engine).values())
    lists = json.loads(ORDINARY.read_text(encoding="utf-8"))["development"]
    ordinary = [entry["prompt"] for entries in lists.values() for entry in entries]
    rows = {
        row: patched(patches, lambda: told(engine, examples, ordinary, plain))
        for row, patches in OF_REQUESTS.items()
    }
    rows["certainty as it is"] = told(engine, examples, ordinary, plain, is_relative=False)
    rows["raw metric"] = told(engine, examples, ordinary, raw)
    rows["not standardised"] = told(engine, examples, ordinary, unstandardised(plain))
    right, taken = ({row: of_row[i] for row, of_row in rows.items()} for i in (0, 1))
    found: dict[str, Any] = {
        "device": str(engine.base.device),
        "versions": library_versions(),
        "num": sum(map(len, examples.values())),
        "num ordinary": len(ordinary),
        "right": table(right),
        "taken": table(taken),
    }
    print(json.dumps(found, indent=1), flush=True)

    pairs = arguments.messages * 3 // 5
    messages = make_messages(examples, pairs, arguments.messages - pairs)
    experts = [[engine.library.index(name) for name in message.names] for message in messages]
    colon = [e.prompt for some in examples.values() for e in some[:25] if ": " in e.prompt]
    single = [prompt.replace(": ", ":\n", 1) for prompt in colon]
    prompts = [engine.encode(text) for text in (*(message.text for message in messages), *single)]
    parts, whole = {}, {}
    read = list(map(engine.reader.prompt, prompts))
    for row, (reads_so, cuts_so) in OF_CUTS.items():
        of_row = (
            patched(reads_so, lambda: list(map(engine.reader.prompt, prompts)))
            if reads_so
            else read
        )
        of_prompts = patched(cuts_so, lambda of_row=of_row: [chosen(engine, p) for p in of_row])
        parts[row] = [
            value
            for of_message, of_experts in zip(of_prompts, experts, strict=False)
            for value in own_lanes(of_message, of_experts)
        ]
        whole[row] = [float(len(of_prompt) == 1) for of_prompt in of_prompts[len(messages) :]]
    found |= {
        "num messages": len(messages),
        "num whole": len(single),
        "parts": table(parts),
        "whole": table(whole),
    }
    print(json.dumps({"parts": found["parts"], "whole": found["whole"]}, indent=1), flush=True)
    arguments.output.write_text(f"{json.dumps(found, indent=1)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
