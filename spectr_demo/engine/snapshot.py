"""One state of a model's library: what a run begins with, and uses to its end."""

from collections.abc import Sequence
from dataclasses import dataclass

from spectr_demo.config import RouterConfig
from spectr_demo.engine.plan import Places, RoutingPlan
from spectr_demo.engine.reading import Lane, Reader
from spectr_demo.engine.recorder import Recorder
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.routing.routers import ROUTERS


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """A library, where its experts are in the model, and who reads for them. Its experts' memory is
    freed when the last run that uses it has ended."""

    library: ExpertLibrary
    places: Places
    reader: Reader

    def lanes_of(self, routers: Sequence[RouterConfig], ids: Sequence[int]) -> list[list[Lane]]:
        """What each router answers one by one of a prompt's token ids: its requests, for a router
        that reads them, else all of it at once. The prompt is read once for all of them."""
        reads = [ROUTERS[router.name].reads_request for router in routers]
        read = self.reader.prompt(ids) if any(reads) else None
        return [
            read.lanes(router, self.reader.least_standing(router))
            if read and is_reader
            else [Lane.whole(ids)]
            for router, is_reader in zip(routers, reads, strict=True)
        ]

    def plan(
        self,
        routers: Sequence[RouterConfig],
        prompts: Sequence[Sequence[int]],
        recorder: Recorder | None = None,
    ) -> RoutingPlan:
        """A plan for one batch, with a router and the token ids of a prompt for each row.

        A router that reads the request takes each prompt for one request here. It is cut into lanes
        by `lanes_of`, each of which is a row of `plan_lanes`.
        """
        lanes = [
            self.reader.whole(router, ids)
            if ROUTERS[router.name].reads_request
            else Lane.whole(ids)
            for router, ids in zip(routers, prompts, strict=True)
        ]
        return self.plan_lanes(routers, lanes, recorder)

    def plan_lanes(
        self,
        routers: Sequence[RouterConfig],
        lanes: Sequence[Lane],
        recorder: Recorder | None = None,
        *,
        num_answered: Sequence[int] | None = None,
    ) -> RoutingPlan:
        """A plan for one batch, with a router and a lane for each row.

        num_answered: tokens of each row's answer that were read under another plan; None is a plan
        that reads the lanes, too.
        """
        width = max(len(lane.ids) for lane in lanes)
        is_calibrated = any(router.calibrated for router in routers)
        return RoutingPlan(
            routers,
            self.library.names,
            recorder,
            calibration=self.reader.ordinary.calibration if is_calibrated else None,
            weights={r: lane.weights for r, lane in enumerate(lanes) if lane.weights is not None},
            changed={
                r: self.reader.changed(router, lane.standing)
                for r, (router, lane) in enumerate(zip(routers, lanes, strict=True))
                if router.intervention is not None and lane.standing is not None
            },
            first=[-width] * len(lanes) if num_answered is None else num_answered,
            num_padding=[width - len(lane.ids) for lane in lanes],
            places=self.places,
        )
