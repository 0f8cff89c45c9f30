"""Whom the requests of a message are for, in plain values, before anything is answered."""

from typing import TypedDict

from spectr_demo.config import DEFAULT_ROUTER
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.snapshot import Snapshot
from spectr_demo.routing.routers import parse_router

NUM_NEAREST = 5


class Nearest(TypedDict):
    """An expert, and how far it stands out in a request: see `routing.detection.standing`."""

    expert: str
    standing: float


class RoutedRequest(TypedDict):
    """One request of a message.

    text: its own part of the message. expert: whom it is for; None where none stands out more than
    `threshold`, and the base answers. standing: of the nearest expert. nearest: the best experts,
    falling.
    """

    text: str
    expert: str | None
    standing: float
    threshold: float
    nearest: list[Nearest]


def routed_requests(
    model: SpectrModel, prompt: str, snapshot: Snapshot | None = None
) -> list[RoutedRequest]:
    """The requests that the default router finds in a prompt, in order.

    snapshot: see `SpectrModel.stream`.
    Raises ValueError for a prompt that is empty or too long to be answered, and where no expert is
    loaded.
    """
    snapshot = snapshot or model.snapshot
    names = snapshot.library.names
    router = parse_router(DEFAULT_ROUTER, names)
    ids = model.encode(prompt)
    if len(ids) >= model.base.context:
        raise ValueError(
            f"the prompt has {len(ids)} tokens; the context of {model.base.name} is "
            f"{model.base.context}: shorten the prompt"
        )
    (lanes,) = model.between_tokens(lambda: snapshot.lanes_of([router], ids))
    threshold = snapshot.reader.least_standing(router)
    assert threshold is not None
    requests: list[RoutedRequest] = []
    for lane in lanes:
        assert lane.standing is not None
        best = lane.standing.sort(descending=True, stable=True)
        nearest = [
            Nearest(expert=names[expert], standing=round(standing, 3))
            for standing, expert in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        requests.append(
            RoutedRequest(
                text=str(model.tokenizer.decode(ids[lane.start : lane.stop])).strip(),
                expert=None if lane.expert is None else names[lane.expert],
                standing=nearest[0]["standing"],
                threshold=round(threshold, 3),
                nearest=nearest[:NUM_NEAREST],
            )
        )
    return requests
