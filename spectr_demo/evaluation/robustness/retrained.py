"""Experts trained again, from another seed or for fewer steps, in the place of one or beside it.

The stress tests (`stress`) spoil experts with noise; these are what real libraries hold: two
experts of one domain by different authors, and one that was trained too little.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation.accuracy import routing_accuracy
from spectr_demo.evaluation.reading import Text, read
from spectr_demo.experts.adapters import Adapter, read_adapter
from spectr_demo.experts.inspection import ExpertSummary, overlaps, warnings
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.routing.routers import parse_router

ROUTERS_TESTED = ("arrow", "spectr", "norm", "spectr-calibrated", "spectr-context")


def read_retrained(source: str, names: Sequence[str]) -> tuple[str, Adapter]:
    """The expert that was trained again, and the adapter. source: NAME=FOLDER.

    The adapter is named after the last two parts of its folder. Raises ValueError or AdapterError.
    """
    name, is_named, folder = source.partition("=")
    if not is_named or name not in names:
        raise ValueError(
            f"retrained expert {source!r}: it must say which expert was trained again, as "
            f"NAME=FOLDER with one of {', '.join(names)}"
        )
    return name, read_adapter(folder, "/".join(Path(folder).parts[-2:]))


def retrained_test(
    engine: SpectrModel, name: str, retrained: Adapter, texts: Sequence[Text]
) -> tuple[dict[str, Any], SpectrModel]:
    """Routing accuracy on the answer tokens of `texts`, by router, as plain JSON values; and the
    engine to go on with, since experts are taken off `engine` and put on again.

    name: of the expert in the engine's library that `retrained` was trained like; texts: of its
    domain. before: with the library as it is. instead: with `retrained` in the expert's place.
    beside: with both, the shares of decisions for `own`, the library's, and for `other`. nll: of
    the answers under each expert alone. overlap: mean subspace overlap of the two. update_norm: of
    `retrained`, as a share of the expert's. warnings: what `inspect` says of both together.
    """
    place = engine.library.index(name)
    adapters = list(engine.library.adapters)
    result: dict[str, Any] = {"expert": name, "retrained": retrained.name}
    result["before"] = _shares(engine, texts, [place])
    nll = {"own": _nll(engine, texts, name)}

    instead = attach(engine, [*adapters[:place], retrained, *adapters[place + 1 :]])
    result["instead"] = _shares(instead, texts, [place])
    nll["other"] = _nll(instead, texts, retrained.name)

    beside = attach(instead, [*adapters, retrained])
    shares = _shares(beside, texts, [place, len(adapters)])
    result["beside"] = {
        router: dict(zip(("own", "other"), both, strict=True)) for router, both in shares.items()
    }
    for key in ("before", "instead"):
        result[key] = {router: share for router, (share,) in result[key].items()}
    both = beside.library
    norms = [
        ExpertSummary.from_adapter(both.adapters[e], both.aligned[e]).update_norm
        for e in (place, len(adapters))
    ]
    result |= {
        "nll": nll,
        "overlap": round(float(overlaps(both)[place, -1]), 4),
        "update_norm": round(norms[1] / norms[0], 4),
        "warnings": [text for text in warnings(both) if retrained.name in text],
    }
    return result, attach(beside, adapters)


def attach(engine: SpectrModel, adapters: Sequence[Adapter]) -> SpectrModel:
    """The same base with other experts; `engine` is not to be used any more."""
    engine.detach()
    return SpectrModel(engine.base, ExpertLibrary.from_adapters(adapters, engine.model))


def _shares(
    engine: SpectrModel, texts: Sequence[Text], experts: Sequence[int]
) -> dict[str, list[float]]:
    """By router: the share of decisions on answer tokens for each of these experts."""
    shares = {}
    for router in ROUTERS_TESTED:
        readings = read(engine, parse_router(router, engine.library.names), texts)
        shares[router] = [
            round(float(routing_accuracy(readings, expert)["answer"]), 4) for expert in experts
        ]
    return shares


def _nll(engine: SpectrModel, texts: Sequence[Text], name: str) -> float:
    config = parse_router(f"single:{name}", engine.library.names)
    return round(float(np.mean([reading.nll for reading in read(engine, config, texts)])), 4)
