"""The rows of the tables: which routers, merges and bounds are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from spectr_demo.config import DEFAULT_ROUTER, RouterConfig
from spectr_demo.routing.routers import ROUTERS, parse_router

MERGE_SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row of the tables. router: a spec of `parse_router`, or a config; `{own}` in a spec is
    the expert of the prompt's own domain. is_merge: a static merge instead of the experts."""

    label: str
    router: str | RouterConfig
    is_merge: bool = False

    def config(self, own: str, names: Sequence[str]) -> RouterConfig:
        router = self.router
        return parse_router(router.format(own=own) if isinstance(router, str) else router, names)


_UNIFORM_PARAMETERS = RouterConfig(name="uniform", composition="parameters")
_CONTEXT = ROUTERS["spectr-context"].preset
CONTENDERS = (
    Contender(label="base", router="base"),
    Contender(label="oracle", router="single:{own}"),
    Contender(label="uniform (outputs)", router="uniform"),
    Contender(label="uniform (parameters)", router=_UNIFORM_PARAMETERS),
    Contender(label="TIES", router="single:ties", is_merge=True),
    *(
        Contender(label=f"DARE, seed {seed}", router=f"single:dare-{seed}", is_merge=True)
        for seed in MERGE_SEEDS
    ),
    Contender(label="arrow", router="arrow"),
    Contender(label="lag", router="lag"),
    Contender(label="norm", router="norm"),
    Contender(label="spectr-paper", router="spectr-paper"),
    Contender(label="spectr", router="spectr"),
    Contender(label="spectr-calibrated", router="spectr-calibrated"),
    # What else it is made of is measured by whom it names, in `requests.py`.
    Contender(label="context, always an expert", router=replace(_CONTEXT, confidence=None)),
    Contender(label="spectr-context", router="spectr-context"),
)
QUICK = ("base", "oracle", "arrow", "spectr", "spectr-context")
# Those that answer messages with several requests, beside the bounds of `composition.py`.
COMPOSED = (
    *("base", "uniform (outputs)", "TIES", "arrow", "lag", "spectr-paper", "spectr"),
    DEFAULT_ROUTER,
)
