"""The routers: score each expert for each token from the experts' own weights, select, weigh.

Axes: R rows (columns of a comparison), T tokens, P projections that read one input, E experts, K
selected, r rank. All scores are functions of `z = A* x`, the token in the experts' aligned bases,
so one product serves them all.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from spectr_demo.base.loading import LoadedBase
from spectr_demo.base.prompts import encode, generic_prompts, shared_length, template_opening
from spectr_demo.config import RouterConfig
from spectr_demo.engine.layers import routed
from spectr_demo.engine.plan import RoutingPlan, _make_groups
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.calibration import Calibration
from spectr_demo.routing.context import EvidencePool
from spectr_demo.routing.routers import STANDARDISED


class Listening(RoutingPlan):
    """The plan of a pass in which the experts add nothing to the base and are only listened to."""

    def __init__(self) -> None:
        super().__init__([], [])
        self.is_base_only = False

    def listen(self, bank: ExpertBank, x: Tensor) -> None:
        """What to do with the input x (R, T, D_in) of a bank's layers."""
        raise NotImplementedError

    def add(self, y: Tensor, bank: ExpertBank, place: int, x: Tensor) -> Tensor:
        if place == 0:
            self.listen(bank, x)
        return y


class FirstReading(Listening):
    """Prompts, read by the bare base for the routers that read first."""

    def __init__(
        self,
        routers: Sequence[RouterConfig],
        expert_names: Sequence[str],
        *,
        calibration: Calibration,
        num_lines: Sequence[int],
        is_evidence: Tensor,
    ) -> None:
        """routers: those that read first, one per prompt. num_lines: of each prompt's request; each
        line is a row, the prompt up to there. is_evidence: (rows, T) bool over the rows, which are
        padded on the left; True for the line and the template after it."""
        super().__init__()
        self._num_lines = list(zip(routers, num_lines, strict=True))
        rows = [router for router, num in self._num_lines for _ in range(num)]
        self._groups = _make_groups(rows, len(expert_names), calibration, is_evidence)

    def listen(self, bank: ExpertBank, x: Tensor) -> None:
        z = bank.project(x)
        for group in self._groups:
            group.scores(bank, z if group.is_whole else z[group.some])

    def pool(self, router: RouterConfig) -> tuple[EvidencePool, list[int]]:
        """What the rows of this router have read; and how many lines each prompt has."""
        group = next(group for group in self._groups if group.router == router)
        assert group.pool is not None
        return group.pool, [num for reader, num in self._num_lines if reader == router]


_ROWS_AT_ONCE = 8


class _Statistics(Listening):
    """Sums the scores of the tokens that count."""

    def __init__(self, is_evidence: Tensor, totals: dict[ExpertBank, Tensor]) -> None:
        super().__init__()
        self._is_evidence = is_evidence
        self._totals = totals

    def listen(self, bank: ExpertBank, x: Tensor) -> None:
        z = bank.project(x)
        config = RouterConfig(name="spectr")
        scores = torch.stack([f(z, bank.singular_values, config) for f in STANDARDISED])
        is_evidence = self._is_evidence.to(z.device)[..., None, None]
        scores = torch.where(is_evidence, scores, 0).double()  # (S, R, T, P, E)
        sums = torch.stack([scores.sum((1, 2)), scores.square().sum((1, 2))], dim=1)
        self._totals[bank] = self._totals.get(bank, 0) + sums


def calibrate(base: LoadedBase, library: ExpertLibrary) -> Calibration:
    """Read the generic prompts as the bare base does, and listen to every expert at every layer."""
    tokenizer, totals = base.tokenizer, dict[ExpertBank, Tensor]()
    opening = template_opening(tokenizer)
    texts = [encode(tokenizer, prompt) for prompt in generic_prompts()]
    texts.sort(key=len)
    decoder, device = base.model.get_decoder(), base.device
    num_tokens = 0
    for start in range(0, len(texts), _ROWS_AT_ONCE):
        rows = texts[start : start + _ROWS_AT_ONCE]
        width = max(map(len, rows))
        # Padding on the right needs no mask of attention: nothing looks ahead.
        input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        is_evidence = torch.tensor(
            [[shared_length(opening, row) <= t < len(row) for t in range(width)] for row in rows]
        )
        num_tokens += int(is_evidence.sum())
        with torch.inference_mode(), routed(_Statistics(is_evidence.to(device), totals)):
            decoder(input_ids=input_ids.to(device), use_cache=False)
    statistics = {}
    for bank, sums in totals.items():
        mean, of_squares = (sums / num_tokens).unbind(1)
        variance = (of_squares - mean.square()).clamp(min=0)
        # An expert that never responds has no deviation, and its scores stay 0.
        is_flat = variance <= (1e-6 * mean).square() + 1e-24
        std = torch.where(is_flat, 1.0, variance.sqrt())
        statistics[bank] = torch.stack([mean, std], dim=1).float()  # (S, 2, P, E)
    return Calibration(statistics)
