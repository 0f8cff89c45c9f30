"""The recipe of the experts: LoRA on one task's messages, in minutes.

LoRA (Hu et al. 2021, arXiv 2106.09685) of rank 8 sits on every linear layer of the decoder. It is
trained on top of the 4-bit base that will be served (QLoRA, Dettmers et al. 2023, arXiv
2305.14314). The loss is on the own answers only. `messages` says what is in a batch, and
`expert.train` follows the recipe.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one training run.

    steps: optimiser steps.
    epochs: so many rows as these passes over the training examples have. Where they are given,
        they replace the steps.
    batch_size: rows of a step.
    own_share, foreign_share: of a batch, the messages of several own requests, and those with
        foreign lines. The other rows are single requests.
    opening_off: share of the rows in which the base alone reads the chat template's opening.
    warmup_fraction: share of the steps in which the learning rate rises. Then it decays linearly
        to 0.
    seed: of initialisation and order; None takes `seed_of` the expert's name.
    Raises ValueError for settings that are not positive, and for shares that no batch can have.
    """

    steps: int = 300
    epochs: int | None = None
    batch_size: int = 16
    own_share: float = 0.1875
    foreign_share: float = 0.3125
    opening_off: float = 0.5
    learning_rate: float = 1.5e-3
    warmup_fraction: float = 0.06
    rank: int = 8
    alpha: int = 16
    seed: int | None = None

    def __post_init__(self) -> None:
        positive = ("steps", "epochs", "batch_size", "learning_rate", "rank", "alpha")
        values = asdict(self)
        offenders = [
            f"{name}={values[name]}"
            for name in positive
            if values[name] is not None and values[name] <= 0
        ]
        if offenders:
            raise ValueError(
                f"recipe: {', '.join(offenders)}; these must be positive; pass larger values"
            )
        shares = ("own_share", "foreign_share", "opening_off", "warmup_fraction")
        offenders = [f"{name}={values[name]}" for name in shares if not 0 <= values[name] <= 1]
        if not offenders and self.own_share + self.foreign_share > 1:
            offenders = [f"own_share={self.own_share}", f"foreign_share={self.foreign_share}"]
        if offenders:
            raise ValueError(
                f"recipe: {', '.join(offenders)}; shares from 0 to 1 were needed, and own_share "
                "and foreign_share together at most 1; pass other shares"
            )

    @property
    def num_own(self) -> int:
        """Rows of a batch with several own requests."""
        return round(self.batch_size * self.own_share)

    @property
    def num_foreign(self) -> int:
        """Rows of a batch with foreign lines."""
        return min(round(self.batch_size * self.foreign_share), self.batch_size - self.num_own)

    @property
    def num_single(self) -> int:
        """Rows of a batch with a single request."""
        return self.batch_size - self.num_own - self.num_foreign

    def num_steps(self, num_examples: int) -> int:
        """Optimiser steps on so many training examples."""
        if self.epochs is None:
            return self.steps
        return math.ceil(self.epochs * num_examples / self.batch_size)

    def for_expert(self, name: str) -> Recipe:
        """The recipe with the seed of this expert, unless it has one already."""
        return self if self.seed is not None else replace(self, seed=seed_of(name))

    def to_json(self) -> dict[str, Any]:
        """The settings that count: steps or epochs, not both."""
        unused = "epochs" if self.epochs is None else "steps"
        return {name: value for name, value in asdict(self).items() if name != unused}


def seed_of(name: str) -> int:
    """The seed of an expert, from its name: experts that start alike overlap in all they do."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


# Single requests, rank 8, alpha 16 and batches of 8 (SpectR, arXiv 2504.03454).
PAPER_RECIPE = Recipe(
    epochs=1,
    batch_size=8,
    own_share=0.0,
    foreign_share=0.0,
    opening_off=0.0,
    learning_rate=1e-4,
)
RECIPES = {"default": Recipe(), "paper": PAPER_RECIPE}
