"""From a `RoutingTrace`, or plain numbers, to pictures.

`view` draws one column as HTML, as the page shows it. `map` draws the same layers and tokens as a
Plotly figure, to zoom, of one projection, to save as a picture. `bars` and `grid` draw figures and
experts with Plotly, which is imported in this room alone. A `Picture` is one of them with its
finding in words and its numbers as a table. `colors`, `text` and `style` are what they share.
"""

from spectr_demo.charts.bars import Bar, bars, best_first, spectrum
from spectr_demo.charts.colors import (
    BASE_NAME,
    GREY,
    OTHERS_COLOR,
    OTHERS_NAME,
    PALETTE,
    TIE_NAME,
    expert_colors,
    trace_colors,
)
from spectr_demo.charts.grid import grid
from spectr_demo.charts.map import routing_map
from spectr_demo.charts.picture import Picture, table
from spectr_demo.charts.style import Theme
from spectr_demo.charts.view import CSS, SCRIPT, RoutingView, routing_page, routing_view

__all__ = [
    "BASE_NAME",
    "CSS",
    "GREY",
    "OTHERS_COLOR",
    "OTHERS_NAME",
    "PALETTE",
    "SCRIPT",
    "TIE_NAME",
    "Bar",
    "Picture",
    "RoutingView",
    "Theme",
    "bars",
    "best_first",
    "expert_colors",
    "grid",
    "routing_map",
    "routing_page",
    "routing_view",
    "spectrum",
    "table",
    "trace_colors",
]
