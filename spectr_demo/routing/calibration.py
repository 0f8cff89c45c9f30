"""Calibration: each expert's scores at each layer, brought to one scale by text of no domain.

An expert whose weights respond to everything wins too often, and layers differ in size. A score is
therefore replaced by `(score - mean) / std`. Mean and standard deviation are those of the same
score, at the same layer, over ordinary chat (the idea is SEQR's, arXiv 2509.18093). No text of a
domain is seen, and nothing is trained.

Axes: N tokens, P projections of a bank, E experts, r rank.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from spectr_demo.config import RouterConfig
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.routers import calibrated_scores
from spectr_demo.routing.spectr import Score

# (P, E) float32 each: a score's mean and standard deviation at a bank.
Statistics = tuple[Tensor, Tensor]


class Calibration:
    """The mean and deviation of each score, by bank, layer and expert."""

    def __init__(self, statistics: Mapping[tuple[ExpertBank, Score], Statistics]) -> None:
        self._statistics = dict(statistics)

    def standardise(self, bank: ExpertBank, score: Score, values: Tensor) -> Tensor:
        """`(values - mean) / std`: values (..., P, E), in standard deviations."""
        mean, std = self.of(bank, score)
        return (values - mean) / std

    def of(self, bank: ExpertBank, score: Score) -> Statistics:
        """Mean and standard deviation of a score at a bank."""
        return self._statistics[bank, score]


class Measurement:
    """Sums the scores of tokens, from which a `Calibration` is made."""

    def __init__(self) -> None:
        self._scores = calibrated_scores()
        self._sums: dict[ExpertBank, Tensor] = {}  # (S, 2, P, E) float64: sums, sums of squares
        self._num_tokens: dict[ExpertBank, int] = {}

    def add(self, bank: ExpertBank, z: Tensor) -> None:
        """z: (N, P, E, r) of N tokens at a bank."""
        config = RouterConfig(name="spectr")  # no calibrated score reads its settings
        scores = torch.stack([f(z, bank.singular_values, config) for f in self._scores]).double()
        sums = torch.stack([scores.sum(1), scores.square().sum(1)], dim=1)  # (S, 2, P, E)
        self._sums[bank] = self._sums.get(bank, 0) + sums
        self._num_tokens[bank] = self._num_tokens.get(bank, 0) + len(z)

    def calibration(self) -> Calibration:
        """From all tokens that were added."""
        statistics: dict[tuple[ExpertBank, Score], Statistics] = {}
        for bank, sums in self._sums.items():
            mean, of_squares = (sums / self._num_tokens[bank]).unbind(1)
            variance = (of_squares - mean.square()).clamp(min=0)
            # An expert that never responds has no deviation, and its scores stay 0.
            is_flat = variance <= (1e-6 * mean).square() + 1e-24
            std = torch.where(is_flat, 1.0, variance.sqrt())
            for score, one_mean, one_std in zip(self._scores, mean, std, strict=True):
                statistics[bank, score] = one_mean.float(), one_std.float()
        return Calibration(statistics)
