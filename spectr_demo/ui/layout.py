"""The page's components and where they stand. What they do is wired in `page`."""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from spectr_demo.config import PAGE_COLUMNS
from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation.report import conditions, load_results, overview_table
from spectr_demo.routing.routers import ROUTERS
from spectr_demo.ui import cards
from spectr_demo.ui.examples import Example
from spectr_demo.ui.figures import ALL_PROJECTIONS
from spectr_demo.ui.recorded import SETTINGS, Recording
from spectr_demo.ui.run import MAX_COLUMNS, MAX_NEW_TOKENS, MIN_COLUMNS

EXAMPLES_A_PAGE = 8


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The components that events read or write. form: by the names of `run.Form`'s fields."""

    view: gr.Textbox
    look_again: gr.Button
    form: dict[str, Any]
    run: gr.Button
    stop: gr.Button
    examples: gr.Dataset
    notice: gr.HTML
    about: gr.HTML
    answers: gr.HTML
    charts: gr.Column
    caption: gr.HTML
    column: gr.Radio
    projection: gr.Dropdown
    plots: list[gr.Plot]
    get_trace: gr.Button
    get_charts: gr.Button
    trace_file: gr.DownloadButton
    charts_file: gr.DownloadButton


def lay_out(model: SpectrModel, examples: tuple[Example, ...], opening: Recording | None) -> Layout:
    """Place all components, from the top of the page to its bottom.

    opening: a run of the first example, which is there from the start.
    """
    parts: dict[str, Any] = {"view": gr.Textbox(visible="hidden", elem_id="view")}
    with gr.Column(elem_classes="unseen"):
        parts["look_again"] = gr.Button(elem_id="look-again")
    first = examples[0].prompt
    gr.HTML(cards.header(model))
    with gr.Column(elem_id="ask"):
        with gr.Row():
            prompt = gr.Textbox(
                label="Prompt",
                value=first if opening else "",
                placeholder="Ask something that an expert knows, or several things at once",
                lines=2,
                max_lines=12,
                scale=6,
                min_width=320,
                elem_id="prompt",
            )
            with gr.Column(scale=1, min_width=130, elem_id="actions"):
                parts["run"] = gr.Button("Run", variant="primary", elem_id="run")
                parts["stop"] = gr.Button("Stop", interactive=False, elem_id="stop")
        parts["examples"] = gr.Dataset(
            label="Examples, with recorded answers"
            if opening
            else "Examples that run with one click",
            components=[gr.Textbox(visible=False)],
            samples=[[example.prompt] for example in examples],
            sample_labels=[example.title for example in examples],
            samples_per_page=EXAMPLES_A_PAGE,
            type="index",
            elem_id="examples",
        )
        with gr.Accordion("Columns and settings", open=False, elem_id="settings"):
            form = {"prompt": prompt, **_columns(model.library.names)}
            form |= _settings(len(model.library.names))
    with gr.Column(elem_id="results"):
        parts["notice"] = gr.HTML(visible=False, elem_id="notice")
        parts["about"] = gr.HTML(
            cards.about(first, len(opening.frame.columns), opening) if opening else "",
            elem_id="about",
        )
        parts["answers"] = gr.HTML(
            cards.answers(opening.frame, model.library.names, first)
            if opening
            else cards.placeholder(),
            elem_id="answers",
        )
    with gr.Column(visible=False, elem_id="charts") as charts:
        parts |= _charts(model.library.projections)
    if results := load_results():
        _measured(results)
    return Layout(form=form, charts=charts, **parts)


def _columns(names: tuple[str, ...]) -> dict[str, Any]:
    with gr.Row():
        columns = gr.CheckboxGroup(
            label=f"Columns ({MIN_COLUMNS} to {MAX_COLUMNS})",
            choices=[(row.display_name, row.key) for row in ROUTERS.values()],
            value=list(PAGE_COLUMNS),
            scale=4,
            elem_id="columns",
        )
        expert = gr.Dropdown(
            label="Single expert",
            choices=[("the one that fits", ""), *((name, name) for name in names)],
            value="",
            min_width=200,
            scale=1,
            elem_id="expert",
        )
    return {"columns": columns, "expert": expert}


def _settings(num_experts: int) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    with gr.Row():
        settings["top_k"] = gr.Slider(
            label="Experts at once (K)",
            info="per token and layer, or per request; 0: each router's own",
            minimum=0,
            maximum=max(1, num_experts),
            step=1,
            value=0,
            elem_id="top-k",
        )
        settings["weighting"] = gr.Radio(
            label="Weights of the K experts",
            info="softmax: of their scores",
            choices=[("router's own", ""), ("equal", "equal"), ("softmax", "softmax")],
            value="",
        )
        settings["composition"] = gr.Radio(
            label="Composition",
            info="merge the experts' factors, or mix their outputs",
            choices=[("router's own", ""), ("factors", "parameters"), ("outputs", "outputs")],
            value="",
        )
    with gr.Row():
        settings["max_new_tokens"] = gr.Slider(
            label="New tokens",
            info="per column, at most",
            minimum=8,
            maximum=MAX_NEW_TOKENS,
            step=8,
            value=SETTINGS.max_new_tokens,
            elem_id="max-new-tokens",
        )
        settings["temperature"] = gr.Slider(
            label="Sampling temperature",
            info="0: always the likeliest token",
            minimum=0,
            maximum=2,
            step=0.05,
            value=0,
        )
        # Without a precision, which would round 3.7 and say nothing.
        settings["seed"] = gr.Number(
            label="Seed", info="the same noise for every column", value=0, elem_id="seed"
        )
    with gr.Accordion("Advanced", open=False):
        settings["router_temperature"] = gr.Number(
            label="Router temperature",
            info="divides the scores before the softmax; 0: each router's own",
            value=0,
        )
    return settings


def _charts(projections: tuple[str, ...]) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    gr.HTML('<h2 class="section">Which expert served which token</h2>')
    parts["caption"] = gr.HTML()
    parts["column"] = gr.Radio(label="Column", elem_id="column")
    with _chart(
        "Token by token",
        "Each token on the colour of the expert that served it most, averaged over all layers. The "
        "stronger the colour, the clearer its lead. SpectR in context answers each request of a "
        "message by itself; the answers follow in their order. Point at a token for the numbers.",
    ):
        strip = _plot("strip")
    with _chart(
        "Layer by layer",
        "The expert of largest weight in every layer, from the first layer at the bottom to the "
        "last at the top. SpectR in context chooses for all layers at once: point at a layer to "
        "see how certain it was. The bar below moves along a long text.",
    ):
        parts["projection"] = gr.Dropdown(
            label="Projection",
            choices=[("mean of all", ALL_PROJECTIONS), *((name, name) for name in projections)],
            value=ALL_PROJECTIONS,
            container=False,
            elem_id="projection",
        )
        routing_map = _plot("map")
    with gr.Row():
        with _chart("By column", "What each column used, in the prompt and in the answer."):
            shares = _plot("shares")
        with _chart("By layer", "Each expert's share in every layer of the chosen column."):
            layers = _plot("layers")
    with _chart(
        "Along the text",
        "Each expert's share, and beneath it how far the routed model's next-token distribution is "
        "from the base model's.",
    ):
        along = _plot("along")
    parts["plots"] = [strip, routing_map, shares, layers, along]  # in the order of `figures.draw`
    with gr.Row():
        parts["get_trace"] = gr.Button("Download the trace (.npz)", size="sm", elem_id="get-trace")
        parts["get_charts"] = gr.Button(
            "Download all charts (.html)", size="sm", elem_id="get-charts"
        )
    # The files are made when asked for; a button that is not shown then hands them to the browser.
    with gr.Column(elem_classes="unseen"):
        parts["trace_file"] = gr.DownloadButton(elem_id="trace-file")
        parts["charts_file"] = gr.DownloadButton(elem_id="charts-file")
    return parts


def _measured(results: dict[str, Any]) -> None:
    """What `python -m spectr_demo evaluate` measured for the shipped experts."""
    with gr.Accordion("How well each router does, measured", open=False, elem_id="measured"):
        gr.Markdown(overview_table(results))
        gr.Markdown(conditions(results["meta"]))


def _chart(heading: str, about: str) -> gr.Column:
    """A card for one chart, under a line that says how to read it."""
    with gr.Column(elem_classes="chart", min_width=340) as card:
        gr.HTML(f"<h3>{heading}</h3><p>{about}</p>")
    return card


def _plot(elem_id: str) -> gr.Plot:
    return gr.Plot(show_label=False, container=False, elem_id=elem_id)
