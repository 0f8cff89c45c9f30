"""The files to take away: a run as data, and as one page that needs no network."""

import html
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import gradio as gr
import numpy as np
from gradio.processing_utils import save_bytes_to_cache

from spectr_demo import charts
from spectr_demo.trace import NOT_ROUTED, RoutingTrace
from spectr_demo.ui import cards, style
from spectr_demo.ui.run import Frame


@dataclass(frozen=True, kw_only=True)
class Export:
    """A button, what it writes, and the file that is then handed to the browser by a button that is
    not shown."""

    name: str
    button: gr.Button
    file: gr.DownloadButton
    write: Callable[[Frame, str, Path], None]


Exports = tuple[Export, ...]


def lay_out() -> Exports:
    """The buttons. Files are made when asked for."""
    kinds = (
        ("trace", "Trace (.npz)", "routing-trace.npz", write_npz),
        ("json", "Answers (.json)", "run.json", write_json),
        ("parquet", "Decisions (.parquet)", "routing.parquet", write_parquet),
        ("views", "All columns’ routing (.html)", "routing.html", write_page),
    )
    with gr.Row(elem_id="exports"):
        buttons = [gr.Button(label, size="sm", elem_id=f"get-{key}") for key, label, _, _ in kinds]
    with gr.Column(elem_classes="unseen"):
        files = [gr.DownloadButton(elem_id=f"{key}-file") for key, *_ in kinds]
    return tuple(
        Export(name=name, button=button, file=file, write=write)
        for (_, _, name, write), button, file in zip(kinds, buttons, files, strict=True)
    )


def cached(export: Export, frame: Frame, prompt: str, cache: str) -> str:
    """Make a file where Gradio serves files from; it is deleted with Gradio's cache."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / export.name
        export.write(frame, prompt, path)
        return save_bytes_to_cache(path.read_bytes(), export.name, cache)


def write_npz(frame: Frame, prompt: str, path: Path) -> None:
    """What `RoutingTrace.load` reads."""
    _trace(frame).save(path)


def write_json(frame: Frame, prompt: str, path: Path) -> None:
    """Prompt, settings and answers, with each column's shares and each answer token's numbers."""
    trace, columns = _trace(frame), []
    for output, column in zip(frame.columns, _trace(frame).columns, strict=True):
        answer = column.part_slice("answer")
        share = trace.share(column.label, "answer").tolist()
        numbers = {
            name: [None if np.isnan(v) else v for v in getattr(column, name)[answer].tolist()]
            for name in ("logprob", "entropy", "kl")
        }
        columns.append(
            {
                "label": column.label,
                "router": column.router,
                "text": output.text,
                "is_cut": output.is_cut,
                "expert_share": dict(zip(trace.expert_names, share, strict=True)),
                "tokens": list(column.tokens[answer]),
                **numbers,
            }
        )
    document = {"prompt": prompt, "meta": trace.meta, "columns": columns}
    text = json.dumps(document, ensure_ascii=False, indent=1)
    path.write_text(text, encoding="utf-8", errors="replace")


def _trace(frame: Frame) -> RoutingTrace:
    assert frame.trace is not None
    return frame.trace


def write_parquet(frame: Frame, prompt: str, path: Path) -> None:
    """A row for each decision: column, token, layer, projection, and the expert that was used, with
    its weight and score. Where none was used there is no row."""
    import pyarrow as pa  # only here: a quarter of a second
    import pyarrow.parquet as pq

    trace, tables = _trace(frame), []
    for column in trace.columns:
        t, layer, projection, k = np.nonzero(column.experts != NOT_ROUTED)
        at = t, layer, projection, k
        texts = np.array(
            [each.encode("utf-8", "replace").decode() for each in column.tokens], object
        )
        tables.append(
            pa.table(
                {
                    "column": pa.array([column.label] * len(t), pa.string()).dictionary_encode(),
                    "token": pa.array(t.astype(np.int32)),
                    "text": pa.array(texts, pa.string()).take(pa.array(t)),
                    "part": pa.DictionaryArray.from_arrays(
                        pa.array((t >= column.num_prompt).astype(np.int8)), ["prompt", "answer"]
                    ),
                    "layer": pa.array(layer.astype(np.int16)),
                    "projection": pa.DictionaryArray.from_arrays(
                        pa.array(projection.astype(np.int16)), list(trace.projections)
                    ),
                    "expert": pa.DictionaryArray.from_arrays(
                        pa.array(column.experts[at]), list(trace.expert_names)
                    ),
                    "weight": pa.array(column.weights[at]),
                    "score": pa.array(column.scores[at]),
                }
            )
        )
    facts = {"prompt": prompt, "meta": trace.meta}
    table = pa.concat_tables(tables).unify_dictionaries()
    table = table.replace_schema_metadata({"spectr-demo": json.dumps(facts)})
    pq.write_table(table, path, compression="zstd")


def write_page(frame: Frame, prompt: str, path: Path) -> None:
    """Cards, settings, model and the routing of all columns, as one page that needs no network."""
    trace = _trace(frame)
    meta = trace.meta
    facts = {
        "Base": f"{meta.get('model')}, {meta.get('quantization')}",
        "Experts": ", ".join(trace.expert_names),
        **{
            name.title(): ", ".join(f"{key} {value}" for key, value in meta.get(name, {}).items())
            for name in ("generation", "versions")
        },
    }
    rows = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
        for name, value in facts.items()
    )
    above = (
        f"<style>{style.CSS.read_text(encoding='utf-8')}</style>"
        f'<dl class="loaded">{rows}</dl>{cards.answers(frame, trace.expert_names, prompt)}'
    )
    path.write_text(charts.routing_page(trace, prompt, above), encoding="utf-8", errors="replace")
