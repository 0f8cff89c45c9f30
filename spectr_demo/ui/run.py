"""A run as the page sees it: the form that was filled in, and the frames that answer it."""

import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Literal

import gradio as gr

from spectr_demo.config import GenerationSettings, RouterConfig
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.run import ColumnOutput, Step, unique_labels
from spectr_demo.routing.routers import parse_router
from spectr_demo.trace import RoutingTrace

MIN_COLUMNS, MAX_COLUMNS = 2, 6
MAX_NEW_TOKENS = 512
FRAME_SECONDS = 0.08  # about 12 frames a second: more are not seen, and cost the browser
TRACE_EVERY = 8  # tokens between two colourings of the answers

Steps = Callable[[str, Sequence[RouterConfig], GenerationSettings], Generator[Step, None, None]]
Status = Literal["waiting", "running", "finished", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Form:
    """The visitor's choices. Where a router has a setting of its own, "" or 0 leaves it alone."""

    prompt: str
    columns: Sequence[str]
    expert: str | None
    top_k: int
    weighting: str
    composition: str
    router_temperature: float | None
    temperature: float
    max_new_tokens: int
    seed: int

    def routers(self, expert_names: Sequence[str]) -> list[RouterConfig]:
        """The columns' routers. ValueError says what is wrong with the choice."""
        if not MIN_COLUMNS <= len(self.columns) <= MAX_COLUMNS:
            raise ValueError(
                f"the comparison has {len(self.columns)} columns; it takes {MIN_COLUMNS} to "
                f"{MAX_COLUMNS}: tick some more, or fewer, under “Columns”"
            )
        return [
            parse_router(
                f"single:{self.expert}" if name == "single" else name,
                expert_names,
                top_k=self.top_k or None,
                weighting=self.weighting or None,
                composition=self.composition or None,
                temperature=self.router_temperature or None,
            )
            for name in self.columns
        ]

    def settings(self) -> GenerationSettings:
        return GenerationSettings(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed
        )


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What to show at one moment. trace: the last one so far; it may be some tokens behind."""

    columns: tuple[ColumnOutput, ...]
    routers: tuple[RouterConfig, ...]
    status: Status
    trace: RoutingTrace | None = None


def model_steps(model: SpectrModel) -> Steps:
    """The one function that uses the model, and so the one that needs a GPU where there is one."""

    def steps(
        prompt: str, routers: Sequence[RouterConfig], settings: GenerationSettings
    ) -> Generator[Step, None, None]:
        try:
            run = model.stream(prompt, routers, settings, record=True, trace_every=TRACE_EVERY)
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
    """The frames of one run: one before the first token, about twelve a second, and the last.

    Once `stop` is set the run ends after the token being made; what was written stays. Closing
    this iterator ends the run too, as Gradio does when the visitor leaves.
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
        for step in run:
            frame = replace(
                frame,
                columns=step.columns,
                status="finished" if step.is_last else "running",
                trace=step.trace or frame.trace,
            )
            if step.is_last or stop.is_set():
                break
            if clock() - shown_at >= FRAME_SECONDS:
                shown_at = clock()
                yield frame
    # The model is free again before the last frame is drawn.
    yield frame if frame.status == "finished" else replace(frame, status="stopped")
