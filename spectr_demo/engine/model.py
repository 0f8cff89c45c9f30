"""`SpectrModel`: a base with experts attached, and what every front end calls on it."""

import copy
import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet

from spectr_demo.base.loading import DeviceMap, LoadedBase, load_base
from spectr_demo.base.prompts import Message, Template, check_prompt, encode
from spectr_demo.config import (
    DEFAULT_ROUTER,
    GenerationSettings,
    RouterConfig,
    experts_from_environment,
    unknown_name,
)
from spectr_demo.engine.batch import Batch
from spectr_demo.engine.layers import attach_, detach_, follow, use_, wrap_
from spectr_demo.engine.listing import Listing
from spectr_demo.engine.ordinary import OrdinaryText
from spectr_demo.engine.plan import RoutingPlan
from spectr_demo.engine.reading import Lane, Reader
from spectr_demo.engine.recorder import Recorder
from spectr_demo.engine.run import Run, Step
from spectr_demo.engine.snapshot import Snapshot
from spectr_demo.engine.static import StepHook
from spectr_demo.experts.adapters import Adapter, AdapterError
from spectr_demo.experts.library import ExpertLibrary, Sources, read_adapters
from spectr_demo.experts.preflight import config_of
from spectr_demo.experts.tokenizers import with_template_of
from spectr_demo.routing.calibration import Calibration
from spectr_demo.routing.routers import parse_router

T = TypeVar("T")


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
    """A base model with a library of experts attached, none of them merged into its weights.

    Experts come and go while it runs (`add`, `replace`, `disable`, `enable`, `remove`): a run keeps
    to the experts that it began with, and the next one has the new ones.
    """

    def __init__(self, base: LoadedBase, library: ExpertLibrary) -> None:
        self.base = base
        self.model = base.model
        self.tokenizer = base.tokenizer
        self.template = Template.of(base.tokenizer)
        self._ordinary_text = OrdinaryText()
        self._adapters = library.adapters
        self._changing = threading.Lock()
        self._encoding = threading.Lock()  # a tokenizer has settings that it changes as it encodes
        self._variants: WeakSet[SpectrModel] = WeakSet([self])  # all on this base
        self._is_variant = False
        attach_(self.model, library)
        self.snapshot = self._snapshot_of(library)
        self._hooks = [*follow(self.model), StepHook(self.model)]
        self._batch = Batch(base)

    def _snapshot_of(self, library: ExpertLibrary) -> Snapshot:
        places = wrap_(self.model, library)
        reader = Reader(self.base, library, self.template, places, self._ordinary_text)
        return Snapshot(library=library, places=places, reader=reader)

    @property
    def library(self) -> ExpertLibrary:
        """The experts that the next run has."""
        return self.snapshot.library

    @property
    def reader(self) -> Reader:
        return self.snapshot.reader

    @property
    def calibration(self) -> Calibration:
        """Of every expert, measured when it is first needed."""
        return self.reader.ordinary.calibration

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """Of all experts, those that are disabled too."""
        return self._adapters

    @property
    def most_runs(self) -> int:
        """How many runs make tokens at the same time. Further ones begin when one has ended."""
        return self._batch.most_runs

    @property
    def disabled(self) -> tuple[str, ...]:
        """Names of the experts that are kept, and that no run has."""
        return tuple(a.name for a in self._adapters if a.name not in self.library.names)

    def variant(self) -> "SpectrModel":
        """Another model on the same base, with a library of its own that can change.

        It begins with the experts of this one, and shares their memory until its first change.
        Then its library is a whole one of its own. What it alone has is freed with it. `detach`
        takes all experts off the base.
        """
        with self._changing:
            variant = copy.copy(self)
            variant._is_variant = True
            self._variants.add(variant)
        return variant

    @property
    def listing(self) -> Listing:
        """What `become` takes, in another process."""
        return Listing.of(self._adapters, self.disabled)

    def become(self, listing: Listing) -> None:
        """Have the experts of another model, in one change. Only those that are new are read.

        Raises as `add` does, also where a source holds another adapter than the one that is listed.
        """
        with self._changing:
            known = {(adapter.name, adapter.sha256): adapter for adapter in self._adapters}
            new = [e for e in listing.experts if (e.name, e.sha256) not in known]
            read = self._read([f"{expert.name}={expert.source}" for expert in new])
            known |= {(adapter.name, adapter.sha256): adapter for adapter in read}
            if others := [e for e in new if (e.name, e.sha256) not in known]:
                raise AdapterError(
                    [
                        f"expert {e.name!r}: {e.source} holds another adapter here than where it "
                        "was added; the same files were needed"
                        for e in others
                    ]
                )
            adapters = [known[e.name, e.sha256] for e in listing.experts]
            self._change(adapters, listing.disabled)

    def add(self, source: Sources | Adapter) -> tuple[str, ...]:
        """Add one expert, or several, as `load` takes them, or one that was read. Gives their
        names.

        Only they are measured over ordinary text, and at once where the others were.
        Raises AdapterError, and changes nothing, for adapters that do not fit, and for a name that
        an expert has already, a disabled one too.
        """
        with self._changing:
            new = self._read(source)
            known = {adapter.name: adapter.source for adapter in self._adapters}
            if taken := [adapter for adapter in new if adapter.name in known]:
                raise AdapterError(
                    [
                        f"expert {a.name!r}: there is one of this name already "
                        f"({known[a.name]}); give the new one another, as NAME=SOURCE, or replace "
                        "the old one"
                        for a in taken
                    ]
                )
            self._change([*self._adapters, *new], self.disabled)
        return tuple(adapter.name for adapter in new)

    def replace(self, name: str, source: str | Path | Adapter) -> None:
        """Put another adapter in an expert's place, under its name: one change, not two.

        source: a folder or a Hub id, or one that was read. An expert that is disabled stays so.
        Raises as `add` does, and ValueError for a name that no expert has.
        """
        with self._changing:
            self._require(name)
            found = self._read(source)
            if len(found) != 1:
                raise AdapterError(
                    [
                        f"expert {name!r}: {source} has {len(found)} adapters, needed one to put "
                        "in its place; name the folder of one"
                    ]
                )
            new = dataclasses.replace(found[0], name=name)
            self._change([new if a.name == name else a for a in self._adapters], self.disabled)

    def disable(self, name: str) -> None:
        """Leave an expert out of all further runs. What is known of it is kept, so `enable` takes
        no reading. Raises ValueError for a name that no expert has."""
        with self._changing:
            self._require(name)
            self._change(self._adapters, [*self.disabled, name])

    def enable(self, name: str) -> None:
        """Take an expert in again that was disabled, in its old place."""
        with self._changing:
            self._require(name)
            self._change(self._adapters, [other for other in self.disabled if other != name])

    def remove(self, name: str) -> None:
        """Forget an expert. Without the last one the base alone answers."""
        with self._changing:
            self._require(name)
            self._change([a for a in self._adapters if a.name != name], self.disabled)

    def _require(self, name: str) -> None:
        names = [adapter.name for adapter in self._adapters]
        if name not in names:
            raise unknown_name("expert", name, names)

    def _read(self, source: Sources | Adapter) -> Sequence[Adapter]:
        if isinstance(source, Adapter):
            return [source]
        adapters, problems = read_adapters(source, self.model.config)
        if problems:
            raise AdapterError(problems)
        return adapters

    def _change(self, adapters: Sequence[Adapter], disabled: Sequence[str]) -> None:
        """Have all further runs use those of the adapters that are not disabled. All that can fail
        comes before the first line that changes something."""
        enabled = [adapter for adapter in adapters if adapter.name not in disabled]
        snapshot = self._snapshot_of(ExpertLibrary.from_adapters(enabled, self.model))
        if self.reader.is_measured:  # then the next run need not wait for it
            _ = snapshot.reader.ordinary
        self._begin(tuple(adapters), disabled, snapshot)

    def _begin(
        self, adapters: tuple[Adapter, ...], disabled: Sequence[str], snapshot: Snapshot
    ) -> None:
        """Have all further runs use a snapshot that was made of these."""
        self._adapters, self.snapshot = adapters, snapshot
        self._ordinary_text.keep(a for model in self._variants for a in model.adapters)
        if not self._is_variant:
            use_(self.model, snapshot.places)

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
        snapshot: Snapshot | None = None,
    ) -> Iterator[Step]:
        """Generate with several routers at once, one step per token.

        prompt: the user's message, or a list of chat messages; a base without a chat template
            reads plain text. columns: routers, as `parse_router` takes them.
        trace_every: with `record`, also give a partial trace every so many tokens.
        snapshot: of this model or of a variant: whose experts to use. None is those that there are
            now.
        Closing the iterator cancels the run between two tokens and frees what it holds.
        Raises ValueError at once for an unknown router, an empty prompt, or one that is too long.
        """
        settings = settings or GenerationSettings()
        snapshot = snapshot or self.snapshot
        routers, prompt_ids = self._checked(prompt, columns, settings, snapshot)
        run = Run(
            self.base,
            snapshot,
            routers,
            prompt_ids,
            settings,
            record=record,
            trace_every=trace_every,
        )
        return run.steps(self._batch.start)

    def _checked(
        self,
        prompt: str | Sequence[Message],
        columns: Sequence[str | RouterConfig],
        settings: GenerationSettings,
        snapshot: Snapshot,
    ) -> tuple[list[RouterConfig], list[int]]:
        """The routers, and the prompt's token ids. Raises what `stream` raises."""
        if not columns:
            raise ValueError(
                "there is no column to run; name at least one router, such as 'spectr'"
            )
        routers = [parse_router(column, snapshot.library.names) for column in columns]
        self._check_interventions(routers, snapshot.library.num_layers)
        prompt_ids = self.encode(prompt)
        context = self.base.context
        if len(prompt_ids) + settings.max_new_tokens > context:
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens, and {settings.max_new_tokens} more may "
                f"be generated; the context of {self.base.name} is {context}: shorten one of them"
            )
        return routers, prompt_ids

    def _check_interventions(self, routers: Sequence[RouterConfig], num_layers: int) -> None:
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
        with self._encoding:
            return encode(self.tokenizer, prompt)

    def lanes(self, router: RouterConfig, ids: Sequence[int]) -> list[Lane]:
        """What a router answers one by one of a prompt's token ids, see `lanes_of`."""
        return self.lanes_of([router], ids)[0]

    def lanes_of(self, routers: Sequence[RouterConfig], ids: Sequence[int]) -> list[list[Lane]]:
        """See `Snapshot.lanes_of`, here of the experts that there are now."""
        return self.between_tokens(lambda: self.snapshot.lanes_of(routers, ids))

    def between_tokens(self, function: Callable[[], T]) -> T:
        """What a function gives that has the model read something, called between two tokens of the
        runs that go on."""
        return self._batch.call(function)

    def plan(
        self,
        routers: Sequence[RouterConfig],
        prompts: Sequence[Sequence[int]],
        recorder: Recorder | None = None,
    ) -> RoutingPlan:
        """See `Snapshot.plan`, here of the experts that there are now."""
        return self.snapshot.plan(routers, prompts, recorder)

    def plan_lanes(
        self,
        routers: Sequence[RouterConfig],
        lanes: Sequence[Lane],
        recorder: Recorder | None = None,
    ) -> RoutingPlan:
        """See `Snapshot.plan_lanes`, here of the experts that there are now."""
        return self.snapshot.plan_lanes(routers, lanes, recorder)
