"""The figures of a trace for one visitor's screen, and the files to take away."""

import html
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from gradio.processing_utils import save_bytes_to_cache

from spectr_demo import charts
from spectr_demo.routing.routers import ROUTERS
from spectr_demo.trace import RoutingTrace

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

ALL_PROJECTIONS = "all"
SHARE_WINDOW = 9  # tokens over which the shares along the text are averaged

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Routing of {title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 1100px; margin: 2rem auto;
padding: 0 1rem; }}
pre {{ white-space: pre-wrap; background: #f6f7f9; padding: 1rem; border-radius: 8px; }}
h2 {{ margin-top: 3rem; border-bottom: 1px solid #e3e6eb; }}
</style></head><body><h1>Which expert served which token</h1><pre>{title}</pre>
{body}</body></html>
"""


@dataclass(frozen=True, kw_only=True)
class View:
    """What a figure has to know about the screen. line_chars: of the token strip."""

    theme: Literal["light", "dark"] = "light"
    line_chars: int = 88

    @classmethod
    def parse(cls, text: str | None) -> "View":
        """Read "dark 44", as the page reports itself; anything else is a wide light page."""
        theme, _, chars = (text or "").partition(" ")
        if theme not in ("light", "dark") or not chars.isdecimal():
            return cls()
        line_chars = min(140, max(24, int(chars[:4])))
        return cls(theme="dark" if theme == "dark" else "light", line_chars=line_chars)


def draw(trace: RoutingTrace, label: str, projection: str, view: View) -> "list[Figure]":
    """The figures of one column, from the top of the page to its bottom."""
    # A router that reads requests goes from one expert to the next at once.
    router = ROUTERS.get(trace.column(label).router.get("name", ""))
    window = 1 if router is not None and router.reads_request else SHARE_WINDOW
    return [
        charts.token_strip(trace, label, theme=view.theme, line_chars=view.line_chars),
        draw_map(trace, label, projection, view),
        charts.expert_share(trace, theme=view.theme),
        charts.share_by_layer(trace, label, theme=view.theme),
        charts.share_along_text(trace, label, window=window, theme=view.theme),
    ]


def draw_map(trace: RoutingTrace, label: str, projection: str, view: View) -> "Figure":
    """The routing map of one projection, or of the mean over all."""
    chosen = projection if projection in trace.projections else None
    window = max(24, view.line_chars)  # tokens in view: about one for each character of width
    return charts.routing_map(trace, label, projection=chosen, theme=view.theme, window=window)


def trace_file(trace: RoutingTrace, cache: str) -> str:
    """Save a trace where Gradio serves files from; it is deleted with Gradio's cache."""
    return _cached("routing-trace.npz", trace.save, cache)


def charts_file(trace: RoutingTrace, prompt: str, cache: str) -> str:
    """All figures of all columns as one HTML page that needs no network: Plotly is inside."""

    def write(path: Path) -> None:
        parts = [charts.expert_share(trace).to_html(full_html=False, include_plotlyjs=True)]
        for label in trace.labels:
            parts.append(f"<h2>{html.escape(label)}</h2>")
            strip, routing_map, _, layers, along = draw(trace, label, ALL_PROJECTIONS, View())
            for figure in (strip, routing_map, layers, along):
                parts.append(figure.to_html(full_html=False, include_plotlyjs=False))
        page = _PAGE.format(title=html.escape(prompt), body="\n".join(parts))
        path.write_text(page, encoding="utf-8")

    return _cached("routing-charts.html", write, cache)


def _cached(name: str, write: Callable[[Path], None], cache: str) -> str:
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        write(path)
        return save_bytes_to_cache(path.read_bytes(), name, cache)
