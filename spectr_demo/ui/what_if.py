"""What if an expert were banned, pinned or used alone: a column runs again beside itself."""

import html
import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
import numpy as np
from pydantic import TypeAdapter

from spectr_demo import charts
from spectr_demo.charts.text import counted, visible
from spectr_demo.config import GenerationSettings, Intervention, RouterConfig
from spectr_demo.routing.routers import ROUTERS
from spectr_demo.trace import NOT_ROUTED, RoutingTrace
from spectr_demo.ui import cards
from spectr_demo.ui.diff import word_diff
from spectr_demo.ui.run import Frame

_KINDS = [
    ("Ban it: never used", "ban"),
    ("Pin it: always one of the K", "pin"),
    ("Only it: no other is used", "only"),
]
_DONE = {"ban": "without {}", "pin": "with {} pinned", "only": "with {} alone"}
_MOST_LAYERS = 200  # rows of the table
_ROUTER = TypeAdapter(RouterConfig)


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """The components. form: by the names of `intervention`'s arguments."""

    fold: gr.Accordion
    form: dict[str, Any]
    run: gr.Button
    answer: gr.HTML
    pick: gr.Button
    picked: gr.Textbox


def lay_out(expert_names: tuple[str, ...]) -> WhatIf:
    """The form, and room for what comes of it."""
    with gr.Accordion(
        "What if an expert were banned, pinned or used alone?", open=False, elem_id="what-if"
    ) as fold:
        gr.HTML(
            '<p class="caption">The column runs again beside itself, changed. A click on an expert '
            "in the routing view names it here, and the token that is pinned there.</p>"
        )
        with gr.Row():
            expert = gr.Dropdown(
                label="Expert",
                choices=list(expert_names),
                value=expert_names[0] if expert_names else None,
                min_width=160,
                elem_id="what-if-expert",
            )
            kind = gr.Radio(label="What if", choices=_KINDS, value="ban", elem_id="what-if-kind")
        with gr.Row():
            # Not numbers: an empty one would come as 0.
            from_token = gr.Textbox(
                label="From answer token",
                info="of each request, from 0; empty: the whole run",
                elem_id="what-if-token",
            )
            layers = gr.Textbox(
                label="In layers",
                info="such as 12 or 10-20; empty: all",
                elem_id="what-if-layers",
            )
            run = gr.Button("Run both", variant="primary", min_width=120, elem_id="what-if-run")
        answer = gr.HTML(elem_id="what-if-answer")
    with gr.Column(elem_classes="unseen"):
        picked = gr.Textbox(elem_id="picked")
        pick = gr.Button(elem_id="pick")
    form = {
        "expert": expert,
        "kind": kind,
        "from_token": from_token,
        "layers": layers,
    }
    return WhatIf(fold=fold, form=form, run=run, answer=answer, pick=pick, picked=picked)


def intervention(*, expert: str | None, kind: Any, from_token: str, layers: str) -> Intervention:
    """What a form asks for. Raises ValueError for what is missing or wrong."""
    if not expert:
        raise ValueError("no expert is chosen: name one under “What if”")
    token, span = from_token.strip(), layers.strip()
    if not re.fullmatch(r"\d{0,9}", token):
        raise ValueError(f"from answer token {token!r:.40}: it must be a whole number, from 0")
    found = re.fullmatch(r"(\d{1,9})(?:\s*[-–]\s*(\d{1,9}))?", span)
    if span and not found:
        raise ValueError(
            f"in layers {span!r:.40}: write one, such as 12, or a range, such as 10-20"
        )
    return Intervention(
        kind=kind,
        expert=expert,
        from_token=int(token) if token else None,
        layers=(int(found[1]), int(found[2] or found[1])) if found else None,
    )


def router_of(trace: RoutingTrace, label: str) -> RouterConfig:
    """The router of a column of a run."""
    return replace(_ROUTER.validate_python(trace.column(label).router), intervention=None)


def settings_of(trace: RoutingTrace) -> GenerationSettings:
    """Those of a run."""
    return GenerationSettings(**trace.meta["generation"])


def start_in_lane(trace: RoutingTrace, label: str, t: int) -> int | None:
    """The number of a token in the answer to its own request; None for one of the prompt."""
    column = trace.column(label)
    if not column.num_prompt <= t < column.num_tokens:
        return None
    if column.reading is None:
        return t - column.num_prompt
    lanes = column.reading.lanes
    return int((lanes[column.num_prompt : t] == lanes[t]).sum())


def picked(trace: RoutingTrace, label: str, asked: str) -> tuple[str, int | None]:
    """The expert that was clicked, and where the change is to begin. asked: JSON from the page."""
    told = json.loads(asked)
    t = told.get("t")
    return str(told["expert"]), None if t is None else start_in_lane(trace, label, int(t))


# What comes of it


def drawn(frame: Frame) -> str:
    """Both columns as far as they are; once they are over, what is different."""
    changed = frame.routers[1].intervention
    assert changed is not None
    is_over = frame.is_over
    texts = tuple(html.escape(column.text) for column in frame.columns)
    if is_over:
        texts = word_diff(*(column.text for column in frame.columns))
    name = html.escape(ROUTERS[frame.routers[0].name].display_name)
    heads = (name, f"{name}, {in_words(changed)}")
    parts = [
        f'<article class="answer is-{frame.status}" data-side="{side}"><header><h3>{head}</h3>'
        f'</header><div class="text" dir="auto">{text}</div>'
        f"{_served(frame, column.label)}</article>"
        for side, head, text, column in zip(
            ("as it is", "changed"), heads, texts, frame.columns, strict=True
        )
    ]
    told = _told(frame, changed) if is_over else "<p>Both are being written …</p>"
    return (
        f'<section class="changed" aria-live="polite">{told}'
        f'<div class="answers" style="--n:2">{"".join(parts)}</div>'
        f"{_switched(frame.trace) if is_over and frame.trace else ''}"
        f"{_routing(frame) if is_over and frame.trace else ''}</section>"
    )


def in_words(changed: Intervention) -> str:
    """Such as "without sql, from answer token 3 on, in layers 10 to 20"."""
    words = [_DONE[changed.kind].format(f"<b>{html.escape(changed.expert)}</b>")]
    if changed.from_token is not None:
        words.append(f"from answer token {changed.from_token} on")
    if changed.layers is not None:
        first, last = changed.layers
        words.append(f"in layer {first}" if first == last else f"in layers {first} to {last}")
    return ", ".join(words)


def parting(trace: RoutingTrace) -> int | None:
    """The first token at which the two columns of a trace differ; None where they do not."""
    one, other = (column.token_ids for column in trace.columns)
    num = min(len(one), len(other))
    different = np.flatnonzero(one[:num] != other[:num])
    if different.size:
        return int(different[0])
    return None if len(one) == len(other) else num


def _told(frame: Frame, changed: Intervention) -> str:
    if frame.trace is None:
        return "<h3>It was stopped before the first token</h3>"
    words = in_words(changed)
    at = parting(frame.trace)
    if at is None:
        return f"<h3>{words[0].upper()}{words[1:]}, the answer stays the same</h3>"
    one, other = frame.trace.columns
    said = [
        f"“{html.escape(visible(column.tokens[at]))}”" if at < column.num_tokens else "the end"
        for column in (one, other)
    ]
    number = at - one.num_prompt
    return (
        f"<h3>{words[0].upper()}{words[1:]}, the answer parts at answer token {number}: "
        f"{said[0]} becomes {said[1]}</h3>"
    )


def _served(frame: Frame, label: str) -> str:
    """Who served a column's answer."""
    if frame.trace is None:
        return ""
    return f"<footer>{html.escape(cards.shares_in_words(frame.trace, label))}</footer>"


def _switched(trace: RoutingTrace) -> str:
    """The layers that used another expert, over the tokens that both read alike."""
    at = parting(trace)
    num = trace.columns[0].num_tokens if at is None else at
    one, other = (trace.dominant_cells(label).expert[:num] for label in trace.labels)
    is_other = one != other
    layers = np.flatnonzero(is_other.any(axis=0))
    of = f"of the {counted(num, 'token')} that both read alike"
    if not layers.size:
        return f"<p>No layer used another expert for any {of}.</p>"
    names = [*trace.expert_names, "no expert"]  # NOT_ROUTED is -1
    assert NOT_ROUTED == -1
    rows = []
    for layer in layers[::-1][:_MOST_LAYERS].tolist():
        where = is_other[:, layer]
        pairs = Counter(zip(one[where, layer].tolist(), other[where, layer].tolist(), strict=True))
        (was, now), _ = pairs.most_common(1)[0]
        rows.append(
            f"<tr><td>{layer}<td>{int(where.sum())}"
            f"<td>{html.escape(names[was])} → {html.escape(names[now])}"
        )
    head = "".join(
        f'<th scope="col">{name}' for name in ("Layer", "Tokens", "Most often, from → to")
    )
    return (
        f"<details><summary>{counted(len(layers), 'layer')} of {trace.num_layers} used another "
        f'expert for some {of}</summary><div class="rv-scroll" tabindex="0" role="region" '
        f'aria-label="Layers that switched"><table><thead><tr>{head}<tbody>{"".join(rows)}'
        "</table></div></details>"
    )


def _routing(frame: Frame) -> str:
    """The routing of the changed column, folded."""
    assert frame.trace is not None
    view = charts.routing_view(frame.trace, frame.columns[1].label).html
    return f"<details><summary>The routing of the changed column</summary>{view}</details>"
