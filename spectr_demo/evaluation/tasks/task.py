"""The shape of a task: examples, a split that does not leak, a scorer in [0, 1].

A task is one domain an expert is trained for. Each example is one user turn (an instruction wording
with the input in it) and one assistant answer. Instructions vary, and some wordings are held out:
with one fixed prefix a router would only have to spot the prefix.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Item:
    """One underlying pair before it gets an instruction.

    text: the input, which stands inside the instruction.
    answer: what the expert should say.
    key: what the split is made by (a verse, a template, a table and query form ...); items that
        share a key are always on the same side.
    """

    text: str
    answer: str
    key: str


@dataclass(frozen=True, kw_only=True)
class Example:
    """One user turn and its answer. `wording` is the instruction, `{text}` where `text` went."""

    prompt: str
    answer: str
    text: str
    key: str
    wording: str
    is_heldout_wording: bool


@dataclass(frozen=True, kw_only=True)
class Split:
    """Examples to train on and examples never trained on; no `key` is in both."""

    train: tuple[Example, ...]
    heldout: tuple[Example, ...]

    def __post_init__(self) -> None:
        shared = {e.key for e in self.train} & {e.key for e in self.heldout}
        if shared:
            raise ValueError(
                f"split: {len(shared)} keys are in both train and held-out, such as "
                f"{sorted(shared)[:3]}; a key belongs to one side; split the items by key"
            )


# (training examples, held-out examples) -> an answer to each held-out one, without a model.
Baseline = Callable[[Sequence[Example], Sequence[Example]], list[str]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A domain: where its data comes from, how it is worded, how an answer is scored.

    name: the folder name of its expert. title: shown to people.
    source: the package and version, for the card. licence: of the data, in words; licence_id: the
    Hub's identifier. split_unit: what `Item.key` names. limits: for the card, one or two sentences.
    wordings: instructions used in training. heldout_wordings: used only in held-out examples.
    build: seed -> Split, deterministic. score: (answer, example) -> [0, 1], 1 is right.
    metric: what `score` measures, in a few words. max_new_tokens: long enough for every answer.
    baselines: what the expert has to beat, by name.
    packages: what `build`, `score` and the baselines import beyond requirements.txt.
    """

    name: str
    title: str
    licence: str
    licence_id: str
    source: str
    split_unit: str
    limits: str
    wordings: tuple[str, ...]
    heldout_wordings: tuple[str, ...]
    build: Callable[[int], Split]
    score: Callable[[str, Example], float]
    metric: str
    max_new_tokens: int
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    packages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        offenders = [w for w in (*self.wordings, *self.heldout_wordings) if "{text}" not in w]
        offenders += sorted(set(self.wordings) & set(self.heldout_wordings))
        if offenders:
            raise ValueError(
                f"task {self.name!r}: wordings {offenders} lack '{{text}}' or are on both sides; "
                "a wording holds '{text}' once and is either trained on or held out"
            )

    def check_packages(self) -> None:
        """Raise ModuleNotFoundError, which says what to install, where a package is missing."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            raise ModuleNotFoundError(
                f"task {self.name!r}: packages {', '.join(missing)} are not installed; its data "
                "and scores need them; run: pip install -r requirements-train.txt, or "
                "spectr-demo[train]"
            )


def make_split(
    train: Sequence[Item],
    heldout: Sequence[Item],
    wordings: Sequence[str],
    heldout_wordings: Sequence[str],
    seed: int,
    num_heldout: int = 400,
) -> Split:
    """Put every item into an instruction and shuffle both sides.

    A training item gets one random training wording. Held-out items alternate between a wording
    seen in training and a held-out one, so that any even prefix of `Split.heldout` is half and
    half. At most `num_heldout` held-out items are kept.
    """
    rng = random.Random(seed)
    train, heldout = list(train), list(heldout)
    rng.shuffle(train)
    rng.shuffle(heldout)

    def example(item: Item, wording: str, is_heldout_wording: bool) -> Example:
        return Example(
            prompt=wording.replace("{text}", item.text),
            answer=item.answer,
            text=item.text,
            key=item.key,
            wording=wording,
            is_heldout_wording=is_heldout_wording,
        )

    return Split(
        train=tuple(example(item, rng.choice(wordings), False) for item in train),
        heldout=tuple(
            example(item, rng.choice(heldout_wordings if i % 2 else wordings), bool(i % 2))
            for i, item in enumerate(heldout[:num_heldout])
        ),
    )


def split_by_key(
    items: Sequence[Item],
    heldout_fraction: float,
    wordings: Sequence[str],
    heldout_wordings: Sequence[str],
    seed: int,
    rng: random.Random | None = None,
) -> Split:
    """Hold out a random share of the keys, then `make_split`.

    rng: draws the keys; by default a fresh one from `seed`.
    """
    keys = sorted({item.key for item in items})
    rng = rng or random.Random(seed)
    chosen = set(rng.sample(keys, round(heldout_fraction * len(keys))))
    return make_split(
        [item for item in items if item.key not in chosen],
        [item for item in items if item.key in chosen],
        wordings,
        heldout_wordings,
        seed,
    )
