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
from spectr_demo.trace import RoutingTrace
from spectr_demo.ui import cards, figures, style
from spectr_demo.ui.endpoint import compare_with
from spectr_demo.ui.examples import Example, examples_for
from spectr_demo.ui.figures import ALL_PROJECTIONS, View
from spectr_demo.ui.layout import Layout, lay_out
from spectr_demo.ui.run import Form, Frame, Steps, frames, gpu_seconds, model_steps

logger = logging.getLogger(__name__)

KEEP_SECONDS = 3600  # files to download, and the traces of visitors who stay
# Everything that uses the model waits in one line; redrawing a chart does not.
MODEL_QUEUE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
PRIVATE: dict[str, Any] = {"api_visibility": "private"}

Updates = dict[Any, Any]  # component -> its new value


@dataclass(frozen=True, kw_only=True, eq=False)
class Session:
    """What one visitor's page remembers: the last trace, and how to stop the run going on."""

    trace: RoutingTrace | None = None
    prompt: str = ""
    stop: threading.Event = field(default_factory=threading.Event)


def launch_options() -> dict[str, Any]:
    """What `Blocks.launch` needs for this page: its look, and that no other host is asked."""
    return {
        "theme": style.theme(),
        "css_paths": style.CSS,
        "footer_links": ["api", "settings"],
        "run_history": False,
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
    with gr.Blocks(
        title="SpectR: every request finds its expert",
        analytics_enabled=False,
        delete_cache=(KEEP_SECONDS, KEEP_SECONDS),
    ) as page:
        session = gr.State(None, time_to_live=KEEP_SECONDS)
        layout = lay_out(model, examples)
        _wire_runs(layout, session, _Runner(model, steps, layout, session), examples)
        _wire_charts(layout, session, page.GRADIO_CACHE)
        page.load(None, None, layout.view, js=style.READ_VIEW, **PRIVATE)
        gr.api(compare_with(steps, model.library.names), api_name="compare", **MODEL_QUEUE)
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
        controls = [self.session, at.answers, at.notice, at.run, at.stop]
        return [*controls, at.charts, at.caption, at.column, at.projection, *at.plots]

    def run(self, before: Session | None, view: str, **choices: Any) -> Iterator[Updates]:
        """Answers as they are written, then the charts. An error leaves what was there."""
        before = before or Session()
        now = Session(trace=before.trace, prompt=before.prompt)
        names = self.model.library.names
        try:
            form = Form(**choices)
            routers, settings = form.routers(names), form.settings()
            self.model.encode(form.prompt)  # a wrong prompt is known before a GPU is asked for
            yield {self.session: now}  # from here on, Stop reaches this run
            for frame in frames(self.steps, form.prompt, routers, settings, now.stop):
                yield self._show(frame, form.prompt, View.parse(view))
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

    def _show(self, frame: Frame, prompt: str, view: View) -> Updates:
        at = self.layout
        updates: Updates = {at.answers: cards.answers(frame, self.model.library.names)}
        is_over = frame.status in ("finished", "stopped")
        if frame.status == "waiting" or is_over:
            updates |= {
                at.run: gr.update(interactive=is_over),
                at.stop: gr.update(interactive=not is_over),
                at.notice: gr.update(visible=False),
            }
        if not is_over or frame.trace is None:
            return updates
        # A chart loses its zoom at every change, so charts are drawn once, when all is known.
        labels = frame.trace.labels
        chosen = DEFAULT_ROUTER if DEFAULT_ROUTER in labels else labels[-1]
        titles = map(cards.title, frame.routers)
        plots = figures.draw(frame.trace, chosen, ALL_PROJECTIONS, view)
        charts: Updates = {
            self.session: Session(trace=frame.trace, prompt=prompt),
            at.charts: gr.update(visible=True),
            at.caption: cards.charts_caption(prompt),
            at.column: gr.update(choices=list(zip(titles, labels, strict=True)), value=chosen),
            at.projection: ALL_PROJECTIONS,
            **dict(zip(at.plots, plots, strict=True)),
        }
        return updates | charts

    def _fail(self, message: str) -> Updates:
        at = self.layout
        return {
            at.notice: gr.update(value=cards.notice(message), visible=True),
            at.run: gr.update(interactive=True),
            at.stop: gr.update(interactive=False),
        }


def _wire_runs(
    layout: Layout, session: gr.State, runner: _Runner, examples: tuple[Example, ...]
) -> None:
    def stop(now: Session | None) -> None:
        if now is not None:
            now.stop.set()

    def pick(now: Session | None, index: int) -> tuple[str, Any]:
        """An example fills the form; a run still going makes room for it."""
        stop(now)
        example = examples[index]
        return example.prompt, example.experts[0] if example.experts else gr.skip()

    running: dict[str, Any] = {
        "fn": runner.run,
        "inputs": [session, layout.view],
        "inputs_kwargs": layout.form,
        "outputs": runner.outputs,
        "show_progress": "minimal",
        "show_progress_on": layout.answers,
        **MODEL_QUEUE,
        **PRIVATE,
    }
    pressed = [layout.run.click, layout.form["prompt"].submit]
    gr.on(pressed, **running)
    gr.on([*pressed, layout.examples.click], None, js=style.SHOW_RESULTS, **PRIVATE)
    layout.examples.click(
        pick,
        [session, layout.examples],
        [layout.form["prompt"], layout.form["expert"]],
        queue=False,
        **PRIVATE,
    ).success(**running)
    layout.stop.click(stop, session, None, queue=False, **PRIVATE)


def _wire_charts(layout: Layout, session: gr.State, cache: str) -> None:
    """Charts and files come from the session's trace, without running anything again."""

    def redraw(now: Session, label: str, projection: str, view: str) -> list[Any]:
        assert now.trace is not None
        return figures.draw(now.trace, label, projection, View.parse(view))

    def redraw_map(now: Session, label: str, projection: str, view: str) -> Any:
        assert now.trace is not None
        return figures.draw_map(now.trace, label, projection, View.parse(view))

    def make_trace_file(now: Session) -> str:
        assert now.trace is not None
        return figures.trace_file(now.trace, cache)

    def make_charts_file(now: Session) -> str:
        assert now.trace is not None
        return figures.charts_file(now.trace, now.prompt, cache)

    quiet: dict[str, Any] = {"show_progress": "hidden", **PRIVATE}
    shown = [session, layout.column, layout.projection, layout.view]
    layout.column.input(redraw, shown, layout.plots, **quiet)
    layout.projection.input(redraw_map, shown, layout.plots[1], **quiet)
    for button, make, file in (
        (layout.get_trace, make_trace_file, layout.trace_file),
        (layout.get_charts, make_charts_file, layout.charts_file),
    ):
        made = button.click(make, session, file, **quiet)
        made.success(None, js=f"() => document.querySelector('#{file.elem_id}').click()", **PRIVATE)
