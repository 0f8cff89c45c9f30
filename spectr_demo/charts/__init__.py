"""From a `RoutingTrace` to pictures.

`view` draws one column as HTML, as the page shows it. `map` draws the same layers and tokens as a
Plotly figure, to zoom, of one projection, to save as a picture; it is the only import of Plotly.
`colors`, `text` and `style` are what they share.
"""

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
from spectr_demo.charts.map import routing_map
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
    "RoutingView",
    "Theme",
    "expert_colors",
    "routing_map",
    "routing_page",
    "routing_view",
    "trace_colors",
]
