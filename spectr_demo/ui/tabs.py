"""The tabs beside the comparison."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from spectr_demo.ui import evidence_tab, experts_tab, how_tab
from spectr_demo.ui.changes import Panel
from spectr_demo.ui.libraries import Libraries
from spectr_demo.ui.line import Line
from spectr_demo.ui.lists import ExpertLists
from spectr_demo.ui.run import Steps
from spectr_demo.ui.uploads import Uploads


def lay_out(
    libraries: Libraries,
    steps: Steps,
    gpu: Callable[..., Any] | None,
    line: Line,
    queue: dict[str, Any],
    lists: ExpertLists,
    uploads: Uploads | None,
) -> None:
    """Place them, inside `gr.Tabs`.

    libraries: whose experts they show. steps, gpu: see `page.build`. line, queue: of all that uses
    the model. lists: what tells which experts there are. uploads: what visitors send; None where
    nobody may change the experts.
    """
    panel = None
    with gr.Tab("Experts") as tab:
        if uploads is not None:
            panel = Panel(libraries, line, uploads, experts_tab.facts_of)
        redraw = experts_tab.lay_out(tab, libraries, lists)
    with gr.Tab("Evidence") as tab:
        evidence_tab.lay_out(tab, libraries, steps, queue)
    with gr.Tab("How it works") as tab:
        how_tab.lay_out(tab, libraries, gpu, line, queue, lists)
    if panel is not None:
        panel.wire(lists, queue, redraw)
