"""Where a picture stands on a tab: its finding, the chart, and the same numbers as a table."""

import html
from dataclasses import dataclass
from typing import Any

import gradio as gr

from spectr_demo.charts import Picture

Updates = dict[Any, Any]  # component -> its new value


@dataclass(frozen=True)
class Slot:
    """Room for one picture. Its height is kept free by the CSS of its `elem_id`."""

    box: gr.Column
    heading: gr.HTML
    plot: gr.Plot
    twin: gr.HTML

    @classmethod
    def place(cls, elem_id: str, question: str = "") -> "Slot":
        """Place it where it is called. question: that the picture answers."""
        with gr.Column(elem_id=elem_id, elem_classes="chart picture") as box:
            if question:
                gr.HTML(f'<p class="asked">{html.escape(question)}</p>')
            heading = gr.HTML()
            plot = gr.Plot(show_label=False, container=False, elem_classes="plotly-chart")
            twin = gr.HTML()
        return cls(box, heading, plot, twin)

    @property
    def parts(self) -> list[Any]:
        return [self.box, self.heading, self.plot, self.twin]

    def show(self, picture: Picture | None) -> Updates:
        """What shows it; None hides the room."""
        if picture is None:
            return {self.box: gr.update(visible=False)}
        return {
            self.box: gr.update(visible=True),
            self.heading: picture.heading,
            self.plot: picture.figure,
            self.twin: picture.twin,
        }
