"""Recorded runs of the examples: what the page shows before the model has done anything.

A recording is the trace of a run, whose header also holds the answers. It is shown only where the
base and the experts are those that it was made with. `scripts/record_examples.py` makes all.
"""

import threading
from collections import deque
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from spectr_demo.config import ASSETS, PAGE_COLUMNS, GenerationSettings
from spectr_demo.engine.model import SpectrModel
from spectr_demo.routing.routers import parse_router
from spectr_demo.trace import RoutingTrace
from spectr_demo.ui.examples import Example
from spectr_demo.ui.run import FITTING, Frame, frames, model_steps
from spectr_demo.ui.saved import compact, frame_from_json, frame_to_json

FOLDER = ASSETS / "recorded"
SETTINGS = GenerationSettings(max_new_tokens=64)  # with which the page opens


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A finished run of an example.

    model, device: the base and its weights, and what computed, in words. date, commit: of the run,
    and of the code and experts that ran.
    """

    frame: Frame
    model: str
    device: str
    date: str
    commit: str

    @property
    def trace(self) -> RoutingTrace:
        assert self.frame.trace is not None
        return self.frame.trace

    @property
    def settings(self) -> GenerationSettings:
        return GenerationSettings(**self.trace.meta["generation"])

    def is_of(self, model: SpectrModel) -> bool:
        """Whether this base with these experts said it."""
        meta = self.trace.meta
        experts = {adapter.name: adapter.sha256 for adapter in model.library.adapters}
        return bool(
            meta["model_fingerprint"] == model.base.fingerprint and meta["experts"] == experts
        )

    def save(self, path: Path) -> None:
        """One .npz, which `load` reads."""
        header = {
            **frame_to_json(self.frame),
            "model": self.model,
            "device": self.device,
            "date": self.date,
            "commit": self.commit,
        }
        replace(self.trace, meta=self.trace.meta | {"recorded": header}).save(path)


@cache  # of the examples alone: some megabytes
def load(path: Path) -> Recording:
    """ValueError for a file that is no recording."""
    trace = RoutingTrace.load(path)
    header = trace.meta.get("recorded")
    if header is None:
        raise ValueError(f"{path}: the trace has no answers; scripts/record_examples.py makes it")
    frame = frame_from_json(header, trace)
    facts = {name: header[name] for name in ("model", "device", "date", "commit")}
    return Recording(frame=frame, **facts)


def find(example: Example, model: SpectrModel) -> Recording | None:
    """The recording of an example, if there is one of this model."""
    path = FOLDER / f"{example.key}.npz"
    recording = load(path) if path.exists() else None
    return recording if recording and recording.is_of(model) else None


def record(example: Example, model: SpectrModel, *, date: str, commit: str) -> Recording:
    """Run an example with the columns and settings that the page opens with."""
    names = model.library.names
    routers = [FITTING if name == "single" else parse_router(name, names) for name in PAGE_COLUMNS]
    run = frames(model_steps(model), example.prompt, routers, SETTINGS, threading.Event())
    frame = deque(run, maxlen=1).pop()
    assert frame.trace is not None
    base = model.base
    dtype = str(base.compute_dtype).removeprefix("torch.")
    return Recording(
        # How fast a machine was that the visitor does not use says nothing.
        frame=replace(
            frame,
            columns=tuple(replace(column, tokens_per_second=0.0) for column in frame.columns),
            trace=compact(frame.trace),
        ),
        model=f"{base.name}, {base.bits}-bit ({base.quantization})",
        device=f"{dtype} on {base.device.type.upper()}",
        date=date,
        commit=commit,
    )
