"""A run as the page sees it: the form that was filled in, and the frames that answer it."""

import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import gradio as gr

from spectr_demo.charts.text import counted
from spectr_demo.config import GenerationSettings, RouterConfig
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.run import ColumnOutput, Step, unique_labels
from spectr_demo.engine.snapshot import Snapshot
from spectr_demo.routing.routers import ROUTERS, parse_router
from spectr_demo.trace import RoutingTrace
from spectr_demo.ui.requests import RoutedRequest, routed_requests

MIN_COLUMNS, MAX_COLUMNS = 2, 6
MAX_NEW_TOKENS = 512
FRAME_SECONDS = 0.08  # about 12 frames a second: more are not seen, and cost the browser
TRACE_EVERY = 8  # tokens between two colourings of the answers

# A single expert that is still to be chosen, when the prompt is read.
FITTING = RouterConfig(name="single", expert="")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The expert that was chosen for `FITTING`. why: in a few words. requests: what it was chosen
    by."""

    expert: str
    why: str
    requests: Sequence[RoutedRequest]


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A run that is in line. place: 2 where it is the next to begin, and 1 once its turn has come.
    seconds: until then, about; None where no run has ended yet, to say it by."""

    place: int
    seconds: float | None


class Steps(Protocol):
    """A run of the model, and before it its time in line.

    Where `FITTING` is among its routers, the choice comes before the steps. Where there is no
    router, it is all that is asked for.
    """

    def __call__(
        self, prompt: str, routers: Sequence[RouterConfig], settings: GenerationSettings, /
    ) -> Generator[Waiting | Choice | Step, None, None]: ...


Status = Literal["waiting", "running", "finished", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Form:
    """The visitor's choices. Where a router has a setting of its own, "" or 0 leaves it alone.

    expert: of the column of a single expert; "" or None chooses the one that fits the prompt.
    Numbers are as the page sends them: a field that was emptied is None.
    """

    prompt: str
    columns: Sequence[str]
    expert: str | None
    top_k: float | None
    weighting: str
    composition: str
    router_temperature: float | None
    temperature: float | None
    max_new_tokens: float | None
    seed: float | None

    def routers(self, expert_names: Sequence[str]) -> list[RouterConfig]:
        """The columns' routers, in the order of the table of routers.

        ValueError says what is wrong with the choice.
        """
        num = len(self.columns)
        if not MIN_COLUMNS <= num <= MAX_COLUMNS:
            raise ValueError(
                f"the comparison has {counted(num, 'column')}; it takes {MIN_COLUMNS} to "
                f"{MAX_COLUMNS}: tick {'more' if num < MIN_COLUMNS else 'fewer'} under “Columns”"
            )
        routers = [self._router(name, expert_names) for name in self.columns]
        self._check_settings_are_used(routers)
        return sorted(routers, key=lambda router: list(ROUTERS).index(router.name))

    def _router(self, name: str, expert_names: Sequence[str]) -> RouterConfig:
        if name == "single":
            return parse_router(f"single:{self.expert}", expert_names) if self.expert else FITTING
        router = parse_router(
            name,
            expert_names,
            top_k=_whole(self.top_k) or None,
            weighting=self.weighting or None,
            composition=self.composition or None,
        )
        if not _softens(router):
            return router
        return parse_router(router, expert_names, temperature=self.router_temperature or None)

    def _check_settings_are_used(self, routers: Sequence[RouterConfig]) -> None:
        """A setting that no column uses would be a comparison that is not what it says."""
        unused = [
            f"{what} is {value}, and none of the columns uses it: it needs {needed}"
            for what, value, is_used, needed in (
                ("experts at once (K)", self.top_k, _chooses, "a router that chooses"),
                ("weights", self.weighting, _mixes, "a router that mixes K > 1 experts"),
                ("composition", self.composition, _composes, "a router that mixes K > 1 experts"),
                (
                    "router temperature",
                    self.router_temperature,
                    _softens,
                    "a router with softmax weights of K > 1 experts",
                ),
            )
            if value and not any(map(is_used, routers))
        ]
        if unused:
            raise ValueError(
                "; ".join(unused) + ". Tick such a router, or set it back to the router’s own."
            )

    def settings(self) -> GenerationSettings:
        """ValueError says which number is missing or wrong."""
        numbers: dict[str, Any] = {
            "max_new_tokens": _whole(self.max_new_tokens),
            "temperature": self.temperature,
            "seed": _whole(self.seed),
        }
        if empty := [name for name, value in numbers.items() if value is None]:
            raise ValueError(
                f"{', '.join(empty)}: no number is given; write one under “Columns and settings”"
            )
        return GenerationSettings(**numbers)


def _whole(number: float | None) -> float | None:
    """A browser sends 3 as 3.0, too; 3.7 stays what it is, and is refused where it is used."""
    return int(number) if number is not None and float(number).is_integer() else number


def _chooses(router: RouterConfig) -> bool:
    return ROUTERS[router.name].chooses


def _mixes(router: RouterConfig) -> bool:
    return _chooses(router) and router.top_k is not None and router.top_k > 1


def _composes(router: RouterConfig) -> bool:
    return _mixes(router) or router.name == "uniform"


def _softens(router: RouterConfig) -> bool:
    return _mixes(router) and router.weighting == "softmax"


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What to show at one moment.

    trace: the last one so far; it may be some tokens behind. why: of the single expert, if it was
    chosen. in_line: until the turn comes.
    """

    columns: tuple[ColumnOutput, ...]
    routers: tuple[RouterConfig, ...]
    status: Status
    trace: RoutingTrace | None = None
    why: str = ""
    in_line: Waiting | None = None

    @property
    def is_over(self) -> bool:
        """Whether it is the last one."""
        return self.status in ("finished", "stopped")


def fitting_expert(model: SpectrModel, prompt: str, snapshot: Snapshot | None = None) -> Choice:
    """The expert that the default router would give the prompt; the first of several.

    snapshot: see `SpectrModel.stream`.
    Raises ValueError where no expert is loaded.
    """
    requests = routed_requests(model, prompt, snapshot)
    for number, request in enumerate(requests, start=1):
        if request["expert"] is not None:
            why = f"the expert of request {number} of {len(requests)}"
            if len(requests) == 1:
                why = "the expert that fits"
            return Choice(expert=request["expert"], why=why, requests=requests)
    nearest = requests[0]["nearest"][0]["expert"]
    return Choice(expert=nearest, why="none stands out; this one is nearest", requests=requests)


def chosen(routers: Sequence[RouterConfig], choice: Choice) -> tuple[RouterConfig, ...]:
    """The routers with the chosen expert in the place of `FITTING`."""
    return tuple(replace(r, expert=choice.expert) if r == FITTING else r for r in routers)


def model_steps(model: SpectrModel) -> Callable[..., Generator[Choice | Step, None, None]]:
    """The one function that uses the model, and so the one that needs a GPU where there is one: a
    run, as in `Steps`. snapshot: whose experts it has; None is those of all at its begin."""

    def steps(
        prompt: str,
        routers: Sequence[RouterConfig],
        settings: GenerationSettings,
        snapshot: Snapshot | None = None,
    ) -> Generator[Choice | Step, None, None]:
        snapshot = snapshot or model.snapshot
        try:
            if not routers or FITTING in routers:
                choice = fitting_expert(model, prompt, snapshot)
                routers = chosen(routers, choice)
                yield choice
            if not routers:
                return
            run = model.stream(
                prompt,
                routers,
                settings,
                record=True,
                trace_every=TRACE_EVERY,
                snapshot=snapshot,
            )
        except ValueError as error:
            # Of the errors that leave a ZeroGPU worker, only Gradio's own keep their text.
            raise gr.Error(str(error), print_exception=False) from error
        yield from run

    return steps


def gpu_seconds(
    prompt: str, routers: Sequence[RouterConfig], settings: GenerationSettings
) -> float:
    """How long a GPU is asked for: an estimate that allows for ten tokens a second."""
    return min(60.0, 10 + 0.1 * settings.max_new_tokens)


def frames(
    steps: Steps,
    prompt: str,
    routers: Sequence[RouterConfig],
    settings: GenerationSettings,
    stop: threading.Event,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Frame]:
    """The frames of one run: some before the first token, about twelve a second, and the last.

    Once `stop` is set the run leaves the line, or ends after the token being made; what was written
    stays. Closing this iterator does so too, as Gradio does when the visitor leaves.
    """
    empty = [
        ColumnOutput(
            label=label,
            text="",
            num_settled=0,
            num_tokens=0,
            is_finished=False,
            tokens_per_second=0.0,
        )
        for label in unique_labels(routers)
    ]
    frame = Frame(columns=tuple(empty), routers=tuple(routers), status="waiting")
    yield frame
    shown_at = -math.inf
    with closing(steps(prompt, routers, settings)) as run:
        for item in run:
            frame = _after(frame, item)
            if frame.is_over or stop.is_set():
                break
            if isinstance(item, Waiting) or clock() - shown_at >= FRAME_SECONDS:
                shown_at = clock()
                yield frame
    # The model is free again before the last frame is drawn.
    yield frame if frame.status == "finished" else replace(frame, status="stopped")


def _after(frame: Frame, item: Waiting | Choice | Step) -> Frame:
    """The frame with what came."""
    if isinstance(item, Waiting):
        return replace(frame, in_line=item if item.place > 1 else None)
    if isinstance(item, Choice):
        return replace(frame, routers=chosen(frame.routers, item), why=item.why)
    return replace(
        frame,
        columns=item.columns,
        status="finished" if item.is_last else "running",
        trace=item.trace or frame.trace,
    )
