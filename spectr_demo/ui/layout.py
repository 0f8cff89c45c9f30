"""The page's components and where they stand. What they do is wired in `page`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from spectr_demo.charts import routing_view
from spectr_demo.config import PAGE_COLUMNS
from spectr_demo.engine.model import SpectrModel
from spectr_demo.routing.routers import ROUTERS
from spectr_demo.ui import cards, figures, history, what_if
from spectr_demo.ui.examples import Example, examples_for
from spectr_demo.ui.figures import Exports
from spectr_demo.ui.history import History
from spectr_demo.ui.lists import Show, Updates
from spectr_demo.ui.recorded import SETTINGS, Recording
from spectr_demo.ui.run import MAX_COLUMNS, MAX_NEW_TOKENS, MIN_COLUMNS
from spectr_demo.ui.what_if import WhatIf

EXAMPLES_A_PAGE = 8


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The components that events read or write. form: by the names of `run.Form`'s fields."""

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
    routing: gr.HTML
    exports: Exports
    what_if: WhatIf
    history: History
    announce: gr.HTML
    copies: gr.HTML

    @property
    def opening(self) -> dict[str, Any]:
        """The form's values as the page opens."""
        return {name: component.value for name, component in self.form.items()}

    @property
    def expert_lists(self) -> tuple[list[Any], Show]:
        """What names experts here, and what it shows of a model; see `ExpertLists.add`."""
        expert, top_k, changed = (
            self.form["expert"],
            self.form["top_k"],
            self.what_if.form["expert"],
        )

        def show(model: SpectrModel) -> Updates:
            names = model.library.names
            return {
                expert: gr.update(choices=_experts(names), value=""),
                top_k: gr.update(maximum=max(1, len(names))),
                changed: gr.update(choices=list(names), value=names[0] if names else None),
                self.examples: gr.update(**_samples(examples_for(names))),
            }

        return [expert, top_k, changed, self.examples], show


def lay_out(model: SpectrModel, examples: tuple[Example, ...], opening: Recording | None) -> Layout:
    """Place all components, from the top of the page to its bottom.

    opening: a run of the first example, which is there from the start.
    """
    parts: dict[str, Any] = {}
    first = examples[0].prompt
    with gr.Column(elem_id="ask"):
        with gr.Row():
            prompt = gr.Textbox(
                label="Prompt",
                value=first if opening else "",
                placeholder="Ask something that an expert knows, or several things at once",
                info="Enter runs it; Shift+Enter begins a new line",
                lines=1,  # with more, Enter would not run it
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
            **_samples(examples),
            samples_per_page=EXAMPLES_A_PAGE,
            type="values",
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
        parts["copies"] = gr.HTML(elem_id="copies")
        parts["announce"] = gr.HTML(elem_id="announce", elem_classes="heard")
    with gr.Column(visible=opening is not None, elem_id="charts") as charts:
        parts |= _routing(model.library.names, opening, first)
    parts["history"] = history.lay_out()
    return Layout(form=form, charts=charts, **parts)


def _samples(examples: Sequence[Example]) -> dict[str, Any]:
    return {
        "samples": [[example.prompt] for example in examples],
        "sample_labels": [example.title for example in examples],
    }


def _experts(names: Sequence[str]) -> list[tuple[str, str]]:
    """What the column of a single expert can be of."""
    return [("the one that fits", ""), *((name, name) for name in names)]


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
            choices=_experts(names),
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


def _routing(names: tuple[str, ...], opening: Recording | None, prompt: str) -> dict[str, Any]:
    """The routing of one column. opening: what is there from the start."""
    parts: dict[str, Any] = {}
    shown = cards.opens_on(opening.frame) if opening else ""
    gr.HTML('<h2 class="section">Which expert served which token</h2>')
    parts["caption"] = gr.HTML(cards.charts_caption(prompt) if opening else "")
    parts["column"] = gr.Radio(
        label="Column",
        choices=cards.titles(opening.frame) if opening else [],
        value=shown or None,
        elem_id="column",
    )
    with gr.Column(elem_classes="chart"):
        parts["routing"] = gr.HTML(
            routing_view(opening.trace, shown).html if opening else "",
            apply_default_css=False,
            elem_id="routing",
        )
    parts["exports"] = figures.lay_out()
    parts["what_if"] = what_if.lay_out(names)
    return parts
