"""The routers: score each expert for each token from the experts' own weights, select, weigh.

Axes: R rows (columns of a comparison), T tokens, P projections that read one input, E experts, K
selected, r rank. All scores are functions of `z = A* x`, the token in the experts' aligned bases,
so one product serves them all.
"""

from collections.abc import Mapping

from torch import Tensor

from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.routers import STANDARDISED
from spectr_demo.routing.spectr import Score


class Calibration:
    """What text of no domain says about each score, by layer and expert: mean and deviation."""

    def __init__(self, statistics: Mapping[ExpertBank, Tensor]) -> None:
        """statistics: (S, 2, P, E) float32 of each bank: the scores in the order of `STANDARDISED`,
        the two statistics, the bank's layers and experts."""
        self._statistics = {bank: [tuple(of) for of in each] for bank, each in statistics.items()}

    def standardise(self, bank: ExpertBank, score: Score, values: Tensor) -> Tensor:
        """`(values - mean) / std`: values (R, T, P, E), in standard deviations."""
        mean, std = self.of(bank, score)
        return (values - mean) / std

    def of(self, bank: ExpertBank, score: Score) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (P, E) float32 each."""
        mean, std = self._statistics[bank][STANDARDISED.index(score)]
        return mean, std
