"""The files to take away: a run's trace, and its routing views."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from gradio.processing_utils import save_bytes_to_cache

from spectr_demo import charts
from spectr_demo.trace import RoutingTrace


def trace_file(trace: RoutingTrace, cache: str) -> str:
    """Save a trace where Gradio serves files from; it is deleted with Gradio's cache."""
    return _cached("routing-trace.npz", trace.save, cache)


def views_file(trace: RoutingTrace, prompt: str, cache: str) -> str:
    """The routing views of all columns as one HTML page that needs no network."""

    def write(path: Path) -> None:
        path.write_text(charts.routing_page(trace, prompt), encoding="utf-8")

    return _cached("routing.html", write, cache)


def _cached(name: str, write: Callable[[Path], None], cache: str) -> str:
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        write(path)
        return save_bytes_to_cache(path.read_bytes(), name, cache)
