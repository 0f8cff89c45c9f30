"""From a `RoutingTrace` to interactive Plotly figures. The only room that imports Plotly."""

from spectr_demo.charts.figures import *  # noqa: F403
