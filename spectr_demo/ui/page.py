"""The page: what happens when something is pressed."""

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from spectr_demo.config import DEFAULT_ROUTER
from spectr_demo.cpu.threads import release_threads
from spectr_demo.engine.model import SpectrModel
from spectr_demo.routing.routers import ROUTERS
from spectr_demo.trace import RoutingTrace
from spectr_demo.ui import cards, endpoint, figures, recorded, style
from spectr_demo.ui.examples import Example, examples_for
from spectr_demo.ui.figures import ALL_PROJECTIONS, View
from spectr_demo.ui.layout import Layout, lay_out
from spectr_demo.ui.recorded import Recording
from spectr_demo.ui.run import MAX_COLUMNS, Form, Frame, Steps, frames, gpu_seconds, model_steps

logger = logging.getLogger(__name__)

KEEP_SECONDS = 3600  # files to download, and the traces of visitors who stay
# Everything that uses the model waits in one line; redrawing a chart does not.
MODEL_QUEUE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
PRIVATE: dict[str, Any] = {"api_visibility": "private"}

Updates = dict[Any, Any]  # component -> its new value


@dataclass(frozen=True, kw_only=True, eq=False)
class Session:
    """What one visitor's page remembers: the last trace, and how to stop the run going on.

    view: what the trace's charts were drawn for, as the page reports itself. is_left: the page
    shows something else by now, and nothing more of that run.
    """

    trace: RoutingTrace | None = None
    prompt: str = ""
    view: str = ""
    stop: threading.Event = field(default_factory=threading.Event)
    is_left: threading.Event = field(default_factory=threading.Event)


def launch_options() -> dict[str, Any]:
    """What `Blocks.launch` needs for this page: its look, that no other host is asked, MCP."""
    return {
        "theme": style.theme(),
        "css_paths": style.CSS,
        "footer_links": ["api", "settings"],
        "run_history": False,
        "mcp_server": True,
        "share": False,
        "ssr_mode": False,
        "state_session_capacity": 200,
    }


def build(model: SpectrModel, gpu: Callable[..., Any] | None = None) -> gr.Blocks:
    """The page of a model. gpu: `spaces.GPU` on a Space that lends its GPU call by call."""
    steps = model_steps(model)
    if gpu is not None:
        steps = gpu(duration=gpu_seconds)(steps)
    examples = examples_for(model.library.names)
    opening = recorded.find(examples[0], model)
    with gr.Blocks(
        title="SpectR: every request finds its expert",
        analytics_enabled=False,
        delete_cache=(KEEP_SECONDS, KEEP_SECONDS),
    ) as page:
        session = gr.State(None, time_to_live=KEEP_SECONDS)
        layout = lay_out(model, examples, opening)
        runner = _Runner(model, steps, layout, session)
        run = _wire_runs(layout, session, runner)
        if opening is None:
            _wire_examples(layout, session, runner, examples)
        else:
            _wire_recordings(layout, session, runner, examples)
        _wire_charts(layout, session, runner, opening, run)
        _wire_files(layout, session, page.GRADIO_CACHE)
        page.load(None, None, layout.view, js=style.READ_VIEW, **PRIVATE)
        page.load(None, None, None, js=style.WATCH_VIEW, **PRIVATE)
        endpoint.register(page, model, steps, MODEL_QUEUE)
    release_threads()  # of loading and building: runs have threads of their own
    return page.queue(max_size=20, default_concurrency_limit=4)


class _Runner:
    """The handler of Run: it turns a form into frames, and frames into updates of the page."""

    def __init__(self, model: SpectrModel, steps: Steps, layout: Layout, session: gr.State) -> None:
        self.model, self.steps = model, steps
        self.layout, self.session = layout, session

    @property
    def outputs(self) -> list[Any]:
        at = self.layout
        controls = [self.session, at.about, at.answers, at.notice, at.run, at.stop]
        return [*controls, at.charts, at.caption, at.column, at.projection, *at.plots]

    @property
    def inputs(self) -> dict[str, Any]:
        return {"inputs": [self.session, self.layout.view], "inputs_kwargs": self.layout.form}

    def run(self, before: Session | None, view: str, **choices: Any) -> Iterator[Updates]:
        """Answers as they are written, then the charts. An error leaves what was there."""
        before = before or Session()
        now = Session(trace=before.trace, prompt=before.prompt, view=before.view)
        names = self.model.library.names
        try:
            form = Form(**choices)
            routers, settings = form.routers(names), form.settings()
            self.model.encode(form.prompt)  # a wrong prompt is known before a GPU is asked for
            yield {self.session: now}  # from here on, Stop reaches this run
            for frame in frames(self.steps, form.prompt, routers, settings, now.stop):
                if now.is_left.is_set():
                    yield {self.session: gr.skip()}  # Gradio sends what came last again
                    return
                yield self._show(frame, form.prompt, view)
        except ValueError as error:
            yield self._fail(str(error))
        except gr.Error as error:
            yield self._fail(error.message)
        except Exception as error:
            logger.exception("a run failed")
            yield self._fail(
                f"The run broke off ({type(error).__name__}: {error}). Nothing else was lost: run "
                "it again, with fewer columns or tokens if memory ran out."
            )

    def replay(self, example: Example, view: str) -> Updates:
        """A recorded run, as if it had just ended."""
        recording = recorded.find(example, self.model)
        assert recording is not None
        return self._show(recording.frame, example.prompt, view, recording)

    def _show(
        self, frame: Frame, prompt: str, view: str, recording: Recording | None = None
    ) -> Updates:
        at = self.layout
        updates: Updates = {
            at.answers: cards.answers(frame, self.model.library.names, prompt),
        }
        is_over = frame.status in ("finished", "stopped")
        if frame.status == "waiting" or is_over:
            updates |= {
                at.about: cards.about(prompt, len(frame.columns), recording),
                at.run: gr.update(interactive=is_over),
                at.stop: gr.update(interactive=not is_over),
                at.notice: gr.update(visible=False),
            }
        # A chart loses its zoom at every change, so charts are drawn once, when all is known.
        return updates | self.draw(frame, prompt, view) if is_over and frame.trace else updates

    def draw(self, frame: Frame, prompt: str, view: str) -> Updates:
        """The charts of a run, and the session that keeps its trace."""
        at, trace = self.layout, frame.trace
        assert trace is not None
        columns = list(zip(frame.routers, trace.labels, strict=True))
        # The default router's column; else one that chooses, or one with an expert.
        chosen = min(
            columns,
            key=lambda column: (
                column[0].name != DEFAULT_ROUTER,
                not ROUTERS[column[0].name].chooses,
                column[0].name == "base",
            ),
        )[1]
        titles = [(cards.title(router), label) for router, label in columns]
        plots = figures.draw(trace, chosen, ALL_PROJECTIONS, View.parse(view))
        return {
            self.session: Session(trace=trace, prompt=prompt, view=view),
            at.charts: gr.update(visible=True),
            at.caption: cards.charts_caption(prompt),
            at.column: gr.update(choices=titles, value=chosen),
            at.projection: ALL_PROJECTIONS,
            **dict(zip(at.plots, plots, strict=True)),
        }

    def _fail(self, message: str) -> Updates:
        at = self.layout
        return {
            at.notice: gr.update(value=cards.notice(message), visible=True),
            at.run: gr.update(interactive=True),
            at.stop: gr.update(interactive=False),
        }


def _stop(now: Session | None) -> None:
    if now is not None:
        now.stop.set()


def _wire_runs(layout: Layout, session: gr.State, runner: _Runner) -> Any:
    """Run and Stop. Returns the event of a run."""

    def at_most(columns: list[str]) -> Any:
        """A column too many is refused when it is ticked, not when it is run."""
        if len(columns) <= MAX_COLUMNS:
            return gr.skip()
        gr.Warning(f"Up to {MAX_COLUMNS} columns run side by side: untick one first.")
        return columns[:MAX_COLUMNS]

    pressed = [layout.run.click, layout.form["prompt"].submit]
    run = gr.on(pressed, **_running(runner))
    gr.on([*pressed, layout.examples.click], None, js=style.SHOW_RESULTS, **PRIVATE)
    layout.stop.click(_stop, session, None, queue=False, **PRIVATE)
    columns = layout.form["columns"]
    # "always_last": a tick while the one before is looked at is looked at, too.
    columns.input(
        at_most, columns, columns, show_progress="hidden", trigger_mode="always_last", **PRIVATE
    )
    return run


def _running(runner: _Runner) -> dict[str, Any]:
    return {
        "fn": runner.run,
        **runner.inputs,
        "outputs": runner.outputs,
        "show_progress": "minimal",
        "show_progress_on": runner.layout.answers,
        **MODEL_QUEUE,
        **PRIVATE,
    }


def _wire_examples(
    layout: Layout, session: gr.State, runner: _Runner, examples: tuple[Example, ...]
) -> None:
    """An example fills the prompt and runs; a run still going makes room for it."""

    def pick(now: Session | None, index: int) -> str:
        _stop(now)
        return examples[index].prompt

    layout.examples.click(
        pick, [session, layout.examples], layout.form["prompt"], queue=False, **PRIVATE
    ).success(**_running(runner))


def _wire_recordings(
    layout: Layout, session: gr.State, runner: _Runner, examples: tuple[Example, ...]
) -> None:
    """An example fills the prompt and shows its recorded run; one still going ends unseen."""

    def replay(now: Session | None, view: str, index: int) -> Updates:
        if now is not None:
            now.is_left.set()
        _stop(now)
        example = examples[index]
        return {layout.form["prompt"]: example.prompt, **runner.replay(example, view)}

    layout.examples.click(
        replay,
        [session, layout.view, layout.examples],
        [layout.form["prompt"], *runner.outputs],
        show_progress="hidden",
        **PRIVATE,
    )


def _wire_charts(
    layout: Layout, session: gr.State, runner: _Runner, opening: Recording | None, run: Any
) -> None:
    """Charts come from the session's trace, without running anything again."""

    def redraw(now: Session, label: str, projection: str, view: str) -> list[Any]:
        assert now.trace is not None
        return figures.draw(now.trace, label, projection, View.parse(view))

    def redraw_map(now: Session, label: str, projection: str, view: str) -> Any:
        assert now.trace is not None
        return figures.draw_map(now.trace, label, projection, View.parse(view))

    def look(now: Session | None, label: str, projection: str, view: str) -> Updates:
        """The page has loaded, or has another theme or width now."""
        if now is None and opening is not None:
            return runner.draw(opening.frame, layout.form["prompt"].value, view)
        if now is None or now.trace is None or now.view == view:
            return {session: gr.skip()}
        seen = Session(trace=now.trace, prompt=now.prompt, view=view, stop=now.stop)
        plots = redraw(now, label, projection, view)
        return {session: seen, **dict(zip(layout.plots, plots, strict=True))}

    quiet: dict[str, Any] = {"show_progress": "hidden", **PRIVATE}
    shown = [session, layout.column, layout.projection, layout.view]
    layout.column.input(redraw, shown, layout.plots, **quiet)
    layout.projection.input(redraw_map, shown, layout.plots[1], **quiet)
    layout.look_again.click(None, None, layout.view, js=style.READ_VIEW, **PRIVATE)
    layout.view.change(look, shown, runner.outputs, **quiet)
    run.then(look, shown, runner.outputs, **quiet)  # what changed while it ran


def _wire_files(layout: Layout, session: gr.State, cache: str) -> None:
    def make_trace_file(now: Session) -> str:
        assert now.trace is not None
        return figures.trace_file(now.trace, cache)

    def make_charts_file(now: Session) -> str:
        assert now.trace is not None
        return figures.charts_file(now.trace, now.prompt, cache)

    quiet: dict[str, Any] = {"show_progress": "hidden", **PRIVATE}
    for button, make, file in (
        (layout.get_trace, make_trace_file, layout.trace_file),
        (layout.get_charts, make_charts_file, layout.charts_file),
    ):
        made = button.click(make, session, file, **quiet)
        made.success(None, js=f"() => document.querySelector('#{file.elem_id}').click()", **PRIVATE)
