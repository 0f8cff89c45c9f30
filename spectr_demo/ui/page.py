"""The page: what happens when something is pressed."""

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from fastapi.exceptions import RequestValidationError
from starlette.middleware import Middleware
from starlette.routing import Route

from spectr_demo import charts
from spectr_demo.config import has_metrics
from spectr_demo.cpu.threads import release_threads
from spectr_demo.engine.model import SpectrModel
from spectr_demo.experts.archives import MOST_ZIP_BYTES
from spectr_demo.metrics import PATH, Metrics
from spectr_demo.ui import cards, changes, endpoint, history, recorded, style, tabs, what_if
from spectr_demo.ui import uploads as sent
from spectr_demo.ui.examples import example_of, examples_for
from spectr_demo.ui.figures import Export, cached
from spectr_demo.ui.layout import Layout, lay_out
from spectr_demo.ui.libraries import Libraries
from spectr_demo.ui.line import PLACES, Line, in_line
from spectr_demo.ui.lists import ExpertLists, Updates
from spectr_demo.ui.run import MAX_COLUMNS, Form, gpu_seconds, model_steps
from spectr_demo.ui.runner import Runner, Session
from spectr_demo.ui.saved import MAX_BYTES
from spectr_demo.ui.uploads import Uploads
from spectr_demo.ui.visitors import (
    Door,
    Page,
    receive_file,
    refuse_file,
    tell_metrics,
    unreadable,
)
from spectr_demo.web import BodyLimit

KEEP_SECONDS = 3600  # files to download, and the traces of visitors who stay
MAX_BODY = 3 * MAX_BYTES  # two kept runs, in base64
# Everything that uses the model waits in one line, `ui.line`; redrawing a chart does not. Gradio
# lets in as many as have a place there, and some to be told that there is none.
_NUM_HANDLERS = PLACES + 8
MODEL_QUEUE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": _NUM_HANDLERS}
PRIVATE: dict[str, Any] = {"api_visibility": "private"}

Seen = Callable[["Session | None"], "Session"]  # whose trace the page shows


def launch_options() -> dict[str, Any]:
    """What `Blocks.launch` needs for this page: its look, that no other host is asked, MCP, what it
    takes from strangers."""
    routes = [Route(PATH, tell_metrics)] if has_metrics() else []
    if changes.may_change():
        routes.append(Route(sent.PATH, receive_file, methods=["POST"]))
    return {
        "theme": style.theme(),
        "head": style.HEAD,
        "css_paths": [style.CSS, style.TABS_CSS, charts.CSS],
        "footer_links": ["api", "settings"],
        "run_history": False,
        "mcp_server": True,
        "share": False,
        "ssr_mode": False,
        "state_session_capacity": 200,
        "max_threads": _NUM_HANDLERS + 32,  # those who wait have one each, asleep
        "enable_monitoring": False,
        "app_kwargs": {
            "middleware": [
                Middleware(Door),
                Middleware(BodyLimit, max_body=MAX_BODY, others={sent.PATH: MOST_ZIP_BYTES}),
            ],
            "exception_handlers": {RequestValidationError: unreadable},
            "routes": routes,
        },
    }


def build(model: SpectrModel, gpu: Callable[..., Any] | None = None) -> gr.Blocks:
    """The page of a model. gpu: `spaces.GPU` on a Space that lends its GPU call by call; what runs
    there is a copy of this process, so the experts stay as they are."""
    libraries, lists = Libraries(model, is_fixed=gpu is not None), ExpertLists()
    uploads = Uploads() if changes.may_change() and not libraries.is_fixed else None
    line = Line(model.most_runs, metrics=Metrics(model.library.names))
    run = model_steps(model)
    steps = in_line(run if gpu is None else gpu(duration=gpu_seconds)(run), line)
    examples = examples_for(model.library.names)
    opening = recorded.find(examples[0], model)
    with Page(
        title="SpectR: every request finds its expert",
        analytics_enabled=False,
        delete_cache=(KEEP_SECONDS, KEEP_SECONDS),
    ) as page:
        page.metrics = line.metrics
        page.receive = refuse_file if uploads is None else uploads.receive
        # First, so that no handler of the page takes their names.
        endpoint.register(page, libraries, steps, MODEL_QUEUE)
        session = gr.State(None, time_to_live=KEEP_SECONDS)
        header = gr.HTML(cards.header(model))
        with gr.Tabs():
            with gr.Tab("Compare"):
                layout = lay_out(model, examples, opening)
            lists.add([header], lambda model: {header: cards.header(model)})
            lists.add(*layout.expert_lists)
            tabs.lay_out(libraries, steps, gpu, line, MODEL_QUEUE, lists, uploads)
        runner = Runner(libraries, steps, layout, session, lists)
        if opening is not None:
            layout.copies.value = runner.copies(Form(**layout.opening), opening.frame.routers)
        _wire_runs(layout, session, runner)
        if opening is None:
            _wire_examples(layout, session, runner)
        else:
            _wire_recordings(layout, session, runner)

        def seen(now: Session | None) -> Session:
            """Of a visitor who has run nothing yet it is the run that the page opens on."""
            if now is not None and now.trace is not None:
                return now
            assert opening is not None
            return Session(frame=opening.frame, prompt=examples[0].prompt)

        _wire_columns(layout, session, seen)
        _wire_what_if(layout, runner, seen)
        _wire_history(layout, runner)
        _wire_files(layout, session, seen, page.GRADIO_CACHE)
        page.load(None, None, None, js=style.SCRIPT, **PRIVATE)
        if not libraries.is_fixed:
            _wire_visit(page, libraries, runner)
    release_threads()  # of loading and building: runs have threads of their own
    # "api_open" would let a program pass by the line.
    return page.queue(max_size=PLACES, default_concurrency_limit=4, api_open=False)


def _wire_visit(page: Page, libraries: Libraries, runner: Runner) -> None:
    """A page that comes shows the experts that there are by now. One that goes gives up its own."""

    def arrive() -> Any:
        return runner.news() or gr.skip()

    page.load(arrive, None, runner.lists.components, show_progress="hidden", queue=False, **PRIVATE)
    page.unload(libraries.leave)


def _stop(now: Session | None) -> None:
    if now is not None:
        now.stop.set()


def _wire_runs(layout: Layout, session: gr.State, runner: Runner) -> Any:
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


def _running(runner: Runner) -> dict[str, Any]:
    return {
        "fn": runner.run,
        **runner.inputs,
        "outputs": runner.outputs,
        "show_progress": "minimal",
        "show_progress_on": runner.layout.answers,
        **MODEL_QUEUE,
        **PRIVATE,
    }


def _wire_examples(layout: Layout, session: gr.State, runner: Runner) -> None:
    """An example fills the prompt and runs; a run still going makes room for it."""

    def pick(now: Session | None, sample: list[str]) -> str:
        _stop(now)
        return sample[0]

    layout.examples.click(
        pick, [session, layout.examples], layout.form["prompt"], queue=False, **PRIVATE
    ).success(**_running(runner))


def _wire_recordings(layout: Layout, session: gr.State, runner: Runner) -> None:
    """An example fills the prompt and shows its recorded run; one still going ends unseen."""

    def replay(now: Session | None, sample: list[str]) -> Updates:
        if now is not None:
            now.is_left.set()
        _stop(now)
        example = example_of(sample[0])
        assert example is not None
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


def _wire_what_if(layout: Layout, runner: Runner, seen: Seen) -> None:
    """A column again, beside itself; and what a click on an expert fills in."""
    panel = layout.what_if

    def again(now: Session | None, label: str, **choices: Any) -> Iterator[Updates]:
        yield from runner.what_if(seen(now), label, **choices)

    def pick(now: Session | None, label: str, asked: str) -> Updates:
        trace = seen(now).trace
        assert trace is not None
        expert, token = what_if.picked(trace, label, asked)
        start = "" if token is None else str(token)
        filled = {panel.form["expert"]: expert, panel.form["from_token"]: start}
        return {panel.fold: gr.update(open=True), **filled}

    panel.run.click(
        again,
        [runner.session, layout.column],
        [runner.session, panel.answer, panel.run, layout.stop],
        inputs_kwargs=panel.form,
        show_progress="minimal",
        show_progress_on=panel.answer,
        **MODEL_QUEUE,
        **PRIVATE,
    )
    panel.pick.click(
        pick,
        [runner.session, layout.column, panel.picked],
        [panel.fold, panel.form["expert"], panel.form["from_token"]],
        js="(session, column, picked) => [session, column, window.spectr.picked]",
        show_progress="hidden",
        queue=False,
        **PRIVATE,
    )


def _wire_history(layout: Layout, runner: Runner) -> None:
    """What the browser keeps and hands back; `state.js` is its side."""
    at = layout.history

    def compare_runs(asked: str) -> str:
        try:
            return history.comparison(asked)
        except ValueError as error:
            return cards.notice(str(error))

    quiet: dict[str, Any] = {"show_progress": "hidden", **PRIVATE}
    at.kept.change(None, at.kept, None, js="(kept) => window.spectr.keep(kept)", **PRIVATE)
    at.restore.click(
        runner.restore,
        [runner.session, at.wanted],
        [*layout.form.values(), *runner.outputs],
        js="(session, wanted) => [session, window.spectr.wanted]",
        **quiet,
    )
    at.compare.click(
        compare_runs, at.wanted, at.compared, js="(wanted) => [window.spectr.wanted]", **quiet
    )


def _wire_files(layout: Layout, session: gr.State, seen: Seen, cache: str) -> None:
    def maker(export: Export) -> Callable[[Session | None], str]:
        def make(now: Session | None) -> str:
            now = seen(now)
            assert now.frame is not None
            return cached(export, now.frame, now.prompt, cache)

        return make

    for export in layout.exports:
        made = export.button.click(
            maker(export), session, export.file, show_progress="hidden", **PRIVATE
        )
        press = f"() => document.querySelector('#{export.file.elem_id}').click()"
        made.success(None, js=press, **PRIVATE)
