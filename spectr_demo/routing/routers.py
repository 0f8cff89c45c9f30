"""The table of routers. A new router is one function in `routing/spectr.py` and one row here.

A router that looks at tokens has a `score`. One that does not has `constant` weights. The page, the
command line, the engine and compiled code all follow the row; what is measured is listed in
`evaluation/contenders.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from spectr_demo.config import RouterConfig, unknown_name
from spectr_demo.routing.spectr import Score, arrow_scores, lag_scores, norm_scores, spectr_scores

# From the router's settings and the names of E experts to E weights.
Constant = Callable[[RouterConfig, Sequence[str]], list[float]]
# What of z (r,) compiled code measures: its length, its first entry, or the length of S z.
Measure = Literal["length", "first", "output"]


def no_expert(config: RouterConfig, expert_names: Sequence[str]) -> list[float]:
    """The base alone: all weights are 0."""
    return [0.0] * len(expert_names)


def one_expert(config: RouterConfig, expert_names: Sequence[str]) -> list[float]:
    """1 for the expert that the router names."""
    return [float(name == config.expert) for name in expert_names]


def all_experts(config: RouterConfig, expert_names: Sequence[str]) -> list[float]:
    """1/E for each."""
    return [1 / len(expert_names)] * len(expert_names)


@dataclass(frozen=True, kw_only=True)
class Router:
    """A row of the table.

    sentence: what it does, for people who read no equations.
    constant: the weights of a router that looks at nothing. score: of one that looks at each token.
    reads_request: whether it reads each request before it is answered, and keeps its choice; see
    `routing/detection.py`. is_filtered: it scores only the `prefilter` experts with the best arrow
    score. measure: how compiled code computes the score; None leaves the router to torch, which
    gives the same and is slower on a CPU. default_top_k: the K of a config that names none, made
    smaller where there are fewer experts.
    """

    key: str
    display_name: str
    sentence: str
    equation: str
    paper: str
    preset: RouterConfig
    constant: Constant = no_expert
    score: Score | None = None
    reads_request: bool = False
    is_filtered: bool = False
    measure: Measure | None = None
    default_top_k: int = 1

    @property
    def chooses(self) -> bool:
        """Whether it chooses among the experts by what it reads."""
        return self.score is not None or self.reads_request

    def __post_init__(self) -> None:
        if self.is_filtered and self.measure == "output":
            raise ValueError(
                f"router {self.key!r} is filtered and measured by its output; compiled code has no "
                "singular values of the experts that a filter keeps: leave its measure out"
            )


_ROWS = (
    Router(
        key="base",
        display_name="Base model",
        sentence="No expert: the base answers alone.",
        equation="w = 0",
        paper="baseline",
        preset=RouterConfig(name="base"),
    ),
    Router(
        key="single",
        display_name="Single expert",
        sentence="One expert, named beforehand, serves every token.",
        equation="w = onehot(e)",
        paper="baseline",
        preset=RouterConfig(name="single", expert="NAME"),
        constant=one_expert,
    ),
    Router(
        key="uniform",
        display_name="Uniform merge",
        sentence="All experts at once, each with the same weight.",
        equation="w_e = 1/E",
        paper="baseline: PEFT's `cat` merge (`outputs`), or `linear` (`parameters`)",
        preset=RouterConfig(name="uniform"),
        constant=all_experts,
    ),
    Router(
        key="arrow",
        display_name="Arrow",
        sentence="Each token in each layer takes the 3 experts with the nearest main direction.",
        equation="|a*_e . x|",
        paper="Arrow, arXiv 2405.11157; PEFT's defaults",
        preset=RouterConfig(name="arrow", weighting="softmax"),
        score=arrow_scores,
        measure="first",
        default_top_k=3,
    ),
    Router(
        key="spectr",
        display_name="SpectR",
        sentence="Each token in each layer takes the expert whose input subspace holds most of it.",
        equation="||A*_e x||",
        paper="SpectR, arXiv 2504.03454; K = 1",
        preset=RouterConfig(name="spectr", composition="parameters"),
        score=spectr_scores,
        measure="length",
    ),
    Router(
        key="spectr-paper",
        display_name="SpectR (paper)",
        sentence="SpectR with the 4 best experts at once, their factors merged, as in the paper.",
        equation="||A*_e x||",
        paper="SpectR, arXiv 2504.03454; the paper's K = 4",
        preset=RouterConfig(name="spectr-paper", composition="parameters"),
        score=spectr_scores,
        measure="length",
        default_top_k=4,
    ),
    Router(
        key="spectr-calibrated",
        display_name="SpectR, calibrated",
        sentence="SpectR with each expert's score beside what ordinary text gives that expert.",
        equation="(||A*_e x|| - mean_e) / std_e",
        paper="this project's; standardised scores as in SEQR, arXiv 2509.18093",
        preset=RouterConfig(name="spectr-calibrated", calibrated=True),
        score=spectr_scores,
        measure="length",
    ),
    Router(
        key="spectr-context",
        display_name="SpectR in context",
        sentence="Each request is read first; one expert, or none, then serves all of it.",
        equation="mean over the layers that read the request of how far ||A*_e x|| stands out",
        paper="this project's: in the metric of ordinary text, each request in a lane of its own",
        preset=RouterConfig(name="spectr-context", confidence=0.9),
        reads_request=True,
    ),
    Router(
        key="lag",
        display_name="LAG",
        sentence="SpectR among the 20 experts that Arrow likes best: cheaper where there are many.",
        equation="||A*_e x|| among the F best |a*_e . x|",
        paper="LAG, arXiv 2507.05346; F = 20",
        preset=RouterConfig(name="lag"),
        score=lag_scores,
        is_filtered=True,
        measure="length",
    ),
    Router(
        key="norm",
        display_name="Norm",
        sentence="Each token in each layer takes the expert whose output for it is the longest.",
        equation="||B_e A_e x||",
        paper="norm maximisation, SEQR, arXiv 2509.18093",
        preset=RouterConfig(name="norm"),
        score=norm_scores,
        measure="output",
    ),
)
ROUTERS = {row.key: row for row in _ROWS}


def calibrated_scores() -> list[Score]:
    """The scores that can be calibrated: of every router that scores all experts."""
    rows = ROUTERS.values()
    return list(dict.fromkeys(row.score for row in rows if row.score and not row.is_filtered))


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
    if not row.chooses:
        overrides = {"composition": overrides.get("composition")} if row.key == "uniform" else {}
    config = replace(config, **{key: v for key, v in overrides.items() if v is not None})
    named = [] if config.expert is None else [config.expert]
    if config.intervention is not None:
        named.append(config.intervention.expert)
    for expert in named:
        if expert not in expert_names:
            raise unknown_name("expert", expert, expert_names)
    if not row.chooses:
        return config
    if config.calibrated and (row.is_filtered or row.reads_request):
        others = [key for key, other in ROUTERS.items() if other.score and not other.is_filtered]
        raise ValueError(
            f"router {row.key!r} cannot be calibrated: it does not score all experts for a token; "
            f"there is {', '.join(map(repr, others))}"
        )
    return replace(config, top_k=_checked_top_k(config, row, expert_names))


def _checked_top_k(config: RouterConfig, row: Router, expert_names: Sequence[str]) -> int:
    num_experts = len(expert_names)
    if num_experts == 0:
        raise ValueError(f"router {row.key!r} has no expert to choose from; load at least one")
    num_kept = config.prefilter if row.is_filtered else num_experts
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
