"""The page: what happens when something is pressed."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from spectr_demo import charts
from spectr_demo.cpu.threads import release_threads
from spectr_demo.engine.model import SpectrModel
from spectr_demo.trace import RoutingTrace
from spectr_demo.ui import cards, endpoint, figures, recorded, style, tabs
from spectr_demo.ui.examples import Example, examples_for
from spectr_demo.ui.layout import Layout, lay_out
from spectr_demo.ui.recorded import Recording
from spectr_demo.ui.run import MAX_COLUMNS, Form, Frame, Steps, frames, gpu_seconds, model_steps

logger = logging.getLogger(__name__)

REST = 20  # drawing rests so many times as long as it took, however long the text is
KEEP_SECONDS = 3600  # files to download, and the traces of visitors who stay
# Everything that uses the model waits in one line; redrawing a chart does not.
MODEL_QUEUE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
PRIVATE: dict[str, Any] = {"api_visibility": "private"}

Updates = dict[Any, Any]  # component -> its new value
Seen = Callable[["Session | None"], "Session"]  # whose trace the page shows


@dataclass(kw_only=True, eq=False)
class Session:
    """What one visitor's page remembers: the last trace, and how to stop the run going on.

    label: of the column whose routing the visitor chose to see; a run that goes on follows it.
    is_left: the page shows something else by now, and nothing more of that run.
    """

    trace: RoutingTrace | None = None
    prompt: str = ""
    label: str = ""
    stop: threading.Event = field(default_factory=threading.Event)
    is_left: threading.Event = field(default_factory=threading.Event)


def launch_options() -> dict[str, Any]:
    """What `Blocks.launch` needs for this page: its look, that no other host is asked, MCP."""
    return {
        "theme": style.theme(),
        "css_paths": [style.CSS, style.TABS_CSS, charts.CSS],
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
        gr.HTML(cards.header(model))
        with gr.Tabs():
            with gr.Tab("Compare"):
                layout = lay_out(model, examples, opening)
            tabs.lay_out(model, steps, gpu, MODEL_QUEUE)
        runner = _Runner(model, steps, layout, session)
        _wire_runs(layout, session, runner)
        if opening is None:
            _wire_examples(layout, session, runner, examples)
        else:
            _wire_recordings(layout, session, runner, examples)

        def seen(now: Session | None) -> Session:
            """Of a visitor who has run nothing yet it is the run that the page opens on."""
            if now is not None and now.trace is not None:
                return now
            assert opening is not None
            return Session(trace=opening.trace, prompt=examples[0].prompt)

        _wire_columns(layout, session, seen)
        _wire_files(layout, session, seen, page.GRADIO_CACHE)
        page.load(None, None, None, js=style.ROUTING_SCRIPT, **PRIVATE)
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
        return [*controls, at.charts, at.caption, at.column, at.routing]

    @property
    def inputs(self) -> dict[str, Any]:
        return {"inputs": [self.session], "inputs_kwargs": self.layout.form}

    def run(self, before: Session | None, **choices: Any) -> Iterator[Updates]:
        """Answers and their routing as they are written. An error leaves what was there."""
        before = before or Session()
        now = Session(trace=before.trace, prompt=before.prompt, label=before.label)
        names = self.model.library.names
        try:
            form = Form(**choices)
            routers, settings = form.routers(names), form.settings()
            self.model.encode(form.prompt)  # a wrong prompt is known before a GPU is asked for
            yield {self.session: now}  # from here on, Stop reaches this run
            due = 0.0
            for frame in frames(self.steps, form.prompt, routers, settings, now.stop):
                if now.is_left.is_set():
                    yield {self.session: gr.skip()}  # Gradio sends what came last again
                    return
                updates = self._show(frame, form.prompt)
                start = time.monotonic()
                is_new = frame.trace is not None and frame.trace is not now.trace
                if is_new and (_is_over(frame) or start >= due):
                    updates |= self.draw(frame, form.prompt, now)
                    due = time.monotonic() + REST * (time.monotonic() - start)
                yield updates
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

    def replay(self, example: Example, label: str) -> Updates:
        """A recorded run, as if it had just ended. label: of the column to show, if it has one."""
        recording = recorded.find(example, self.model)
        assert recording is not None
        frame, prompt = recording.frame, example.prompt
        shown = self._show(frame, prompt, recording)
        return shown | self.draw(frame, prompt, Session(label=label))

    def _show(self, frame: Frame, prompt: str, recording: Recording | None = None) -> Updates:
        at = self.layout
        updates: Updates = {
            at.answers: cards.answers(frame, self.model.library.names, prompt),
        }
        is_over = _is_over(frame)
        if frame.status == "waiting" or is_over:
            updates |= {
                at.about: cards.about(prompt, len(frame.columns), recording),
                at.run: gr.update(interactive=is_over),
                at.stop: gr.update(interactive=not is_over),
                at.notice: gr.update(visible=False),
            }
        return updates

    def draw(self, frame: Frame, prompt: str, now: Session) -> Updates:
        """The routing of a run so far, which `now` keeps."""
        at, trace = self.layout, frame.trace
        assert trace is not None
        is_first = now.trace is None or now.trace.labels != trace.labels or now.prompt != prompt
        now.trace, now.prompt = trace, prompt
        shown = now.label if now.label in trace.labels else cards.opens_on(frame)
        updates: Updates = {at.routing: charts.routing_view(trace, shown).html}
        if is_first or _is_over(frame):
            updates |= {
                self.session: now,
                at.charts: gr.update(visible=True),
                at.caption: cards.charts_caption(prompt),
                at.column: gr.update(choices=cards.titles(frame), value=shown),
            }
        return updates

    def _fail(self, message: str) -> Updates:
        at = self.layout
        return {
            at.notice: gr.update(value=cards.notice(message), visible=True),
            at.run: gr.update(interactive=True),
            at.stop: gr.update(interactive=False),
        }


def _is_over(frame: Frame) -> bool:
    return frame.status in ("finished", "stopped")


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

    def replay(now: Session | None, index: int) -> Updates:
        if now is not None:
            now.is_left.set()
        _stop(now)
        example = examples[index]
        shown = runner.replay(example, now.label if now else "")
        return {layout.form["prompt"]: example.prompt, **shown}

    layout.examples.click(
        replay,
        [session, layout.examples],
        [layout.form["prompt"], *runner.outputs],
        show_progress="hidden",
        **PRIVATE,
    )


def _wire_columns(layout: Layout, session: gr.State, seen: Seen) -> None:
    """A column's routing."""

    def redraw(now: Session | None, label: str) -> Updates:
        now = seen(now)
        now.label = label
        assert now.trace is not None
        return {session: now, layout.routing: charts.routing_view(now.trace, label).html}

    layout.column.input(
        redraw,
        [session, layout.column],
        [session, layout.routing],
        show_progress="hidden",
        **PRIVATE,
    )


def _wire_files(layout: Layout, session: gr.State, seen: Seen, cache: str) -> None:
    def make_trace_file(now: Session | None) -> str:
        now = seen(now)
        assert now.trace is not None
        return figures.trace_file(now.trace, cache)

    def make_views_file(now: Session | None) -> str:
        now = seen(now)
        assert now.trace is not None
        return figures.views_file(now.trace, now.prompt, cache)

    quiet: dict[str, Any] = {"show_progress": "hidden", **PRIVATE}
    for button, make, file in (
        (layout.get_trace, make_trace_file, layout.trace_file),
        (layout.get_views, make_views_file, layout.views_file),
    ):
        made = button.click(make, session, file, **quiet)
        made.success(None, js=f"() => document.querySelector('#{file.elem_id}').click()", **PRIVATE)
