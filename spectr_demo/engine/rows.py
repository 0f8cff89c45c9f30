"""The rows of a run that share one router, and how they choose experts.

Axes: R rows, T tokens, P projections of a bank, E experts, K selected, r rank.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import Tensor

from spectr_demo.config import RouterConfig
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.calibration import Calibration
from spectr_demo.routing.context import EvidencePool, Start, lead
from spectr_demo.routing.routers import ROUTERS
from spectr_demo.routing.spectr import Score, select


class RouterRows:
    """One router, the rows that it serves, and the evidence they have pooled."""

    def __init__(
        self,
        router: RouterConfig,
        rows: Sequence[int],
        *,
        num_rows: int,
        num_experts: int,
        calibration: Calibration | None = None,
        is_evidence: Tensor | None = None,
        start: Start | None = None,
        least_lead: float | None = None,
    ) -> None:
        """num_rows: of the batch. num_experts: of the library. The others as `RoutingPlan` has
        them, for this router."""
        row = ROUTERS[router.name]
        assert row.score is not None
        if router.calibrated and calibration is None:
            raise ValueError(f"router {router.name!r} is calibrated; its plan needs a calibration")
        if router.reads_first and start is None:
            raise ValueError(
                f"router {router.name!r} reads the prompt first; its plan needs that reading: "
                "make it with `SpectrModel.plan`"
            )
        self.router = router
        self.rows = list(rows)
        # As an index: rows that follow each other are a view, others would be copied.
        is_run = self.rows == list(range(rows[0], rows[-1] + 1))
        self.index = slice(rows[0], rows[-1] + 1) if is_run else self.rows
        self.is_whole = len(rows) == num_rows
        self.score: Score = row.score
        self.measure = row.measure
        self.calibration = calibration if router.calibrated else None
        self.pool: EvidencePool | None = None
        if router.decay is not None:
            some = None if is_evidence is None else is_evidence[self.rows]
            self.pool = EvidencePool(router.decay, num_experts, some, start)
        self.num_scored = router.prefilter if row.is_filtered else num_experts
        # LAG needs the whole z of few experts; what is pooled needs that of all.
        self.num_filtered = num_experts if self.pool else self.num_scored
        # What the best score must exceed, or no expert is used. Evidence of 0 is none at all.
        self.least = (0.0 if least_lead is None else least_lead) if self.pool else None

    def begin_pass(self, input_ids: Tensor, is_newline: Tensor | None) -> None:
        """The layers read input_ids (R, T) next, of all rows of the batch."""
        if self.pool is not None:
            some = None if is_newline is None else is_newline[self.index]
            num_tokens, device = input_ids.shape[1], input_ids.device
            self.pool.begin_pass(len(self.rows), num_tokens, is_newline=some, device=device)

    def scores(self, bank: ExpertBank, z: Tensor) -> Tensor:
        """(R, T, P, E) float32 from z (R, T, P, E, r): the score, as the router asks."""
        scores = self.score(z, bank.singular_values, self.router)
        if self.calibration is not None:
            scores = self.calibration.standardise(bank, self.score, scores)
        if self.pool is None:
            return scores
        evidence = self.pool.add(bank, scores)
        return evidence if self.router.confidence is None else lead(evidence)

    def choose(self, bank: ExpertBank, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Experts, weights and scores (R, T, P, K) from z (R, T, P, E, r), see `select`."""
        return select(self.scores(bank, z), self.router, self.least)


def by_router(routers: Sequence[RouterConfig]) -> Mapping[RouterConfig, list[int]]:
    """The rows of each router that scores, in the order in which they come."""
    rows: dict[RouterConfig, list[int]] = defaultdict(list)
    for row, router in enumerate(routers):
        if ROUTERS[router.name].score is not None:
            rows[router].append(row)
    return rows
