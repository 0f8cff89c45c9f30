"""Build what train.py needs for the distractors: rows to train on and held-out requests.

    python benchmarks/distractors/build.py DATA

Writes DATA/distractors/rows.npz and tests.json. For each distractor 2,560 single requests and 100
held-out ones, half of them in a wording that was never trained. It takes a minute, and fetches what
the tasks fetch and the names of colours.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script

from benchmarks.distractors.domains import DOMAINS, Domain
from benchmarks.second_edition.build import asked, flat
from benchmarks.second_edition.messages import Encoder
from benchmarks.second_edition.train import ALL_LINEAR, Shape, seed_of
from spectr_demo.base.checkpoint import whole_embedded_checkpoint
from spectr_demo.evaluation.tasks import SPLIT_SEED, TASKS, Example, Split
from spectr_demo.evaluation.tasks.task import split_by_key
from spectr_demo.training.messages import ONE, own_request

NUM_ROWS, NUM_TESTED = 2560, 100  # 160 steps of 16
HELDOUT_FRACTION = 0.1
ATTENTION, MLP = ALL_LINEAR[:4], ALL_LINEAR[4:]

SMALL = Shape(rank=4)
SHAPES = {
    **dict.fromkeys(DOMAINS, SMALL),
    **dict.fromkeys(("sums", "units", "reverse", "initials"), Shape(modules=ATTENTION)),
    **dict.fromkeys(
        ("family", "iso_date", "title_case", "snake_case"), Shape(rank=4, modules=ATTENTION)
    ),
    **dict.fromkeys(("plural", "nato", "leet"), Shape(rank=4, modules=MLP)),
}
# Of the package's own tasks: name -> (task, shape). The seed is another, from the name.
OTHERS = {
    "sql-r4": ("sql", SMALL),
    "category-r4": ("category", SMALL),
    "sentiment-seed2": ("sentiment", Shape()),
    "cron-attention": ("cron", Shape(modules=ATTENTION)),
    "arpabet-mlp": ("arpabet", Shape(modules=MLP)),
    "icd10-qv": ("icd10", Shape(modules=("q_proj", "v_proj"))),
    "to_es-r16-attention": ("to_es", Shape(rank=16, modules=ATTENTION)),
    "kjv-r16-attention": ("kjv", Shape(rank=16, modules=ATTENTION)),
}


def split_of(name: str, domain: Domain) -> Split:
    """The domain's items, at most one for each text, split by their key."""
    rng = random.Random(seed_of(name))
    items = list({item.text: item for item in domain.pairs(rng)}.values())
    return split_by_key(
        items, HELDOUT_FRACTION, domain.wordings, domain.heldout_wordings, SPLIT_SEED
    )


def cases(encoder: Encoder, name: str, heldout: tuple[Example, ...], cap: int) -> list[Any]:
    return [
        {
            "id": f"{name}-{i}",
            "format": "single",
            "domains": [name],
            **asked(encoder, [own_request(example)], ONE),
            "caps": [cap],
            "answers": [example.answer],
        }
        for i, example in enumerate(heldout[:NUM_TESTED])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data / "distractors"
    data.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(AutoTokenizer.from_pretrained(whole_embedded_checkpoint(torch.bfloat16)))
    parts: dict[str, tuple[Split, Shape, int]] = {
        name: (split_of(name, domain), SHAPES[name], domain.max_new_tokens)
        for name, domain in DOMAINS.items()
    }
    for name, (task, shape) in OTHERS.items():
        parts[name] = (TASKS[task].build(SPLIT_SEED), shape, TASKS[task].max_new_tokens)
    rows: dict[str, np.ndarray] = {}
    for name, (split, _, _) in parts.items():
        train = list(split.train)
        random.Random(seed_of(name)).shuffle(train)
        encoded = [encoder.row([own_request(example)], ONE) for example in train[:NUM_ROWS]]
        rows |= {f"{name}/single/{part}": array for part, array in flat(encoded).items()}
        print(f"{name}: {len(encoded)} rows, such as {train[0].prompt!r} -> {train[0].answer!r}")
    np.savez_compressed(data / "rows.npz", **rows)  # type: ignore[arg-type]
    tests = {
        "shapes": {name: asdict(shape) for name, (_, shape, _) in parts.items()},
        "singles": {
            name: cases(encoder, name, split.heldout, cap)
            for name, (split, _, cap) in parts.items()
        },
    }
    (data / "tests.json").write_text(json.dumps(tests, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
