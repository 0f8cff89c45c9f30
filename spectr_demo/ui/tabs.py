"""The tabs beside the comparison."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from spectr_demo.engine.model import SpectrModel
from spectr_demo.ui import evidence_tab, experts_tab, how_tab
from spectr_demo.ui.line import Line
from spectr_demo.ui.run import Steps


def lay_out(
    model: SpectrModel,
    steps: Steps,
    gpu: Callable[..., Any] | None,
    line: Line,
    queue: dict[str, Any],
) -> None:
    """Place them, inside `gr.Tabs`.

    steps, gpu: see `page.build`. line, queue: of all that uses the model.
    """
    with gr.Tab("Experts") as tab:
        experts_tab.lay_out(tab, model)
    with gr.Tab("Evidence") as tab:
        evidence_tab.lay_out(tab, model, steps, queue)
    with gr.Tab("How it works") as tab:
        how_tab.lay_out(tab, model, gpu, line, queue)
