"""What the page does with the model: it turns a form into frames, and frames into updates.

One generator for each thing that runs: a comparison, and a column beside itself. A replayed and a
restored run are drawn by the same functions, without the model.
"""

import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import gradio as gr

from spectr_demo import charts
from spectr_demo.charts.text import counted
from spectr_demo.config import RouterConfig
from spectr_demo.engine.model import SpectrModel
from spectr_demo.routing.routers import ROUTERS, parse_router
from spectr_demo.trace import RoutingTrace
from spectr_demo.ui import cards, history, recorded, what_if
from spectr_demo.ui.address import query_of
from spectr_demo.ui.copies import command_of, python_of
from spectr_demo.ui.examples import Example, example_of
from spectr_demo.ui.layout import Layout
from spectr_demo.ui.libraries import Libraries
from spectr_demo.ui.lists import ExpertLists, Updates
from spectr_demo.ui.recorded import Recording
from spectr_demo.ui.run import FITTING, Form, Frame, Steps, frames
from spectr_demo.web import log_fault

logger = logging.getLogger(__name__)

REST = 20  # drawing rests so many times as long as it took, however long the text is


@dataclass(kw_only=True, eq=False)
class Session:
    """What one visitor's page remembers: the last run with a trace, and how to stop the one that
    goes on.

    label: of the column whose routing the visitor chose to see; a run that goes on follows it.
    is_left: the page shows something else by now, and nothing more of that run.
    """

    frame: Frame | None = None
    prompt: str = ""
    label: str = ""
    stop: threading.Event = field(default_factory=threading.Event)
    is_left: threading.Event = field(default_factory=threading.Event)

    @property
    def trace(self) -> RoutingTrace | None:
        return self.frame.trace if self.frame else None


class Runner:
    """The handlers that use the model, and those that show what it did before."""

    def __init__(
        self,
        libraries: Libraries,
        steps: Steps,
        layout: Layout,
        session: gr.State,
        lists: ExpertLists,
    ) -> None:
        """libraries: whose experts a run has. lists: what tells which there are."""
        self.libraries, self.steps, self.lists = libraries, steps, lists
        self.layout, self.session = layout, session

    @property
    def model(self) -> SpectrModel:
        """With the visitor's own experts, if they have some."""
        return self.libraries.model

    @property
    def outputs(self) -> list[Any]:
        at = self.layout
        controls = [self.session, at.about, at.answers, at.notice, at.run, at.stop]
        drawn = [at.charts, at.caption, at.column, at.routing]
        others = [at.copies, at.announce, at.history.kept, at.what_if.answer]
        return list(dict.fromkeys([*controls, *drawn, *others, *self.lists.components]))

    @property
    def inputs(self) -> dict[str, Any]:
        return {"inputs": [self.session], "inputs_kwargs": self.layout.form}

    # A comparison

    def run(self, before: Session | None, **choices: Any) -> Iterator[Updates]:
        """Answers and their routing as they are written. An error leaves what was there."""
        before = before or Session()
        now = Session(frame=before.frame, prompt=before.prompt, label=before.label)
        news = self.news(choices.get("expert"))
        try:
            form, snapshot = Form(**choices), self.model.snapshot
            names = snapshot.library.names
            routers, settings = form.routers(names), form.settings()
            self.model.check(form.prompt)  # before there is a line to stand in
            yield {self.session: now, **news}  # from here on, Stop reaches this run
            due, news = 0.0, {}
            steps = self.libraries.bound(self.steps, snapshot)
            for frame in frames(steps, form.prompt, routers, settings, now.stop):
                if now.is_left.is_set():
                    yield {self.session: gr.skip()}  # Gradio sends what came last again
                    return
                updates = self._show(frame, form.prompt, names)
                start = time.monotonic()
                is_new = frame.trace is not None and frame.trace is not now.trace
                if is_new and (frame.is_over or start >= due):
                    updates |= self.draw(frame, form.prompt, now)
                    due = time.monotonic() + REST * (time.monotonic() - start)
                if frame.is_over:
                    updates |= self._ended(form, frame)
                yield updates
        except Exception as error:
            yield self._fail(message_of(error)) | news

    def news(self, expert: str | None = None) -> Updates:
        """What tells which experts there are, where that has changed since the page showed it.

        expert: chosen in the form; it stays chosen if it is still there.
        """
        model = self.libraries.news()
        if model is None:
            return {}
        updates = self.lists.of(model)
        if expert in model.library.names:
            updates[self.layout.form["expert"]] |= {"value": expert}
        return updates

    def _show(
        self,
        frame: Frame,
        prompt: str,
        names: Sequence[str] = (),
        recording: Recording | None = None,
    ) -> Updates:
        """names: of the experts, where the frame has no trace yet."""
        at = self.layout
        updates: Updates = {at.answers: cards.answers(frame, names, prompt)}
        if frame.status == "waiting" or frame.is_over:
            updates |= {
                at.about: cards.about(prompt, len(frame.columns), recording),
                at.run: gr.update(interactive=frame.is_over),
                at.stop: gr.update(interactive=not frame.is_over),
                at.notice: gr.update(visible=False),
            }
        return updates

    def _ended(self, form: Form, frame: Frame) -> Updates:
        """What is heard, copied and kept of a run that is over."""
        at, num = self.layout, counted(len(frame.columns), "answer")
        updates: Updates = {at.announce: f"<p>{num} {frame.status}</p>"}
        updates |= {at.copies: self.copies(form, frame.routers)}
        if frame.trace is not None:
            updates[at.history.kept] = history.to_keep(form, frame, at.opening)
        return updates

    def copies(self, form: Form, routers: Sequence[RouterConfig]) -> str:
        """The buttons that copy a run as code, and its link."""
        routers = [router for router in routers if router != FITTING]
        asked = self.model, form, routers, form.settings()
        query = query_of(form, self.layout.opening)
        return cards.copies(python_of(*asked), command_of(*asked), query)

    def draw(self, frame: Frame, prompt: str, now: Session) -> Updates:
        """The routing of a run so far, which `now` keeps."""
        at, trace = self.layout, frame.trace
        assert trace is not None
        is_first = now.trace is None or now.trace.labels != trace.labels or now.prompt != prompt
        now.frame, now.prompt = frame, prompt
        shown = now.label if now.label in trace.labels else cards.opens_on(frame)
        updates: Updates = {at.routing: charts.routing_view(trace, shown).html}
        if is_first or frame.is_over:
            updates |= {
                self.session: now,
                at.charts: gr.update(visible=True),
                at.caption: cards.charts_caption(prompt),
                at.column: gr.update(choices=cards.titles(frame), value=shown),
                at.what_if.answer: "",  # it was of another run
            }
        return updates

    def _fail(self, message: str) -> Updates:
        at = self.layout
        return {
            at.notice: gr.update(value=cards.notice(message), visible=True),
            at.run: gr.update(interactive=True),
            at.stop: gr.update(interactive=False),
        }

    # What was run before

    def replay(self, example: Example, label: str) -> Updates:
        """A recorded run, as if it had just ended; where it is of other experts, only that. label:
        of the column to show, if it has one."""
        recording = recorded.find(example, self.model)
        if recording is None:
            return self._asks("The experts are others than when this was recorded.")
        form = replace(Form(**self.layout.opening), prompt=example.prompt)
        frame, prompt = recording.frame, example.prompt
        shown = self._show(frame, prompt, recording=recording)
        shown |= self.draw(frame, prompt, Session(label=label))
        shown[self.layout.copies] = self.copies(form, frame.routers)
        query = query_of(form, self.layout.opening)
        return shown | {self.layout.history.kept: json.dumps({"query": query})}

    def restore(self, before: Session | None, asked: str) -> Updates:
        """What a browser hands back: a run that it kept, or the form that an address describes."""
        if before is not None:
            before.is_left.set()
            before.stop.set()
        try:
            return self._restored(history.wanted(asked, self.layout.opening))
        except Exception as error:  # a stranger may hand back anything
            return self._fail(message_of(error))

    def _restored(self, found: history.Wanted) -> Updates:
        form = self._possible(found.form or Form(**self.layout.opening))
        updates: Updates = {
            component: getattr(form, name) for name, component in self.layout.form.items()
        }
        if found.run is not None:
            frame, prompt = found.run.frame, form.prompt
            updates |= self._show(frame, prompt)
            updates |= self.draw(frame, prompt, Session(label=found.column))
            return updates | {self.layout.copies: self.copies(form, frame.routers)}
        example = example_of(form.prompt)
        is_opening = replace(form, prompt="") == replace(Form(**self.layout.opening), prompt="")
        if example and is_opening and recorded.find(example, self.model):
            updates |= self.replay(example, found.column)
            del updates[self.layout.history.kept]  # the address is the one that was asked for
            return updates
        if not form.prompt:
            return updates
        return updates | self._asks(f"The link asks: “{cards.escape(form.prompt)}”")

    def _asks(self, what: str) -> Updates:
        """That there is no answer yet. what: in HTML, why."""
        shown = f'<div class="about"><p>{what} <b>Run</b> answers it.</p></div>'
        return {self.layout.about: shown}

    def _possible(self, form: Form) -> Form:
        """A form without choices that this page does not have; numbers are checked when it runs."""
        opening = Form(**self.layout.opening)
        columns = [key for key in form.columns if key in ROUTERS] or opening.columns
        names = ("", *self.model.library.names)
        return replace(
            form,
            columns=columns,
            expert=form.expert if form.expert in names else opening.expert,
            weighting=form.weighting if form.weighting in ("equal", "softmax") else "",
            composition=form.composition if form.composition in ("parameters", "outputs") else "",
        )

    # A column beside itself

    def what_if(self, now: Session, label: str, **choices: Any) -> Iterator[Updates]:
        """A column's router again, and beside it the same under an intervention.

        now: the run whose column it is; Stop reaches this one through it too.
        """
        at, snapshot = self.layout, self.model.snapshot
        panel, trace, names = at.what_if, now.trace, snapshot.library.names
        assert trace is not None
        now.stop = threading.Event()
        try:
            changed = what_if.intervention(**choices)
            router = parse_router(what_if.router_of(trace, label), names)
            routers = [router, parse_router(replace(router, intervention=changed), names)]
            settings = what_if.settings_of(trace)
            yield {self.session: now, panel.run: gr.update(interactive=False)}
            steps = self.libraries.bound(self.steps, snapshot)
            for frame in frames(steps, now.prompt, routers, settings, now.stop):
                yield {
                    panel.answer: what_if.drawn(frame),
                    at.stop: gr.update(interactive=not frame.is_over),
                    panel.run: gr.update(interactive=frame.is_over),
                }
        except Exception as error:
            yield {
                panel.answer: cards.notice(message_of(error)),
                panel.run: gr.update(interactive=True),
                at.stop: gr.update(interactive=False),
            }


def message_of(error: Exception) -> str:
    """What a visitor is told; of a fault that nobody foresaw the log has the rest."""
    if isinstance(error, gr.Error):
        return error.message
    if isinstance(error, ValueError):
        return str(error)
    log_fault(logger, "a run failed", error)
    return (
        f"The run broke off ({type(error).__name__}: {error}). Nothing else was lost: run it "
        "again, with fewer columns or tokens if memory ran out."
    )
