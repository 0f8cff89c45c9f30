"""Build what train.py reads: training rows of ten domains, and held-out messages, as token ids.

    python benchmarks/second_edition/build.py DATA

Writes DATA/rows.npz: for each domain up to 6,000 single requests, 3,000 messages of several own
requests, and 4,500 with foreign lines. Writes DATA/tests.json: 200 single requests for each domain,
all ordered pairs of domains in five formats, and messages with an ordinary line. It takes two
minutes, and fetches the tasks' data if need be.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script

from benchmarks.second_edition import messages
from benchmarks.second_edition.messages import Encoder, Row
from benchmarks.second_edition.train import EXPERIMENT, seed_of
from spectr_demo.base.checkpoint import whole_embedded_checkpoint
from spectr_demo.evaluation.messages import CLOSING, Request, Style, pieces
from spectr_demo.evaluation.tasks import SPLIT_SEED, TASKS, Example, Split
from spectr_demo.training.messages import ONE, own_request

NUM_SINGLE, NUM_OWN, NUM_FOREIGN, NUM_TESTED = 6000, 3000, 4500, 200
Case = dict[str, Any]


def foreign_requests(turns: list[dict[str, str]]) -> list[Request]:
    """Ordinary prompts; an answer is the first sentence of the base's, or its first ten words."""
    out = []
    for turn in turns:
        answer = turn["answer"].split("\n")[0].strip()
        sentence = re.match(r".{3,110}?[.!?](?=\s|$)", answer)
        if sentence:
            answer = sentence.group(0)
        elif turn["ended"] != "end":
            answer = " ".join(answer.split()[:10])
        if answer:
            out.append(Request(text=turn["text"], answer=answer, keeps_case=False, is_own=False))
    return out


def training_rows(
    encoder: Encoder, name: str, examples: Sequence[Example], foreign: Sequence[Request]
) -> dict[str, list[Row]]:
    """The rows of one domain by kind; the order of draws follows from the domain's name."""
    rng = random.Random(seed_of(name))
    pool = [own_request(example) for example in examples]
    chosen = pool if len(pool) <= NUM_SINGLE else rng.sample(pool, NUM_SINGLE)
    return {
        "single": [encoder.row([request], ONE) for request in chosen],
        "own": [messages.own_row(encoder, pool, rng) for _ in range(NUM_OWN)],
        "foreign": [messages.foreign_row(encoder, pool, foreign, rng) for _ in range(NUM_FOREIGN)],
    }


def flat(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    rows = [row for row in rows if len(row[0]) <= messages.MOST_TOKENS]
    return {
        "ids": np.concatenate([np.array(ids, np.uint16) for ids, _ in rows]),
        "flags": np.concatenate([np.array(flags, np.uint8) for _, flags in rows]),
        "lengths": np.array([len(ids) for ids, _ in rows], np.uint16),
    }


def asked(encoder: Encoder, requests: Sequence[Request], style: Style) -> Case:
    """Text, token ids, and for each token its part: -1 the opening, the closing is the first's."""
    parts = pieces(requests, style)
    ids, owners = encoder.prompt(parts)
    text = "".join(part for part, _ in parts)
    return {"text": text, "ids": ids, "parts": [0 if o == CLOSING else o for o in owners]}


def singles(encoder: Encoder, splits: dict[str, Split]) -> dict[str, list[Case]]:
    out: dict[str, list[Case]] = {}
    for name, split in splits.items():
        out[name] = [
            {
                "id": f"{name}-{i}",
                "format": "single",
                "domains": [name],
                **asked(encoder, [own_request(example)], ONE),
                "caps": [TASKS[name].max_new_tokens],
                "answers": [example.answer],
                "heldout_index": [i],
            }
            for i, example in enumerate(split.heldout[:NUM_TESTED])
        ]
    return out


def pairs(encoder: Encoder, splits: dict[str, Split], rng: random.Random) -> Iterator[Case]:
    """12 messages for each order of two domains of the experiment, 2 for the others, by format.

    Half of the numbered ones also ask for numbered answers.
    """
    for format_ in messages.TESTED_FORMATS:
        for names in ((a, b) for a in splits for b in splits if a != b):
            for j in range(12 if set(names) <= set(EXPERIMENT) else 2):
                index = [rng.randrange(len(splits[name].heldout)) for name in names]
                chosen = [splits[n].heldout[i] for n, i in zip(names, index, strict=True)]
                wish = "Number the answers." if format_ == "numbered" and j % 2 else ""
                style = Style(format=format_, asks_numbers=wish)
                marks = [style.mark.format(i + 1) if wish else "" for i in range(2)]
                extra = 6 if wish else 2
                yield {
                    "id": f"{names[0]}+{names[1]}-{format_}-{j}",
                    "format": format_,
                    "domains": list(names),
                    **asked(encoder, [own_request(example) for example in chosen], style),
                    "caps": [TASKS[name].max_new_tokens + extra for name in names],
                    "answers": [m + e.answer for m, e in zip(marks, chosen, strict=True)],
                    "heldout_index": index,
                }


def ordinary(
    encoder: Encoder, splits: dict[str, Split], foreign: list[str], rng: random.Random
) -> Iterator[Case]:
    """A request and an ordinary line that was never trained, in both orders."""
    for format_ in messages.TESTED_FORMATS:
        for name, split in splits.items():
            for j in range(8 if name in EXPERIMENT else 4):
                i = rng.randrange(len(split.heldout))
                own = own_request(split.heldout[i])
                other = Request(text=rng.choice(foreign), answer="", keeps_case=False, is_own=False)
                order = 1 if j % 2 else -1
                cap = TASKS[name].max_new_tokens + 2
                yield {
                    "id": f"{name}~base-{format_}-{j}",
                    "format": format_,
                    "domains": [name, "base"][::order],
                    **asked(encoder, [own, other][::order], Style(format=format_)),
                    "caps": [cap, 24][::order],
                    "answers": [own.answer, ""][::order],
                    "heldout_index": [i],
                }


def tests(encoder: Encoder, splits: dict[str, Split], foreign: list[str]) -> dict[str, Any]:
    first = json.loads(Path(__file__).with_name("first_edition.json").read_text(encoding="utf-8"))
    rng = random.Random(1)
    two = list(pairs(encoder, splits, rng))
    rng.shuffle(two)  # every n-th message is of every format
    one = list(ordinary(encoder, splits, foreign, rng))
    rng.shuffle(one)
    return {
        "singles": singles(encoder, splits),
        "pairs": two,
        "ordinary": one,
        "first_edition": {name: first[name]["expert"]["all"] for name in splits},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data
    data.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(AutoTokenizer.from_pretrained(whole_embedded_checkpoint(torch.bfloat16)))
    turns = json.loads(Path(__file__).with_name("generic.json").read_text(encoding="utf-8"))
    foreign = foreign_requests(turns["train"])
    splits = {name: task.build(SPLIT_SEED) for name, task in TASKS.items()}
    rows: dict[str, np.ndarray] = {}
    for name, split in splits.items():
        for kind, found in training_rows(encoder, name, split.train, foreign).items():
            rows |= {f"{name}/{kind}/{part}": array for part, array in flat(found).items()}
    np.savez_compressed(data / "rows.npz", **rows)  # type: ignore[arg-type]
    written = tests(encoder, splits, [turn["text"] for turn in turns["heldout"]])
    (data / "tests.json").write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
