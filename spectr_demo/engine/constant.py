"""The rows of a run that do not look at tokens: bare base, single expert, uniform merge.

Axes: R rows, P projections of a bank, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from spectr_demo.config import RouterConfig
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.routers import ROUTERS


class ConstantRows:
    """The weights of these rows, 0 for rows that score.

    Where no row scores, two things are saved. Experts that no row uses are left out of the banks.
    Where all rows have the same weights, and not all experts are used or their factors are merged,
    the weights are put into the factors: `is_folded`.
    """

    def __init__(
        self, routers: Sequence[RouterConfig], expert_names: Sequence[str], is_merged: list[bool]
    ) -> None:
        rows = [ROUTERS[router.name].constant(router, expert_names) for router in routers]
        self._weights = torch.tensor(rows)  # (R, E)
        self._weights_of: dict[ExpertBank, Tensor] = {}
        self._used_of: dict[ExpertBank, ExpertBank | None] = {}
        self._used: Tensor | None = None  # (E,) not 0 for those used; None is all of them
        self.is_folded = False
        self._is_merged = all(is_merged)
        if any(ROUTERS[router.name].score for router in routers):
            return
        used = (self._weights != 0).any(0)
        is_few = not used.all()
        self.is_folded = len(set(routers)) == 1 and bool(is_few or self._is_merged)
        if self.is_folded:
            self._used = self._weights[0]
        elif is_few:
            self._used = used

    def of(self, bank: ExpertBank) -> Tensor:
        """(R, 1, P, E) float32."""
        if bank not in self._weights_of:
            weights = self._weights[:, bank.expert_ids].to(bank.A.device)
            self._weights_of[bank] = weights[:, None, None].repeat(1, 1, len(bank.paths), 1)
        return self._weights_of[bank]

    def used(self, bank: ExpertBank) -> ExpertBank | None:
        """The bank with the experts that some row may use; None if it has none of them."""
        if self._used is None:
            return bank
        if bank not in self._used_of:
            is_merged = self.is_folded and self._is_merged
            self._used_of[bank] = bank.folded(self._used[bank.expert_ids], is_merged=is_merged)
        return self._used_of[bank]
