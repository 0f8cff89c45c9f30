"""The rows of a run that share one router which looks at tokens, and how they choose experts.

Axes: R rows, T tokens, P projections of a bank, E experts, K selected, r rank.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import Tensor

from spectr_demo.config import RouterConfig
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.calibration import Calibration
from spectr_demo.routing.routers import ROUTERS
from spectr_demo.routing.spectr import Score, select


class RouterRows:
    """One router, and the rows that it serves."""

    def __init__(
        self,
        router: RouterConfig,
        rows: Sequence[int],
        *,
        num_rows: int,
        num_experts: int,
        calibration: Calibration | None = None,
    ) -> None:
        """num_rows: of the batch. num_experts: of the library. calibration: needed where the router
        is calibrated."""
        row = ROUTERS[router.name]
        assert row.score is not None
        if router.calibrated and calibration is None:
            raise ValueError(f"router {router.name!r} is calibrated; its plan needs a calibration")
        self.router = router
        self.rows = list(rows)
        # As an index: rows that follow each other are a view, others would be copied.
        is_run = self.rows == list(range(rows[0], rows[-1] + 1))
        self.index = slice(rows[0], rows[-1] + 1) if is_run else self.rows
        self.is_whole = len(rows) == num_rows
        self.score: Score = row.score
        self.measure = row.measure
        self.calibration = calibration if router.calibrated else None
        self.num_scored = router.prefilter if row.is_filtered else num_experts

    def scores(self, bank: ExpertBank, z: Tensor) -> Tensor:
        """(R, T, P, E) float32 from z (R, T, P, E, r): the score, as the router asks."""
        scores = self.score(z, bank.singular_values, self.router)
        if self.calibration is None:
            return scores
        return self.calibration.standardise(bank, self.score, scores)

    def choose(self, bank: ExpertBank, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Experts, weights and scores (R, T, P, K) from z (R, T, P, E, r), see `select`."""
        return select(self.scores(bank, z), self.router)


def by_router(routers: Sequence[RouterConfig]) -> Mapping[RouterConfig, list[int]]:
    """The rows of each router that looks at tokens, in the order in which they come."""
    rows: dict[RouterConfig, list[int]] = defaultdict(list)
    for row, router in enumerate(routers):
        if ROUTERS[router.name].score is not None:
            rows[router].append(row)
    return rows
