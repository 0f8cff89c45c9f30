"""Two axes and a number at each crossing: who was chosen for what, which layers an expert has."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from spectr_demo.charts.bars import MARKED
from spectr_demo.charts.colors import rgba
from spectr_demo.charts.style import finish
from spectr_demo.charts.text import escape, literal, shorten

# So strong that ink stands out on it, on a light page and on a dark one.
_STRONGEST = 0.55
_NAME_CELLS, _SHORT = 16, 3
_MOST_ROWS, _MOST_COLUMNS = 40, 16  # with a name each


def grid(
    values: NDArray[np.float64],
    *,
    x: Sequence[str],
    y: Sequence[str],
    x_title: str,
    y_title: str,
    form: str = ".3g",
    cell_px: int = 26,
    is_written: bool = True,
    is_falling: bool = True,
) -> go.Figure:
    """values: (Y, X); NaN stays empty. The larger a value, the stronger its colour.

    form: of a number, as Plotly takes it. is_written: numbers stand in the cells. is_falling: the
    first of y is on top.
    """
    shown = [[float(value) if np.isfinite(value) else None for value in row] for row in values]
    most = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
    template = f"%{{z:{form}}}"
    fig = go.Figure(
        go.Heatmap(
            z=shown,
            zmin=min(0.0, float(np.nanmin(values)) if np.isfinite(values).any() else 0.0),
            zmax=most or 1.0,
            x=list(range(len(x))),
            y=list(range(len(y))),
            colorscale=[[0, rgba(MARKED, 0)], [1, rgba(MARKED, _STRONGEST)]],
            showscale=False,
            xgap=1,
            ygap=1,
            hoverongaps=False,
            texttemplate=template if is_written else None,
            customdata=[[f"{escape(row)}, {escape(column)}" for column in x] for row in y],
            hovertemplate=f"%{{customdata}}: {template}<extra></extra>",
        )
    )
    finish(fig, "light", height=96 + cell_px * len(y))
    fig.update_layout(margin={"l": 10, "r": 8, "t": 8, "b": 10}, dragmode=False)
    ends = [len(y) - 0.5, -0.5] if is_falling else [-0.5, len(y) - 0.5]
    fig.update_yaxes(**_names(y, y_title, most=_MOST_ROWS), range=ends)
    are_short = max(map(len, x), default=0) <= _SHORT
    fig.update_xaxes(
        **_names(x, x_title, most=_MOST_COLUMNS),
        range=[-0.5, len(x) - 0.5],
        tickangle=0 if are_short else -45,
    )
    return fig


def _names(names: Sequence[str], title: str, *, most: int) -> dict[str, object]:
    """Of an axis. most: so many fit; of more, only some are shown."""
    step = max(1, -(-len(names) // most))
    places = list(range(0, len(names), step))
    return {
        "title": {"text": escape(title), "standoff": 8},
        "tickmode": "array",
        "tickvals": places,
        "ticktext": [literal(shorten(names[place], _NAME_CELLS)) for place in places],
        "fixedrange": True,
        "showgrid": False,
        "automargin": True,
        "ticks": "",
    }
