"""What the layers chose during one run, kept as the tensors they computed until the run ends."""

from collections import defaultdict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectr_demo.bank import ExpertBank
from spectr_demo.experts import ExpertLibrary
from spectr_demo.trace import NOT_ROUTED

Choice = tuple[Tensor, Tensor, Tensor]  # expert places in the bank, weights, scores: (T, P, K) each


class Recorder:
    """Collects choices and hidden states; nothing is moved or copied while the model runs."""

    def __init__(self) -> None:
        self._choices: dict[tuple[int, ExpertBank], list[Choice]] = defaultdict(list)
        self._hidden: list[Tensor] = []

    def add_choice(
        self, bank: ExpertBank, row: int, experts: Tensor, weights: Tensor, scores: Tensor
    ) -> None:
        """experts, weights, scores: (T, P, K) of one row, for the tokens of this pass."""
        self._choices[row, bank].append((experts, weights, scores))

    def add_hidden(self, hidden: Tensor) -> None:
        """hidden: (R, T, D), the decoder's last hidden states for the tokens of this pass."""
        self._hidden.append(hidden)

    def hidden(self) -> Tensor:
        """(R, T, D) over all tokens read so far."""
        self._hidden = [torch.cat(self._hidden, dim=1)]
        return self._hidden[0]

    def choices(self, bank: ExpertBank, row: int) -> Choice:
        """Those of one row over all tokens read so far."""
        passes = self._choices[row, bank]
        experts, weights, scores = map(torch.cat, zip(*passes, strict=True))
        self._choices[row, bank] = [(experts, weights, scores)]  # need not be joined again
        return experts, weights, scores

    def routing(
        self, library: ExpertLibrary, row: int, num_tokens: int, top_k: int
    ) -> tuple[NDArray[np.int16], NDArray[np.float32], NDArray[np.float32]]:
        """A scored row's experts (ids of the library), weights and scores: (T, L, P, K) arrays.

        The last of the `num_tokens` tokens was written but never read: it has no routing.
        """
        shape = (num_tokens, library.num_layers, len(library.projections), top_k)
        experts = np.full(shape, NOT_ROUTED, np.int16)
        weights = np.zeros(shape, np.float32)
        scores = np.full(shape, np.nan, np.float32)
        for bank in library.banks:
            chosen, weight, score = (p[: num_tokens - 1].cpu() for p in self.choices(bank, row))
            T, _, K = chosen.shape
            place = np.s_[:T, *library.places(bank), :K]
            experts[place] = np.where(weight > 0, bank.expert_ids[chosen], NOT_ROUTED)
            weights[place] = weight.numpy()
            scores[place] = np.where(weight > 0, score, np.nan)
        return experts, weights, scores
