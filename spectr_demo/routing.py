"""The routers: score each expert for each token from the experts' own weights, select, weigh.

Axes: R rows (columns of a comparison), T tokens, P projections that read one input, E experts, K
selected, r rank. All scores are functions of `z = A* x`, the token in the experts' aligned bases,
so one product serves them all.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectr_demo import kernels
from spectr_demo.bank import ExpertBank, Mixed
from spectr_demo.config import RouterConfig, unknown_name
from spectr_demo.kernels import Choices, Factors, Ids, MixedToken, Pool, Rule
from spectr_demo.pooling import EvidencePool, lead
from spectr_demo.recorder import Recorder

Score = Callable[[Tensor, Tensor, RouterConfig], Tensor]
# Copying an expert's factor for a token, and multiplying by the copy, takes as long as multiplying
# one token by this many experts, and its calls as long as this many more; with more tokens a
# product is so many times as fast for each.
_COPY, _CALLS, _REUSE = 2, 16, 16
_RECORDED_AT_ONCE = 64


def spectr_scores(z: Tensor, singular_values: Tensor, config: RouterConfig) -> Tensor:
    """Length of the token's projection on each expert's input subspace, `||A*_e x||_2`.

    z: (R, T, P, E, r). Returns (R, T, P, E) float32, in the units of x: comparable between experts
    for one token, not between tokens (SpectR, Fleshman & Van Durme 2025, arXiv 2504.03454, eq. 5).
    """
    return torch.linalg.vector_norm(z, dim=-1, dtype=torch.float32)


def arrow_scores(z: Tensor, singular_values: Tensor, config: RouterConfig) -> Tensor:
    """Length along each expert's first singular direction, `|a*_e . x|`; its sign is arbitrary.

    z: (R, T, P, E, r). Returns (R, T, P, E) float32 (Arrow, Ostapenko et al. 2024, arXiv
    2405.11157).
    """
    return z[..., 0].float().abs()


def lag_scores(z: Tensor, singular_values: Tensor, config: RouterConfig) -> Tensor:
    """SpectR's score for the `prefilter` experts with the best arrow score, -inf for the others.

    z: (R, T, P, E, r). Returns (R, T, P, E) float32 (LAG, arXiv 2507.05346).
    """
    num_kept = min(config.prefilter, z.shape[-2])
    scores = spectr_scores(z, singular_values, config)
    if num_kept == z.shape[-2]:
        return scores
    kept = arrow_scores(z, singular_values, config).topk(num_kept, dim=-1).indices
    return torch.full_like(scores, -torch.inf).scatter(-1, kept, scores.gather(-1, kept))


def norm_scores(z: Tensor, singular_values: Tensor, config: RouterConfig) -> Tensor:
    """Length of each expert's output, `||B_e A_e x||_2 = ||S A*_e x||_2` since U is orthonormal.

    z: (R, T, P, E, r), singular_values: (P, E, r). Returns (R, T, P, E) float32 (SEQR, arXiv
    2509.18093).
    """
    return torch.linalg.vector_norm(z.float() * singular_values, dim=-1)


# The scores that can be calibrated. LAG's cannot: most experts have none.
STANDARDISED: tuple[Score, ...] = (spectr_scores, arrow_scores, norm_scores)
# What compiled code measures for them; all others take `kernels.LENGTH`.
_MEASURES: dict[Score, int] = {arrow_scores: kernels.FIRST, norm_scores: kernels.OUTPUT}


@dataclass(frozen=True, kw_only=True)
class Router:
    """A row of the table. score is None where the weights are constant; default_top_k is the K of
    a config that names none, made smaller where there are fewer experts."""

    key: str
    display_name: str
    equation: str
    paper: str
    preset: RouterConfig
    score: Score | None = None
    default_top_k: int = 1


_ROWS = (
    Router(
        key="base",
        display_name="Base model",
        equation="w = 0",
        paper="baseline",
        preset=RouterConfig(name="base"),
    ),
    Router(
        key="single",
        display_name="Single expert",
        equation="w = onehot(e)",
        paper="baseline",
        preset=RouterConfig(name="single", expert="NAME"),
    ),
    Router(
        key="uniform",
        display_name="Uniform merge",
        equation="w_e = 1/E",
        paper="baseline: PEFT's `cat` merge (`outputs`), or `linear` (`parameters`)",
        preset=RouterConfig(name="uniform"),
    ),
    Router(
        key="arrow",
        display_name="Arrow",
        equation="|a*_e . x|",
        paper="Arrow, arXiv 2405.11157; PEFT's defaults",
        preset=RouterConfig(name="arrow", weighting="softmax"),
        score=arrow_scores,
        default_top_k=3,
    ),
    Router(
        key="spectr",
        display_name="SpectR",
        equation="||A*_e x||",
        paper="SpectR, arXiv 2504.03454; K = 1",
        preset=RouterConfig(name="spectr", composition="parameters"),
        score=spectr_scores,
    ),
    Router(
        key="spectr-paper",
        display_name="SpectR (paper)",
        equation="||A*_e x||",
        paper="SpectR, arXiv 2504.03454; the paper's K = 4",
        preset=RouterConfig(name="spectr-paper", composition="parameters"),
        score=spectr_scores,
        default_top_k=4,
    ),
    Router(
        key="spectr-calibrated",
        display_name="SpectR, calibrated",
        equation="(||A*_e x|| - mean_e) / std_e",
        paper="this project's; standardised scores as in SEQR, arXiv 2509.18093",
        preset=RouterConfig(name="spectr-calibrated", calibrated=True),
        score=spectr_scores,
    ),
    Router(
        key="spectr-context",
        display_name="SpectR in context",
        equation="mean over the text so far of (||A*_e x|| - mean_e) / std_e where e is the best",
        paper="this project's: calibrated, pooled, prompt read first",
        preset=RouterConfig(
            name="spectr-context",
            weighting="softmax",
            temperature=0.02,
            calibrated=True,
            decay=0.9,
            reads_first=True,
            confidence=0.6,
        ),
        score=spectr_scores,
        default_top_k=2,
    ),
    Router(
        key="lag",
        display_name="LAG",
        equation="||A*_e x|| among the F best |a*_e . x|",
        paper="LAG, arXiv 2507.05346; F = 20",
        preset=RouterConfig(name="lag"),
        score=lag_scores,
    ),
    Router(
        key="norm",
        display_name="Norm",
        equation="||B_e A_e x||",
        paper="norm maximisation, SEQR, arXiv 2509.18093",
        preset=RouterConfig(name="norm"),
        score=norm_scores,
    ),
)
ROUTERS = {row.key: row for row in _ROWS}


def parse_router(
    spec: str | RouterConfig, expert_names: Sequence[str], **overrides: Any
) -> RouterConfig:
    """`"spectr"`, `"single:sql"` or a config -> a config checked against these experts.

    overrides: fields of `RouterConfig` that replace a preset's where not None. They apply to
    routers that score; of the constant ones only `uniform` has a choice, its composition.
    Raises ValueError for an unknown router or expert, and for a top_k that the experts cannot fill.
    """
    if isinstance(spec, str):
        name, _, expert = spec.strip().partition(":")
        if name not in ROUTERS:
            raise unknown_name("router", name, ROUTERS)
        config = replace(ROUTERS[name].preset, expert=expert or None)
    else:
        config = spec
        if config.name not in ROUTERS:
            raise unknown_name("router", config.name, ROUTERS)
    row = ROUTERS[config.name]
    if row.score is None:
        overrides = {"composition": overrides.get("composition")} if row.key == "uniform" else {}
    config = replace(config, **{key: v for key, v in overrides.items() if v is not None})
    if config.expert is not None and config.expert not in expert_names:
        raise unknown_name("expert", config.expert, expert_names)
    if row.score is None:
        return config
    if config.calibrated and row.score not in STANDARDISED:
        raise ValueError(
            f"router {row.key!r} cannot be calibrated: it scores only some experts for a token; "
            "calibrate 'spectr', 'arrow' or 'norm'"
        )
    return replace(config, top_k=_checked_top_k(config, row, expert_names))


def _checked_top_k(config: RouterConfig, row: Router, expert_names: Sequence[str]) -> int:
    num_experts = len(expert_names)
    if num_experts == 0:
        raise ValueError(f"router {row.key!r} has no expert to choose from; load at least one")
    num_kept = config.prefilter if row.score is lag_scores else num_experts
    if config.top_k is None:
        return min(row.default_top_k, num_experts, num_kept)
    if config.top_k > num_experts:
        raise ValueError(
            f"router {row.key!r} has top_k {config.top_k}, but there are only {num_experts} "
            f"experts ({', '.join(expert_names)}); choose top_k from 1 to {num_experts}"
        )
    if config.top_k > num_kept:
        raise ValueError(
            f"router {row.key!r} has top_k {config.top_k}, but its filter keeps only {num_kept} "
            "experts; lower top_k or raise prefilter"
        )
    return config.top_k


def select(
    scores: Tensor, config: RouterConfig, least: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The K experts with the best scores, and their weights.

    scores: (..., E) float32. Returns expert indices (..., K) int64, weights (..., K) float32 that
    are >= 0 and sum to 1 or 0, and the K scores. K is `top_k`, or E where a layer has fewer.
    Weights are 1/K (SpectR), or the softmax of the K scores over `temperature` (Arrow). They are 0
    where even the best score is not above `least`: there the base answers alone.
    """
    assert config.top_k is not None
    top, indices = scores.topk(min(config.top_k, scores.shape[-1]), dim=-1)
    if config.weighting == "softmax":
        # The lead is divided, not the score, whose rounding a low temperature would magnify.
        weights = torch.softmax((top - top[..., :1]) / config.temperature, dim=-1)
    else:
        weights = torch.full_like(top, 1 / top.shape[-1])
    if least is not None:
        weights = weights * (top[..., :1] > least)
    return indices, weights, top


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

    def continue_from(self, first_reading: FirstReading | None) -> None:
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


def _constant_weight(router: RouterConfig, expert: str, num_experts: int) -> float:
    if router.name == "uniform":
        return 1 / num_experts
    return float(router.name == "single" and router.expert == expert)
