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
from spectr_demo.routing.spectr import Score, no_scores, select


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
        if router.calibrated and calibration is None:
            raise ValueError(f"router {router.name!r} is calibrated; its plan needs a calibration")
        self.router = router
        self.rows = list(rows)
        is_plain = router.intervention is None
        # As an index: rows that follow each other are a view, others would be copied.
        is_run = self.rows == list(range(rows[0], rows[-1] + 1))
        self.index = slice(rows[0], rows[-1] + 1) if is_run else self.rows
        self.is_whole = len(rows) == num_rows and is_plain
        self.score: Score = row.score or no_scores
        self.measure = row.measure if is_plain else None  # None leaves the rows to torch
        self.calibration = calibration if router.calibrated else None
        self.num_scored = router.prefilter if row.is_filtered else num_experts

    @property
    def num_chosen(self) -> int:
        """K."""
        assert self.router.top_k is not None
        return self.router.top_k

    def begin_pass(self, num_tokens: int) -> None:
        """That many tokens are read next."""

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
    """The rows of each router that looks at tokens, or at where they stand, in the order in which
    they come."""
    rows: dict[RouterConfig, list[int]] = defaultdict(list)
    for row, router in enumerate(routers):
        if ROUTERS[router.name].score is not None or router.intervention is not None:
            rows[router].append(row)
    return rows
