"""Runs that stay in the visitor's browser, and the address that brings back what was asked.

The browser's side is `state.js`: it keeps the last runs, writes the address, and presses the hidden
buttons below. The texts beside them carry what it hands over, as JSON.
"""

import base64
import binascii
import html
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from spectr_demo.charts.text import counted
from spectr_demo.ui import cards
from spectr_demo.ui.address import form_of, query_of
from spectr_demo.ui.diff import word_diff
from spectr_demo.ui.run import Form, Frame
from spectr_demo.ui.saved import MAX_BYTES, SavedRun


@dataclass(frozen=True, kw_only=True)
class History:
    """The components. kept: what the browser is to keep. wanted: what it hands back, for `restore`;
    two of them for `compare`."""

    kept: gr.Textbox
    wanted: gr.Textbox
    restore: gr.Button
    compare: gr.Button
    compared: gr.HTML


def lay_out() -> History:
    """The list of runs, which the browser fills, and what it presses."""
    with gr.Accordion("Earlier runs, kept in this browser", open=False, elem_id="history"):
        gr.HTML('<div id="runs"><p class="caption">No run is kept yet.</p></div>')
        compared = gr.HTML(elem_id="compared")
    with gr.Column(elem_classes="unseen"):
        kept = gr.Textbox(elem_id="kept")
        wanted = gr.Textbox(elem_id="wanted")
        restore = gr.Button(elem_id="restore")
        compare = gr.Button(elem_id="compare-runs")
    return History(kept=kept, wanted=wanted, restore=restore, compare=compare, compared=compared)


def to_keep(form: Form, frame: Frame, opening: Mapping[str, Any]) -> str:
    """What the browser keeps of a run that is over: its file, title and address; of a run that is
    too large to hand back, the address alone. opening: the form's values as the page opens."""
    title = " ".join(form.prompt.split())
    data = SavedRun(form=form, frame=frame).to_bytes()
    query = query_of(form, opening)
    if len(data) > MAX_BYTES:
        return json.dumps({"query": query})
    return json.dumps(
        {
            "id": uuid.uuid4().hex[:12],
            "title": title if len(title) <= 80 else title[:79] + "…",
            "columns": len(frame.columns),
            "query": query,
            "file": base64.b64encode(data).decode(),
        }
    )


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a browser asks to see again: a run that it kept, else only the form of an address.
    column: whose routing."""

    form: Form | None
    run: SavedRun | None
    column: str


def wanted(asked: str, opening: Mapping[str, Any]) -> Wanted:
    """From the browser's JSON. Raises ValueError for a file that is no run."""
    told = json.loads(asked)
    run = _run(told["file"]) if told.get("file") else None
    form = run.form if run else form_of(str(told.get("query", "")), opening)
    return Wanted(form=form, run=run, column=str(told.get("column") or ""))


def _run(text: str) -> SavedRun:
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("the run cannot be read (it is not base64); run it again") from error
    return SavedRun.from_bytes(data)


def comparison(asked: str) -> str:
    """Two kept runs, column by column, word by word. asked: their files."""
    first, second = (_run(text) for text in json.loads(asked))
    labels = list(dict.fromkeys([*first.trace.labels, *second.trace.labels]))
    rows = "".join(_compared(label, first, second) for label in labels)
    same = sum(_text(label, first) == _text(label, second) for label in labels)
    return (
        f'<section class="changed"><h3>{counted(same, "column")} of {len(labels)} answer alike in '
        f"both runs</h3>{_asked(first, second)}{rows}</section>"
    )


def _asked(first: SavedRun, second: SavedRun) -> str:
    one, other = word_diff(first.form.prompt, second.form.prompt)
    return (
        f'<div class="answers" style="--n:2"><article class="answer"><header><h3>First</h3>'
        f"<p>{one}</p></header></article>"
        f'<article class="answer"><header><h3>Second</h3><p>{other}</p></header></article></div>'
    )


def _text(label: str, run: SavedRun) -> str | None:
    return next((column.text for column in run.frame.columns if column.label == label), None)


def _compared(label: str, first: SavedRun, second: SavedRun) -> str:
    texts = [_text(label, run) for run in (first, second)]
    marked = word_diff(*(text or "" for text in texts))
    sides = "".join(
        f'<article class="answer"><div class="text" dir="auto">{words}</div><footer>'
        f"{html.escape(cards.shares_in_words(run.trace, label))}</footer></article>"
        if text is not None
        else '<article class="answer"><div class="text"><i>has no such column</i></div></article>'
        for text, words, run in zip(texts, marked, (first, second), strict=True)
    )
    name = html.escape(label)
    return f'<h4>{name}</h4><div class="answers" style="--n:2">{sides}</div>'
