"""What the layers chose during one run, kept as what they computed until the run ends."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectr_demo.cpu.token import Choices
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.trace import NOT_ROUTED

Choice = tuple[Tensor, Tensor, Tensor]  # expert places in the bank, weights, scores: (T, P, K) each


@dataclass
class _Tokens:
    rows: Sequence[int]
    choices: Choices
    num_joined: int = 0


class Recorder:
    """Collects choices and hidden states; nothing is moved or copied while the model runs."""

    def __init__(self) -> None:
        self._choices: dict[tuple[int, ExpertBank], list[Choice]] = defaultdict(list)
        # Where compiled code writes what single tokens choose.
        self._tokens: dict[ExpertBank, list[_Tokens]] = defaultdict(list)
        self._hidden: list[Tensor] = []

    def add_choice(
        self, bank: ExpertBank, row: int, experts: Tensor, weights: Tensor, scores: Tensor
    ) -> None:
        """experts, weights, scores: (T, P, K) of one row, for the tokens of this pass."""
        self._join_tokens(bank)
        self._keep(bank, row, (experts, weights, scores))

    def add_tokens(self, bank: ExpertBank, rows: Sequence[int], choices: Choices) -> None:
        """Of passes of one token, for these rows: memory that is filled as they come."""
        self._tokens[bank].append(_Tokens(rows, choices))

    def _join_tokens(self, bank: ExpertBank) -> None:
        """Keep what single tokens have chosen since the last time."""
        for tokens in self._tokens[bank]:
            places, weights, scores, num = tokens.choices
            new = slice(tokens.num_joined, int(num[0]))
            tokens.num_joined = new.stop
            for i, row in enumerate(tokens.rows if new.start < new.stop else ()):
                of_row = (torch.from_numpy(part[new, i]) for part in (places, weights, scores))
                self._keep(bank, row, cast(Choice, tuple(of_row)))
        self._tokens[bank] = [tokens for tokens in self._tokens[bank] if not tokens.choices.is_full]

    def _keep(self, bank: ExpertBank, row: int, choice: Choice) -> None:
        self._choices[row, bank].append(choice)

    def add_hidden(self, hidden: Tensor) -> None:
        """hidden: (R, T, D), the decoder's last hidden states for the tokens of this pass."""
        self._hidden.append(hidden)

    def hidden(self) -> Tensor:
        """(R, T, D) over all tokens read so far."""
        self._hidden = [torch.cat(self._hidden, dim=1)]
        return self._hidden[0]

    def choices(self, bank: ExpertBank, row: int) -> Choice:
        """Those of one row over all tokens read so far."""
        self._join_tokens(bank)
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
            chosen, weight, score = (
                part[: num_tokens - 1].cpu().numpy() for part in self.choices(bank, row)
            )
            T, _, K = chosen.shape
            chosen = np.where(weight > 0, bank.expert_ids.numpy()[chosen], NOT_ROUTED)
            score = np.where(weight > 0, score, np.nan)
            for p, (layer, projection) in enumerate(zip(*library.places(bank), strict=True)):
                place = np.s_[:T, layer, projection, :K]
                experts[place], weights[place] = chosen[:, p], weight[:, p]
                scores[place] = score[:, p]
        return experts, weights, scores
