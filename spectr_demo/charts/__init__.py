"""From a `RoutingTrace` to interactive Plotly figures: one function for each chart.

This is the only room that imports Plotly. `strip`, `map`, `shares` and `shares_and_kl` are the
charts; `colors`, `text` and `style` are what they share.
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
from spectr_demo.charts.shares import expert_share, share_by_layer
from spectr_demo.charts.shares_and_kl import share_along_text
from spectr_demo.charts.strip import token_strip
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
    "expert_share",
    "routing_map",
    "routing_page",
    "routing_view",
    "share_along_text",
    "share_by_layer",
    "token_strip",
    "trace_colors",
]
