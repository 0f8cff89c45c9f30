"""The routers: score each expert for each token from the experts' own weights, select, weigh.

Axes: R rows (columns of a comparison), T tokens, P projections that read one input, E experts, K
selected, r rank. All scores are functions of `z = A* x`, the token in the experts' aligned bases,
so one product serves them all.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from spectr_demo.config import RouterConfig
from spectr_demo.cpu import token as kernels
from spectr_demo.cpu.numbers import Ids
from spectr_demo.cpu.token import Choices, Factors, MixedToken, Pool, Rule
from spectr_demo.engine.recorder import Recorder
from spectr_demo.routing.bank import ExpertBank, Mixed
from spectr_demo.routing.calibration import Calibration
from spectr_demo.routing.context import EvidencePool, lead
from spectr_demo.routing.routers import ROUTERS, _constant_weight
from spectr_demo.routing.spectr import Score, arrow_scores, lag_scores, norm_scores, select

if TYPE_CHECKING:
    from spectr_demo.engine.reading import FirstReading

# Copying an expert's factor for a token, and multiplying by the copy, takes as long as multiplying
# one token by this many experts, and its calls as long as this many more; with more tokens a
# product is so many times as fast for each.
_COPY, _CALLS, _REUSE = 2, 16, 16
_RECORDED_AT_ONCE = 64
# What compiled code measures for them; all others take `kernels.LENGTH`.
_MEASURES: dict[Score, int] = {arrow_scores: kernels.FIRST, norm_scores: kernels.OUTPUT}


class RoutingPlan:
    """The routers of one run, one per row of its batch, and what the run records.

    It belongs to its run: layers find it in the context of the thread that runs the model.
    """

    def __init__(
        self,
        routers: Sequence[RouterConfig],
        expert_names: Sequence[str],
        recorder: Recorder | None = None,
        *,
        calibration: Calibration | None = None,
        is_evidence: Tensor | None = None,
        first_reading: "FirstReading | None" = None,
        least_leads: Mapping[RouterConfig, float] | None = None,
        newline_ids: Tensor | None = None,
    ) -> None:
        """calibration: needed where a router is calibrated. is_evidence: (R, T) bool, False where
        routers that pool have nothing to learn: padding, template, a prompt that was read before.
        first_reading: needed where a router reads first; of the prompts of these routers' rows, in
        their order. least_leads: of the routers with a confidence, what an expert's lead must
        exceed. newline_ids: (N,) int64 tokens after which a router that reads first takes up again
        what the prompt asked for; None is none."""
        self.routers = tuple(routers)
        self.recorder = recorder
        self.is_base_only = all(router.name == "base" for router in routers)
        self._groups = _make_groups(routers, len(expert_names), calibration, is_evidence)
        for group in self._groups:
            if group.router.confidence is not None:
                group.least = (least_leads or {})[group.router]
            if group.router.reads_first:
                group.continue_from(first_reading)
        self._newline_ids = newline_ids
        # With K = 1 both compositions are the same product, and `outputs` is the shorter way.
        is_merged = [r.composition == "parameters" and r.top_k != 1 for r in routers]
        self._has_merged, self._all_merged = any(is_merged), all(is_merged)
        self._is_merged = torch.tensor(is_merged)[:, None, None, None, None]  # (R, 1, 1, 1, 1)
        constant = [
            [_constant_weight(r, name, len(expert_names)) for name in expert_names] for r in routers
        ]
        self._constant = torch.tensor(constant)  # (R, E)
        self._constant_of: dict[ExpertBank, Tensor] = {}
        # Where no row scores, the experts that none uses need not be computed with; and weights
        # that are the same for all rows are put into the factors once.
        self._used: Tensor | None = None  # (E,) those used, by their weights; None is all of them
        self._is_folded = False
        if not self._groups:
            used = (self._constant != 0).any(0)
            is_few = not used.all()
            self._is_folded = len(set(self.routers)) == 1 and (is_few or self._all_merged)
            if self._is_folded:
                self._used, is_merged = self._constant[0], [False] * len(routers)
            elif is_few:
                self._used = used
        self._used_of: dict[ExpertBank, ExpertBank | None] = {}
        self._rows_merged = np.array(is_merged)
        is_one = len(self._groups) == 1 and self._groups[0].is_whole
        self._only_group = self._groups[0] if is_one else None
        # Of the banks of which a layer is still to run.
        self._mixed: dict[ExpertBank, Mixed | MixedToken] = {}
        # Memory for one token.
        self._tokens: dict[ExpertBank, MixedToken] = {}

    def begin_pass(self, input_ids: Tensor) -> None:
        """input_ids: (R, T), which the layers read next."""
        if self._newline_ids is None or all(group.pool is None for group in self._groups):
            return
        is_newline = torch.isin(input_ids, self._newline_ids)
        for group in self._groups:
            if group.pool is not None:
                group.pool.begin_lines(is_newline if group.is_whole else is_newline[group.some])

    def constant_weights(self, bank: ExpertBank) -> Tensor:
        """(R, 1, P, E) float32 weights of the rows that do not look at tokens; 0 for the others."""
        if bank not in self._constant_of:
            weights = self._constant[:, bank.expert_ids].to(bank.A.device)
            self._constant_of[bank] = weights[:, None, None].repeat(1, 1, len(bank.paths), 1)
        return self._constant_of[bank]

    def weights(self, bank: ExpertBank, z: Tensor) -> Tensor:
        """Weight of each expert for each token: (R, T, P, E) float32 from z (R, T, P, E, r)."""
        constant = self.constant_weights(bank)
        if not self._groups:
            return constant.expand(z.shape[:4])
        if self._only_group is not None:
            experts, _, chosen = self._choose(self._only_group, bank, z)
            return torch.zeros(z.shape[:4], device=z.device).scatter_(-1, experts, chosen)
        weights = constant.expand(z.shape[:4]).clone()
        for group in self._groups:
            experts, _, chosen = self._choose(group, bank, z[group.some])
            scattered = weights.new_zeros(len(group.rows), *z.shape[1:4])
            weights[group.some] = scattered.scatter_(-1, experts, chosen)
        return weights

    def _choose(
        self, group: "_Group", bank: ExpertBank, z: Tensor, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a group's rows choose among the experts of z (R, T, P, E, r): their places there, in
        the bank, and their weights, (R, T, P, K) each. kept: (R, T, P, E) where those of z are in
        the bank; None where z has all of it."""
        experts, weights, top = select(group.scores(bank, z), group.router, group.least)
        places = experts if kept is None else kept.gather(-1, experts)
        if self.recorder is not None:
            for i, row in enumerate(group.rows):
                self.recorder.add_choice(bank, row, places[i], weights[i], top[i])
        return experts, places, weights

    def mix(self, bank: ExpertBank, x: Tensor) -> Mixed:
        """What the bank's layers multiply by B*, from their input x (R, T, D_in).

        `outputs`: sum_e w_e B*_e A*_e x. `parameters`: (sum_e w_e B*_e)(sum_e w_e A*_e) x, whose
        cross terms are part of SpectR. Both are one product with the stacked factors, or with
        copies of the chosen ones where all rows share a router and that is less to read.
        """
        if self._is_folded:
            return Mixed.of(bank.project(x), None)
        group, kept = self._only_group, None
        (R, T, _), E = x.shape, bank.num_experts
        if group is None or not _copying_pays(group.router.top_k or E, R * T, E):
            z = bank.project(x)
            return Mixed.of(self._weigh(self.weights(bank, z).to(z.dtype), z), None)
        if _copying_pays(group.num_filtered, R * T, E):
            kept = bank.project_first(x).float().abs().topk(group.num_filtered, dim=-1).indices
            z = bank.project_chosen(x, kept)
        else:
            z = bank.project(x)
        experts, places, weights = self._choose(group, bank, z, kept)
        z = z.gather(-2, experts.unsqueeze(-1).expand(*experts.shape, z.shape[-1]))
        return Mixed.of(self._weigh(weights.to(z.dtype), z), places)

    def _add_token_(self, y: Tensor, bank: ExpertBank, factors: Factors, x: Tensor) -> MixedToken:
        """`mix` for one token of each row on a CPU, and `add` at the bank's first layer: y
        (R, 1, D_out) and x (R, 1, D_in), in compiled code."""
        token = self._tokens.get(bank)
        if token is None:
            token = self._tokens[bank] = self._make_token(bank, factors)
        places = y.data_ptr(), x.data_ptr(), x.dtype == torch.bfloat16
        A, B = factors.A, factors.B[0]
        if not self._groups:
            kernels.project_and_add_at(token.records[0], *places, A, B)
            return token
        arrows, last = bank.arrows if token.is_filtered else None, len(self._groups) - 1
        for i, (group, record) in enumerate(zip(self._groups, token.records, strict=True)):
            if self.recorder is not None and token.choices[i].is_full:
                token.choices[i] = self._new_choices(group, bank, record)
            pool = group.pool_of_token(bank)
            kernels.route_and_add_at(record, *places, A, arrows, B, pool, i == 0, i == last)
        return token

    def _make_token(self, bank: ExpertBank, factors: Factors) -> MixedToken:
        P, E, r = factors.singular_values.shape
        R, group, kept = len(self.routers), self._only_group, None
        if group is not None and group.num_filtered < E:
            kept = np.empty((R, P, group.num_filtered), np.int64)
        shape = R, P, E if kept is None else kept.shape[2]
        weights = np.ones(shape, np.float32)  # where rows are constant and the factors hold theirs
        if kept is None and not self._is_folded:
            weights = self.constant_weights(bank)[:, 0].numpy().copy()
        arrays = np.empty((*shape, r), np.float32), weights, self._rows_merged, kept
        bind = partial(kernels.bind, *arrays, factors.singular_values)
        records = [bind(group.rule(bank), group.row_ids) for group in self._groups]
        pairs = zip(self._groups, records, strict=True)
        choices = [self._new_choices(group, bank, record) for group, record in pairs]
        return MixedToken(factors.B, tuple(records or [bind()]), choices, kept is not None, arrays)

    def _new_choices(self, group: "_Group", bank: ExpertBank, record: Ids) -> Choices:
        """Memory for what a group's rows choose at a bank: of one token, or of many to record."""
        K = min(group.router.top_k or bank.num_experts, bank.num_experts)
        num_tokens = 1 if self.recorder is None else _RECORDED_AT_ONCE
        choices = Choices.empty(num_tokens, len(group.rows), len(bank.paths), K)
        kernels.bind_choices(record, choices)
        if self.recorder is not None:
            self.recorder.add_tokens(bank, group.rows, choices)
        return choices

    def _weigh(self, weights: Tensor, z: Tensor) -> Tensor:
        """(R, T, P, K, r) from weights (R, T, P, K) and z (R, T, P, K, r)."""
        if self._has_merged:
            merged = weights.unsqueeze(-2) @ z  # (R, T, P, 1, r)
            z = merged if self._all_merged else torch.where(self._is_merged.to(z.device), merged, z)
        return weights.unsqueeze(-1) * z

    def add(self, y: Tensor, bank: ExpertBank, place: int, x: Tensor) -> Tensor:
        """A layer's output y (R, T, D_out) with the experts' contribution to it.

        The layers of a bank run in the order of their places, and all read x: the first one mixes
        for all of them.
        """
        used = self._with_used(bank)
        if used is None:
            return y
        if place == 0:
            mixed = self._mix_and_add_(y, used, x)
            if len(bank.paths) > 1:
                self._mixed[bank] = mixed
            return y
        is_last = place == len(bank.paths) - 1
        mixed = self._mixed.pop(bank) if is_last else self._mixed[bank]
        if isinstance(mixed, MixedToken):
            return mixed.add_(y, place)
        return used.add_(y, mixed, place)

    def _mix_and_add_(self, y: Tensor, bank: ExpertBank, x: Tensor) -> Mixed | MixedToken:
        """What the bank's layers add, and that of the first one added to its y, in place."""
        factors = bank.compiled
        if factors is not None and kernels.can_route(x, y):
            return self._add_token_(y, bank, factors, x)
        mixed = self.mix(bank, x)
        bank.add_(y, mixed, 0)
        return mixed

    def _with_used(self, bank: ExpertBank) -> ExpertBank | None:
        """The bank with the experts that some row may use; None if it has none of them."""
        if self._used is None:
            return bank
        if bank not in self._used_of:
            is_merged = self._is_folded and self._all_merged
            self._used_of[bank] = bank.folded(self._used[bank.expert_ids], is_merged=is_merged)
        return self._used_of[bank]


def _make_groups(
    routers: Sequence[RouterConfig],
    num_experts: int,
    calibration: Calibration | None,
    is_evidence: Tensor | None,
) -> list["_Group"]:
    rows_of: dict[RouterConfig, list[int]] = defaultdict(list)
    for row, router in enumerate(routers):
        if ROUTERS[router.name].score is not None:
            rows_of[router].append(row)
    return [
        _Group(router, rows, len(routers), num_experts, calibration, is_evidence)
        for router, rows in rows_of.items()
    ]


class _Group:
    """The rows of a run that share one router."""

    def __init__(
        self,
        router: RouterConfig,
        rows: list[int],
        num_rows: int,
        num_experts: int,
        calibration: Calibration | None,
        is_evidence: Tensor | None,
    ) -> None:
        self.router = router
        self.rows, self.row_ids = rows, np.array(rows)
        # The rows as an index: rows that follow each other are a view, others would be copied.
        is_run = rows == list(range(rows[0], rows[-1] + 1))
        self.some = slice(rows[0], rows[-1] + 1) if is_run else rows
        self.is_whole = len(rows) == num_rows
        score = ROUTERS[router.name].score
        assert score is not None
        self._score = score
        if router.calibrated and calibration is None:
            raise ValueError(f"router {router.name!r} is calibrated; its plan needs a calibration")
        self._calibration = calibration if router.calibrated else None
        self._is_evidence = None if is_evidence is None else is_evidence[rows]
        self.pool: EvidencePool | None = None
        # LAG needs the whole z of few experts; what is pooled needs that of all.
        is_filtered = score is lag_scores and router.decay is None
        self.num_filtered = router.prefilter if is_filtered else num_experts
        self._rules: dict[ExpertBank, Rule] = {}
        self.least: float | None = None  # the best expert's score must exceed it
        if router.decay is not None:
            self.pool = EvidencePool(router.decay, num_experts, self._is_evidence)
            self.least = 0.0  # evidence of 0 is none at all

    def continue_from(self, first_reading: "FirstReading | None") -> None:
        """Start from what the same rows have read before."""
        if first_reading is None or self._is_evidence is None:
            raise ValueError(
                f"router {self.router.name!r} reads the prompt first; its plan needs that reading: "
                "make it with `SpectrModel.plan`"
            )
        self.pool, num_lines = first_reading.pool(self.router)
        self.pool.read_again(self._is_evidence, num_lines, self.least)

    def scores(self, bank: ExpertBank, z: Tensor) -> Tensor:
        """(R, T, P, E) float32 from z (R, T, P, E, r): the score, as the router asks."""
        scores = self._score(z, bank.singular_values, self.router)
        if self._calibration is not None:
            scores = self._calibration.standardise(bank, self._score, scores)
        if self.pool is None:
            return scores
        evidence = self.pool.add(bank, scores)
        return evidence if self.router.confidence is None else lead(evidence)

    def rule(self, bank: ExpertBank) -> Rule:
        """For compiled code: how to score and choose."""
        if bank not in self._rules:
            self._rules[bank] = self._make_rule(bank)
        return self._rules[bank]

    def pool_of_token(self, bank: ExpertBank) -> Pool | None:
        """For compiled code: the pool, with the next token begun."""
        if self.pool is None:
            return None
        is_lead = self.router.confidence is not None
        return self.pool.of_token(bank, len(self.rows), is_lead=is_lead)

    def _make_rule(self, bank: ExpertBank) -> Rule:
        shape = bank.singular_values.shape[:2]
        mean, std = torch.zeros(shape), torch.ones(shape)
        if self._calibration is not None:
            mean, std = self._calibration.of(bank, self._score)
        config = self.router
        return Rule(
            measure=_MEASURES.get(self._score, kernels.LENGTH),
            num_kept=config.prefilter if self._score is lag_scores else bank.num_experts,
            mean=mean.numpy(),
            std=std.numpy(),
            temperature=config.temperature if config.weighting == "softmax" else 0.0,
            least=-np.inf if self.least is None else self.least,
        )


def _copying_pays(num_chosen: int, num_tokens: int, num_experts: int) -> bool:
    """Whether copies of what each token chose are faster than a product with all experts."""
    copies = _COPY * num_chosen * num_tokens + _CALLS
    return copies < num_experts * max(1, num_tokens / _REUSE)
