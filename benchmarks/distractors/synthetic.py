"""Which expert `spectr-context` takes among 100 and 1,000, most of them synthetic.

    python benchmarks/distractors/synthetic.py [--num 10] [--sizes 100 1000]

The 37 trained adapters of accuracy.py are joined by synthetic ones of rank 8 on all layers.
`random`: directions drawn evenly from all. `mixed`: drawn from those that the trained adapters
span at the layer, so they respond to what trained ones respond to; it is the harder case. Only the
input directions are made, which is all that a choice needs: the base reads, no answer is written.
Held-out requests of the ten domains are read. Writes benchmarks/results/synthetic_experts.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script

from benchmarks.distractors.accuracy import HERE, IN_CONTEXT, kind, shares
from spectr_demo import load
from spectr_demo.base.generic import generic_prompts
from spectr_demo.config import library_versions
from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation.listening import listen
from spectr_demo.evaluation.robustness.retrained import attach
from spectr_demo.evaluation.tasks import SPLIT_SEED, TASKS
from spectr_demo.experts.adapters import read_adapter
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.detection import Detector, detector, standing
from spectr_demo.routing.routers import ROUTERS

RESULTS = HERE.parent / "results" / "synthetic_experts.json"
RANK = 8


def directions(bank: ExpertBank, num: int, how: str, generator: torch.Generator) -> Tensor:
    """(P, num, RANK, D_in), orthonormal for each expert."""
    P, E, r = bank.singular_values.shape
    D_in = bank.A.shape[-1]
    drawn = []
    for A in bank.A.float().view(P, E * r, D_in):
        if how == "random":
            mixed = torch.randn(num, RANK, D_in, generator=generator)
        else:
            mixed = torch.randn(num, RANK, E * r, generator=generator) @ A
        drawn.append(torch.linalg.qr(mixed.mT).Q.mT)
    return torch.stack(drawn)


def with_synthetic(bank: ExpertBank, ids: Sequence[int], how: str, seed: int) -> ExpertBank:
    """A bank whose experts are its own, then synthetic ones with these ids. It can only listen."""
    P, E, r = bank.singular_values.shape
    added = directions(bank, len(ids), how, torch.Generator().manual_seed(seed))
    rank = max(r, RANK)
    A = torch.zeros(P, E + len(ids), rank, bank.A.shape[-1], dtype=bank.A.dtype)
    A[:, :E, :r] = bank.A.view(P, E, r, -1)
    A[:, E:, :RANK] = added.to(bank.A.dtype)
    return replace(
        bank,
        expert_ids=torch.cat([bank.expert_ids, torch.tensor(ids)]),
        A=A.flatten(0, 2),
        singular_values=torch.ones(P, E + len(ids), rank),
    )


class Library:
    """What reading needs of a library: names and banks."""

    def __init__(self, trained: ExpertLibrary, num: int, how: str) -> None:
        first = len(trained.names)
        self.names = (*trained.names, *(f"{how}-{i}" for i in range(first, num)))
        ids = range(first, num)
        # Expert 0 is on all layers, so each layer has one bank with it.
        self.by_trained = {
            bank: with_synthetic(bank, ids, how, seed) if 0 in bank.expert_ids else bank
            for seed, bank in enumerate(trained.banks)
        }

    @property
    def banks(self) -> list[ExpertBank]:
        return list(self.by_trained.values())


def certainty(
    engine: SpectrModel,
    library: Library,
    prompts: Sequence[Sequence[int]],
    detectors: dict[ExpertBank, Detector],
) -> Tensor:
    """(R, E) of prompts' token ids, each one request. Detectors that are not there are made, of
    these prompts."""
    requests = engine.reader.requests(prompts)
    found = requests.evidence(library)  # type: ignore[arg-type]  # it asks for names and banks

    def hear(bank: ExpertBank, x: Tensor) -> None:
        if bank not in detectors:
            detectors[bank] = detector(library.by_trained[bank], x)
        found.add(library.by_trained[bank], detectors[bank].scores(x))

    listen(engine, requests, hear)
    return found.certainty


def measured(
    engine: SpectrModel, library: Library, prompts: Mapping[str, Sequence[Sequence[int]]]
) -> dict[str, Any]:
    """Shares of the requests by whom they are taken for, and the time of each step in seconds."""
    began = time.perf_counter()
    detectors: dict[ExpertBank, Detector] = {}
    ordinary = [engine.encode(prompt) for prompt in generic_prompts(engine.base)]
    of_ordinary = certainty(engine, library, ordinary, detectors)
    confidence = ROUTERS[IN_CONTEXT].preset.confidence
    assert confidence is not None
    least = standing(of_ordinary, of_ordinary).amax(-1).quantile(confidence)
    calibrated = time.perf_counter()
    kinds: Counter[str] = Counter()
    num_left = 0
    for own, some in prompts.items():
        found = standing(certainty(engine, library, some, detectors), of_ordinary)
        kinds.update(kind(library.names[i], own) for i in found.argmax(-1).tolist())
        num_left += int((found.amax(-1) <= least).sum())
    return {
        **shares(kinds),
        "left to the base": round(num_left / kinds.total(), 4),
        "calibration_s": round(calibrated - began, 1),
        "a_request_s": round((time.perf_counter() - calibrated) / kinds.total(), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num", type=int, default=10, help="requests of each domain")
    parser.add_argument("--sizes", type=int, nargs="+", default=(100, 1000))
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    engine = load()
    prompts = {
        name: [
            engine.encode(example.prompt)
            for example in TASKS[name].build(SPLIT_SEED).heldout[: arguments.num]
        ]
        for name in engine.library.names
    }
    folders = sorted(path.parent for path in HERE.glob("experts/*/adapter_config.json"))
    others = [read_adapter(str(folder), folder.name) for folder in folders]
    engine = attach(engine, [*engine.library.adapters, *others])
    found: dict[str, Any] = {
        "device": str(engine.base.device),
        "versions": library_versions(),
        "num": arguments.num * len(prompts),
        "experts": {},
    }
    for how in ("random", "mixed"):
        for size in arguments.sizes:
            library = Library(engine.library, size, how)
            row = measured(engine, library, prompts)
            row["peak_GB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1)
            found["experts"].setdefault(how, {})[str(size)] = row
            print(how, size, json.dumps(row), flush=True)
    arguments.output.write_text(f"{json.dumps(found, indent=1)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
