"""The files to take away, from a real run of the tiny model."""

import json
import re
from pathlib import Path

import gradio as gr
import numpy as np
import pyarrow.parquet as pq
import pytest

from spectr_demo.engine.model import SpectrModel
from spectr_demo.routing.routers import parse_router
from spectr_demo.trace import NOT_ROUTED, RoutingTrace
from spectr_demo.ui import figures
from spectr_demo.ui.run import Frame

PROMPT = "what is <b>this</b>?"


@pytest.fixture
def frame(routed_model: SpectrModel) -> Frame:
    columns = ("base", "uniform", "spectr-context")
    step = routed_model.compare(PROMPT, columns, max_new_tokens=8)
    routers = tuple(parse_router(column, routed_model.library.names) for column in columns)
    return Frame(columns=step.columns, routers=routers, status="finished", trace=step.trace)


def test_every_button_makes_its_file(frame: Frame, tmp_path: Path) -> None:
    with gr.Blocks():
        exports = figures.lay_out()
    names = [Path(figures.cached(each, frame, PROMPT, str(tmp_path))).name for each in exports]
    assert names == ["routing-trace.npz", "run.json", "routing.parquet", "routing.html"]
    assert all(path.stat().st_size for path in tmp_path.rglob("*.*"))


def test_the_page_needs_no_network(frame: Frame, tmp_path: Path) -> None:
    figures.write_page(frame, PROMPT, path := tmp_path / "page.html")
    page = path.read_text(encoding="utf-8")
    assert frame.trace is not None
    assert "&lt;b&gt;this" in page
    for label in frame.trace.labels:
        assert f'class="rv" data-column="{label}"' in page
        assert f'class="answer is-finished" data-column="{label}"' in page
    for fact in ("tiny", "red, green, blue", "max_new_tokens 8", "torch"):
        assert fact in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=|url\(|@import", page)
    assert len(page) < 400_000


def test_the_trace_is_the_trace(frame: Frame, tmp_path: Path) -> None:
    figures.write_npz(frame, PROMPT, path := tmp_path / "trace.npz")
    loaded, trace = RoutingTrace.load(path), frame.trace
    assert trace is not None
    assert loaded.labels == trace.labels
    np.testing.assert_array_equal(loaded.column("uniform").experts, trace.column("uniform").experts)


def test_the_answers_as_json(frame: Frame, tmp_path: Path) -> None:
    figures.write_json(frame, PROMPT, path := tmp_path / "run.json")
    told, trace = json.loads(path.read_text(encoding="utf-8")), frame.trace
    assert trace is not None
    assert told["prompt"] == PROMPT
    assert told["meta"]["generation"]["max_new_tokens"] == 8
    for column, output in zip(told["columns"], frame.columns, strict=True):
        assert (column["label"], column["text"]) == (output.label, output.text)
        recorded = trace.column(output.label)
        assert column["tokens"] == list(recorded.tokens[recorded.num_prompt :])
        assert len(column["kl"]) == len(column["tokens"])
    assert told["columns"][1]["expert_share"] == pytest.approx(
        dict.fromkeys(trace.expert_names, 1 / 3)
    )


def test_every_decision_is_a_row(frame: Frame, tmp_path: Path) -> None:
    figures.write_parquet(frame, PROMPT, path := tmp_path / "routing.parquet")
    table, trace = pq.read_table(path), frame.trace
    assert trace is not None
    assert table.num_rows == sum((c.experts != NOT_ROUTED).sum() for c in trace.columns)
    assert set(table["column"].to_pylist()) <= set(trace.labels)
    facts = json.loads(table.schema.metadata[b"spectr-demo"])
    assert facts["prompt"] == PROMPT
    row = next(row for row in table.to_pylist() if row["column"] == "uniform")
    assert row["weight"] == pytest.approx(1 / 3)
    assert row["expert"] in trace.expert_names
    assert row["projection"] in trace.projections
    assert row["text"] == trace.column("uniform").tokens[row["token"]]
    assert {row["part"] for row in table.to_pylist()} == {"prompt", "answer"}
