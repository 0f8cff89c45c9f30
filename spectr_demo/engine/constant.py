"""The rows of a run that do not look at tokens: bare base, single expert, uniform merge, and those
whose router has read the request before.

Axes: R rows, P projections of a bank, E experts.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from spectr_demo.config import RouterConfig
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.routers import ROUTERS


class ConstantRows:
    """The weights of these rows, 0 for rows that score and for those with an intervention.

    Where no row scores, two things are saved. Experts that no row uses are left out of the banks.
    Where all rows have the same weights, and not all experts are used or their factors are merged,
    the weights are put into the factors: `is_folded`.
    """

    def __init__(
        self,
        routers: Sequence[RouterConfig],
        expert_names: Sequence[str],
        is_merged: list[bool],
        weights: Mapping[int, Tensor],
    ) -> None:
        """weights: (E,) of the rows whose router has read the request."""
        for row, router in enumerate(routers):
            if ROUTERS[router.name].reads_request and row not in weights:
                raise ValueError(
                    f"router {router.name!r} reads the request first; its plan needs the weights "
                    "that come of it: make it with `SpectrModel.plan`"
                )
        rows = [
            weights[row]
            if row in weights
            else torch.tensor(ROUTERS[router.name].constant(router, expert_names))
            for row, router in enumerate(routers)
        ]
        self.unchanged = torch.stack(rows)  # (R, E), also of rows with an intervention
        is_changed = torch.tensor([router.intervention is not None for router in routers])
        self._weights = torch.where(is_changed[:, None], 0, self.unchanged)
        self.is_none = not self._weights.any()
        self._weights_of: dict[ExpertBank, Tensor] = {}
        self._used_of: dict[ExpertBank, ExpertBank | None] = {}
        self._used: Tensor | None = None  # (E,) not 0 for those used; None is all of them
        self.is_folded = False
        self._is_merged = all(is_merged)
        if is_changed.any() or any(ROUTERS[router.name].score for router in routers):
            return
        used = (self._weights != 0).any(0)
        is_few = not used.all()
        is_one = len(set(is_merged)) == 1 and bool((self._weights == self._weights[0]).all())
        self.is_folded = is_one and bool(is_few or self._is_merged)
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
