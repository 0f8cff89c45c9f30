"""Which expert each router takes among 10 to 37 trained ones.

    python benchmarks/distractors/accuracy.py [--num 20]

The ten shipped experts are joined by the adapters in experts/, in an order drawn once. Held-out
requests of the ten domains are read. A choice is for the request's `own` expert, for a `sibling`
(an adapter of the same domain, such as sql-r4) or for an `other`. Writes
benchmarks/results/distractors.json.

`spectr-context` chooses once for a request, and always takes an expert here; `left to the base` is
the share that its confidence would leave. Of routers that look at tokens the commonest choice in
prompt and reference answer counts; `decisions` is their share of own choices on answer tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script

from spectr_demo import load
from spectr_demo.config import library_versions
from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation.accuracy import routing_accuracy
from spectr_demo.evaluation.reading import Reading, Text, read
from spectr_demo.evaluation.robustness.retrained import attach
from spectr_demo.evaluation.tasks import SPLIT_SEED, TASKS
from spectr_demo.experts.adapters import read_adapter
from spectr_demo.routing.routers import ROUTERS, parse_router
from spectr_demo.trace import NOT_ROUTED

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "distractors.json"
OF_TOKENS = ("arrow", "spectr")
IN_CONTEXT = "spectr-context"
SIZES = (10, 20, 30, 37)


def kind(chosen: str, own: str) -> str:
    """Of a request for the expert `own`."""
    if chosen == own:
        return "own"
    return "sibling" if chosen.partition("-")[0] == own else "other"


def commonest(reading: Reading) -> int:
    """The id of the expert that most decisions are for, the template's opening left out."""
    assert reading.choices is not None
    first = reading.choices[reading.num_opening :, ..., 0]
    return int(np.bincount(first[first != NOT_ROUTED]).argmax())


def of_tokens(engine: SpectrModel, router: str, texts: Mapping[str, Sequence[Text]]) -> Any:
    names = engine.library.names
    kinds: Counter[str] = Counter()
    decisions = []
    for own, some in texts.items():
        readings = read(engine, parse_router(router, names), some, description=f"{router}: {own}")
        kinds.update(kind(names[commonest(reading)], own) for reading in readings)
        decisions.append(routing_accuracy(readings, engine.library.index(own))["answer"])
    return {**shares(kinds), "decisions": round(float(np.mean(decisions)), 4)}


def in_context(engine: SpectrModel, texts: Mapping[str, Sequence[Text]]) -> Any:
    names = engine.library.names
    served = parse_router(IN_CONTEXT, names)
    always = replace(served, confidence=None)
    least = engine.reader.least_standing(served)
    assert least is not None
    kinds: Counter[str] = Counter()
    num_left = 0
    for own, some in texts.items():
        for text in some:
            lane = engine.reader.whole(always, text.prompt_ids)
            assert lane.expert is not None and lane.standing is not None
            kinds[kind(names[lane.expert], own)] += 1
            num_left += float(lane.standing.max()) <= least
    return {**shares(kinds), "left to the base": round(num_left / kinds.total(), 4)}


def shares(kinds: Counter[str]) -> dict[str, float]:
    return {key: round(kinds[key] / kinds.total(), 4) for key in ("own", "sibling", "other")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num", type=int, default=20, help="requests of each domain")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    folders = sorted(path.parent for path in HERE.glob("experts/*/adapter_config.json"))
    random.Random(0).shuffle(folders)
    others = [read_adapter(str(folder), folder.name) for folder in folders]
    engine = load()
    shipped = list(engine.library.adapters)
    texts = {
        name: [
            Text.from_chat(engine, example.prompt, example.answer)
            for example in TASKS[name].build(SPLIT_SEED).heldout[: arguments.num]
        ]
        for name in engine.library.names
    }
    found: dict[str, Any] = {
        "device": str(engine.base.device),
        "versions": library_versions(),
        "confidence": ROUTERS[IN_CONTEXT].preset.confidence,
        "num": arguments.num * len(texts),
        "order": [adapter.name for adapter in others],
        "experts": {},
    }
    for size in arguments.sizes:
        engine = attach(engine, [*shipped, *others[: max(0, size - len(shipped))]])
        rows = {IN_CONTEXT: in_context(engine, texts)}
        rows |= {router: of_tokens(engine, router, texts) for router in OF_TOKENS}
        found["experts"][str(len(engine.library.names))] = rows
        print(len(engine.library.names), json.dumps(rows), flush=True)
    arguments.output.write_text(f"{json.dumps(found, indent=1)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
