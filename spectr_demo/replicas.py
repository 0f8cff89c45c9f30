"""Several processes that run one model, with Ray Serve.

The *front* holds the page, the API, the line and the visitors' sessions. Its model answers what it
is asked for itself, such as how a prompt is read, but each run goes to a *replica*: another process
with the same model, on this machine or another one. A run says which experts the front has. A
replica that has others takes those over before it begins. Experts that one visitor has alone stay
in the front, with the visitor's runs.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from spectr_demo.base.loading import load_base
from spectr_demo.config import GenerationSettings, base_from_environment
from spectr_demo.engine.listing import Listing
from spectr_demo.engine.model import SpectrModel, load
from spectr_demo.engine.run import Step
from spectr_demo.engine.snapshot import Snapshot
from spectr_demo.experts.adapters import Adapter, local_folder
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.workers import import_ray, share

APP = "spectr"
NAMESPACE = "serve"  # Serve's own, which the replicas see
CHANGE_SECONDS = 600  # for all replicas to have other experts
LEAVE_SECONDS = 600  # for the runs of a replica that is no longer needed
TRIES = 5  # to begin a run whose replica dies before the first token


@dataclass(frozen=True, kw_only=True)
class Edition:
    """The experts that the front has. number: rises with each change."""

    number: int
    listing: Listing


class OutdatedError(Exception):
    """A run asks for experts that there were before the last change."""


class Board:
    """Where a replica that starts finds the edition."""

    def __init__(self, edition: Edition) -> None:
        self._edition = edition

    def post(self, edition: Edition) -> None:
        self._edition = edition

    def read(self) -> Edition:
        return self._edition


class Engine:
    """A replica: it runs what the front sends."""

    def __init__(self, base: str | None, template: Any) -> None:
        """template: of the front's tokenizer, which may be one that an expert brought."""
        ray = import_ray()
        loaded = load_base(base)
        loaded.tokenizer.chat_template = template
        self.model = SpectrModel(loaded, ExpertLibrary.from_adapters([], loaded.model))
        self.edition = Edition(number=-1, listing=self.model.listing)
        self._changing = threading.Lock()
        # One for each run that goes on or is about to; asyncio's own are few where cores are.
        self._threads = ThreadPoolExecutor(64)
        board = ray.get_actor(APP, NAMESPACE)
        self._take_over(ray.get(board.read.remote()))

    async def take_over(self, edition: Edition) -> None:
        """Have the front's experts. Runs that go on keep theirs.

        Raises AdapterError, and changes nothing, where this machine does not have them."""
        await self._in_thread(self._take_over, edition)

    async def steps(self, edition: Edition, *asked: Any, **options: Any) -> AsyncIterator[Step]:
        """A run with the experts of that edition; the rest is as `SpectrModel.stream` takes it.

        Cancelling it ends the run within two tokens. Raises OutdatedError before the first step.
        """
        run = await self._in_thread(self._begin, edition, asked, options)
        going: asyncio.Future[Step | None] | None = None
        try:
            while True:
                going = self._in_thread(next, run, None)
                step = await asyncio.shield(going)  # a thread cannot be cancelled
                if step is None:
                    return
                yield step
        finally:
            if going is not None:
                await asyncio.wait([going])
            await self._in_thread(run.close)

    def _in_thread(self, function: Callable[..., Any], *given: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(self._threads, function, *given)

    def _begin(self, edition: Edition, asked: Any, options: dict[str, Any]) -> Iterator[Step]:
        with self._changing:  # so that no change comes between
            self._have(edition)
            return self.model.stream(*asked, **options)

    def _take_over(self, edition: Edition) -> None:
        with self._changing:
            self._have(edition)

    def _have(self, edition: Edition) -> None:
        if edition.number < self.edition.number:
            raise OutdatedError
        if edition.listing != self.edition.listing:
            self.model.become(edition.listing)
            if self.model.library.names:
                _ = self.model.reader.ordinary  # now, so that no run waits for it
        self.edition = edition


class ReplicatedModel(SpectrModel):
    """The front's model: it answers what it is asked for itself, but its runs go to replicas."""

    def deploy(
        self, base: str | None, least: int, most: int, resources: Mapping[str, float]
    ) -> None:
        """Start the replicas, once. base: as `load` takes it. least, most: replicas; resources: of
        one of them, as `share` has them.

        Raises RuntimeError where they do not start.
        """
        from ray import serve

        runs_each = super().most_runs
        self._most_runs = most * runs_each
        number: dict[str, Any] = {"num_replicas": least}
        if most > least:
            # Counted are runs that go on in a replica or wait for a place in one.
            bounds = {"min_replicas": least, "max_replicas": most}
            number = {"autoscaling_config": {**bounds, "target_ongoing_requests": runs_each}}
        self.ray = import_ray()
        self.edition = Edition(number=0, listing=self.listing)
        board = self.ray.remote(num_cpus=0)(Board).options(name=APP, namespace=NAMESPACE)
        self._board = board.remote(self.edition)
        deployment: Any = serve.deployment(
            Engine,
            name="engine",
            max_ongoing_requests=runs_each,
            max_constructor_retry_count=3,
            graceful_shutdown_timeout_s=LEAVE_SECONDS,
            ray_actor_options=dict(resources),
            **number,
        )
        serve.start(proxy_location="Disabled")  # nothing asks the replicas but this process
        base = base or base_from_environment()
        if base and (folder := local_folder(base)):
            base = str(folder.resolve())  # a replica may be at work elsewhere
        template = self.tokenizer.chat_template
        self._handle = serve.run(deployment.bind(base, template), name=APP, route_prefix=None)

    @property
    def most_runs(self) -> int:
        """In all replicas that there may be. Those that wait for one to start are among them."""
        return self._most_runs

    def stream(
        self,
        prompt: Any,
        columns: Any,
        settings: GenerationSettings | None = None,
        *,
        snapshot: Snapshot | None = None,
        **options: Any,
    ) -> Iterator[Step]:
        """As `SpectrModel.stream`, in a replica. Where that dies before the first step, the run
        begins anew in another one; later it raises RuntimeError.

        A run with the experts of one visitor, or with those that there were before, goes on here.
        """
        settings = settings or GenerationSettings()
        if self._is_variant or snapshot not in (None, self.snapshot):
            return super().stream(prompt, columns, settings, snapshot=snapshot, **options)
        routers, _ = self._checked(prompt, columns, settings, self.snapshot)
        return self._steps(prompt, routers, settings, **options)

    def _steps(self, *asked: Any, **options: Any) -> Iterator[Step]:
        errors = self.ray.exceptions
        remote = self._handle.options(stream=True).steps.remote
        has_begun, num_tries = False, 0
        while True:
            steps: Any = remote(self.edition, *asked, **options)
            try:
                for step in steps:
                    has_begun = True
                    yield step
                return
            except OutdatedError:
                with self._changing:  # until the change that goes on is over
                    continue
            except errors.RayTaskError as error:
                raise error.cause from None
            except errors.RayError as error:
                num_tries += 1
                if has_begun or num_tries == TRIES:
                    raise RuntimeError("the replica that wrote the answer has died") from error
            finally:
                steps.cancel()

    def _begin(
        self, adapters: tuple[Adapter, ...], disabled: Sequence[str], snapshot: Snapshot
    ) -> None:
        """First in all replicas, then here. Where one of them cannot have the experts, nowhere.

        A replica that dies meanwhile, and one that starts, has them with its next run. What one
        visitor changes is changed here alone.
        """
        if self._is_variant:
            super()._begin(adapters, disabled, snapshot)
            return
        number, before = self.edition.number, self.listing
        edition = Edition(number=number + 1, listing=Listing.of(adapters, disabled))
        if failures := self._tell(edition):
            self.edition = Edition(number=number + 2, listing=before)
            self._tell(self.edition)
            raise RuntimeError(f"a replica cannot have these experts: {failures[0]}")
        self.ray.get(self._board.post.remote(edition))
        super()._begin(adapters, disabled, snapshot)
        self.edition = edition

    def _tell(self, edition: Edition) -> list[Exception]:
        """What keeps replicas from the edition."""
        told = self._handle.broadcast("take_over", edition)
        results = told.results(timeout_s=CHANGE_SECONDS, return_exceptions=True)
        died = self.ray.exceptions.RayActorError
        errors = [each for each in results if isinstance(each, Exception)]
        return [getattr(e, "cause", e) for e in errors if not isinstance(e, died)]


def replicated(
    base: str | None = None,
    experts: Sequence[str] | None = None,
    *,
    least: int = 2,
    most: int | None = None,
    resources: Mapping[str, float] | None = None,
) -> ReplicatedModel:
    """What `load` gives, with replicas that run it.

    least, most: replicas; where most is more, another one starts while runs wait. resources: of
    each, in Ray's terms; None shares this machine. Needs a Ray that is connected.
    """
    most = max(least, most or 0)
    model = load(base, experts)
    model.detach()
    front = ReplicatedModel(model.base, model.library)
    front.deploy(base, least, most, share(most) if resources is None else resources)
    return front
