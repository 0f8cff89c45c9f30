"""`SpectrModel`: a base with experts attached, and what every front end calls on it."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from spectr_demo.base.loading import DeviceMap, LoadedBase, load_base
from spectr_demo.base.prompts import Message, check_prompt, encode
from spectr_demo.config import (
    DEFAULT_ROUTER,
    GenerationSettings,
    RouterConfig,
    experts_from_environment,
)
from spectr_demo.engine.layers import attach_, detach_, follow
from spectr_demo.engine.plan import RoutingPlan
from spectr_demo.engine.reading import Lane, Reader
from spectr_demo.engine.recorder import Recorder
from spectr_demo.engine.run import Run, Step
from spectr_demo.engine.static import StepHook
from spectr_demo.experts.adapters import AdapterError
from spectr_demo.experts.library import ExpertLibrary, Sources, read_adapters
from spectr_demo.experts.preflight import config_of
from spectr_demo.experts.tokenizers import with_template_of
from spectr_demo.routing.calibration import Calibration
from spectr_demo.routing.routers import ROUTERS, parse_router


def load(
    base: str | None = None,
    experts: Sources | None = None,
    *,
    device_map: DeviceMap | None = None,
) -> "SpectrModel":
    """The routed model: a base in 4-bit, and LoRA experts on it.

    base: Hub id or folder of a causal language model; None is `SPECTR_BASE_MODEL`, or the embedded
        default. experts: Hub ids or folders of PEFT adapters, one or several, `NAME=SOURCE` to
        rename one; None is `SPECTR_EXPERTS`, or the shipped ones. device_map: spreads a base that
        is too large for one GPU, such as "auto"; see `load_base`.
    Raises one AdapterError with all that is wrong with the experts, before the base is loaded.
    """
    sources = experts_from_environment() if experts is None else experts
    adapters, problems = read_adapters(sources, config_of(base))
    if problems:
        raise AdapterError(problems)
    loaded = with_template_of(load_base(base, device_map=device_map), adapters)
    return SpectrModel(loaded, ExpertLibrary.from_adapters(adapters, loaded.model))


class SpectrModel:
    """A base model with a library of experts attached, none of them merged into its weights."""

    def __init__(self, base: LoadedBase, library: ExpertLibrary) -> None:
        self.base = base
        self.library = library
        self.model = base.model
        self.tokenizer = base.tokenizer
        self.reader = Reader(base, library)
        self.template = self.reader.template
        attach_(self.model, library)
        self._hooks = [*follow(self.model), StepHook(self.model)]

    def detach(self) -> None:
        """Take the experts off again: `self.model` is then the base as it was loaded."""
        for hook in self._hooks:
            hook.remove()
        detach_(self.model)

    def generate(
        self,
        prompt: str | Sequence[Message],
        router: str | RouterConfig = DEFAULT_ROUTER,
        **settings: Any,
    ) -> str:
        """The answer of one router, as text. settings: fields of `GenerationSettings`."""
        return self.compare(prompt, [router], record=False, **settings).columns[0].text

    def compare(
        self,
        prompt: str | Sequence[Message],
        columns: Sequence[str | RouterConfig],
        *,
        record: bool = True,
        **settings: Any,
    ) -> Step:
        """Run the columns side by side to their end. settings: fields of `GenerationSettings`."""
        run = self.stream(prompt, columns, GenerationSettings(**settings), record=record)
        return deque(run, maxlen=1).pop()

    def stream(
        self,
        prompt: str | Sequence[Message],
        columns: Sequence[str | RouterConfig],
        settings: GenerationSettings | None = None,
        *,
        record: bool = False,
        trace_every: int | None = None,
    ) -> Iterator[Step]:
        """Generate with several routers at once, one step per token.

        prompt: the user's message, or a list of chat messages; a base without a chat template
            reads plain text. columns: routers, as `parse_router` takes them.
        trace_every: with `record`, also give a partial trace every so many tokens.
        Closing the iterator cancels the run between two tokens and frees what it holds.
        Raises ValueError at once for an unknown router, an empty prompt, or one that is too long.
        """
        settings = settings or GenerationSettings()
        if not columns:
            raise ValueError(
                "there is no column to run; name at least one router, such as 'spectr'"
            )
        routers = [parse_router(column, self.library.names) for column in columns]
        self._check_interventions(routers)
        prompt_ids = self.encode(prompt)
        context = self.base.context
        if len(prompt_ids) + settings.max_new_tokens > context:
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens, and {settings.max_new_tokens} more may "
                f"be generated; the context of {self.base.name} is {context}: shorten one of them"
            )
        run = Run(
            self.base,
            self.library,
            routers,
            prompt_ids,
            settings,
            lambda: self.lanes_of(routers, prompt_ids),
            self.plan_lanes,
            record=record,
            trace_every=trace_every,
        )
        return run.steps()

    def _check_interventions(self, routers: Sequence[RouterConfig]) -> None:
        num_layers = self.library.num_layers
        for router in routers:
            layers = router.intervention and router.intervention.layers
            if layers and layers[1] >= num_layers:
                raise ValueError(
                    f"the intervention names layers {layers[0]} to {layers[1]}; "
                    f"{self.base.name} has 0 to {num_layers - 1}"
                )

    def check(self, prompt: str | Sequence[Message]) -> None:
        """Raise ValueError for a prompt that is empty, no text, or far too long. Unlike the
        tokenizer this may be called beside a run."""
        check_prompt(prompt, self.base.context)

    def encode(self, prompt: str | Sequence[Message]) -> list[int]:
        """Token ids of a prompt in the base's chat template. Raises ValueError as `check` does."""
        self.check(prompt)
        return encode(self.tokenizer, prompt)

    def lanes(self, router: RouterConfig, ids: Sequence[int]) -> list[Lane]:
        """What a router answers one by one of a prompt's token ids, see `lanes_of`."""
        return self.lanes_of([router], ids)[0]

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
        by `lanes`, each of which is a row of `plan_lanes`.
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
    ) -> RoutingPlan:
        """A plan for one batch, with a router and a lane for each row."""
        width = max(len(lane.ids) for lane in lanes)
        return RoutingPlan(
            routers,
            self.library.names,
            recorder,
            calibration=self.calibration if any(r.calibrated for r in routers) else None,
            weights={r: lane.weights for r, lane in enumerate(lanes) if lane.weights is not None},
            changed={
                r: self.reader.changed(router, lane.standing)
                for r, (router, lane) in enumerate(zip(routers, lanes, strict=True))
                if router.intervention is not None and lane.standing is not None
            },
            num_prompt=width,
            num_padding=[width - len(lane.ids) for lane in lanes],
        )

    @property
    def calibration(self) -> Calibration:
        """Of every expert, measured when it is first needed."""
        return self.reader.ordinary.calibration
