"""The recipe that made the shipped experts: QLoRA on one task, in minutes.

LoRA (Hu et al. 2021, arXiv 2106.09685) of rank 8 sits on every linear layer of the decoder. It is
trained on top of the 4-bit base that will be served (QLoRA, Dettmers et al. 2023, arXiv
2305.14314). The loss is on the answer only. `expert.train` follows it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one training run.

    steps: optimiser steps.
    epochs: passes over the training examples. Where they are given, they replace the steps.
    warmup_fraction: share of the steps in which the learning rate rises. Then it decays linearly
        to 0.
    Raises ValueError for settings that are not positive.
    """

    steps: int = 300
    epochs: int | None = None
    batch_size: int = 8
    learning_rate: float = 5e-4
    warmup_fraction: float = 0.06
    rank: int = 8
    alpha: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        offenders = [
            f"{name}={value}"
            for name, value in asdict(self).items()
            if name not in ("seed", "warmup_fraction") and value is not None and value <= 0
        ]
        if offenders:
            raise ValueError(
                f"recipe: {', '.join(offenders)}; these must be positive; pass larger values"
            )

    def num_steps(self, num_examples: int) -> int:
        """Optimiser steps on so many training examples."""
        if self.epochs is None:
            return self.steps
        return math.ceil(self.epochs * num_examples / self.batch_size)

    def to_json(self) -> dict[str, Any]:
        """The settings that count: steps or epochs, not both."""
        unused = "epochs" if self.epochs is None else "steps"
        return {name: value for name, value in asdict(self).items() if name != unused}


# Rank 8, alpha 16 and batches of 8 are the default's too (SpectR, arXiv 2504.03454).
PAPER_RECIPE = Recipe(epochs=1, learning_rate=1e-4)
RECIPES = {"default": Recipe(), "paper": PAPER_RECIPE}
