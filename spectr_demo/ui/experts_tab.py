"""The tab of experts: one at a time, from its files and weights, computed when it is looked at."""

import html
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gradio as gr
import numpy as np

from spectr_demo.charts import Bar, Picture, bars, best_first, grid, spectrum, table
from spectr_demo.charts.text import counted
from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation.tasks import TASKS
from spectr_demo.experts.adapters import Adapter
from spectr_demo.experts.inspection import ALIKE, ExpertSummary, overlap_of
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.ui.libraries import Libraries
from spectr_demo.ui.lists import ExpertLists
from spectr_demo.ui.pictures import Slot, Updates
from spectr_demo.ui.records import licence_of, training_record

# "always_last": a choice is not lost while the one before is drawn.
QUIET: dict[str, Any] = {
    "api_visibility": "private",
    "show_progress": "hidden",
    "trigger_mode": "always_last",
}
Near = list[tuple[str, float]]
FIRST = ("scores", "layers", "spectrum")  # what needs no other expert
NUM_NEAREST = 5
MAX_LISTED = 200


def lay_out(tab: gr.Tab, libraries: Libraries, lists: ExpertLists) -> Callable[[Any], None]:
    """Place the tab's content and wire it. No weight is read before the tab is opened.

    libraries: whose experts it shows. lists: what tells which experts there are.
    Returns a function that has the drawings follow an event, one after which the experts may be
    others.
    """
    library = libraries.shared.library
    without = gr.HTML(
        '<p class="about">No expert is loaded: the base answers alone. <code>python app.py '
        "--experts FOLDER</code> loads LoRA adapters.</p>",
        visible=not library.names,
    )
    chosen = gr.Dropdown(
        label="Expert",
        **_choices(library),
        filterable=True,
        visible=bool(library.names),
        elem_id="expert-shown",
    )
    # Hidden until it is filled, so that nothing on the page moves.
    with gr.Column(visible=False) as content:
        facts = gr.HTML(elem_id="expert-facts")
        slots = {}
        for pair in (("scores", "nearest"), ("layers", "spectrum")):
            with gr.Row(elem_classes="pictures"):
                for key in pair:
                    slots[key] = Slot.place(f"expert-{key}")
        listed = gr.HTML(_list(library), elem_id="expert-list")

    def show(name: str | None) -> Updates:
        library = libraries.model.library
        if name not in library.names:  # of all, somebody took it away
            return {content: gr.update(visible=False)}
        number = library.index(name)
        shown: Updates = {facts: facts_of(library.adapters[number])}
        for key, picture in pictures(library, number).items():
            shown |= slots[key].show(picture)
        return {content: gr.update(visible=True), **shown}

    def look_around(name: str | None) -> Updates:
        library = libraries.model.library
        if name not in library.names:
            return {slots["nearest"].box: gr.skip()}
        return slots["nearest"].show(nearest(library, library.index(name)))

    def renew(model: SpectrModel) -> Updates:
        library = model.library
        return {
            without: gr.update(visible=not library.names),
            chosen: gr.update(**_choices(library), visible=bool(library.names)),
            listed: _list(library),
        }

    lists.add([without, chosen, listed], renew)
    drawn = [facts, *(part for key in FIRST for part in slots[key].parts)]

    def draw_at(event: Callable[..., Any]) -> None:
        first = event(show, chosen, [content, *drawn], **QUIET)
        # By itself: with many experts it takes seconds.
        first.then(look_around, chosen, slots["nearest"].parts, **QUIET)

    for event in (chosen.input, tab.select):
        draw_at(event)
    return lambda change: draw_at(change.then)


def _choices(library: ExpertLibrary) -> dict[str, Any]:
    """What can be chosen, and what is at first."""
    return {
        "info": f"one of {len(library.names)}; type a part of its name or task",
        "choices": [(_title(adapter), adapter.name) for adapter in library.adapters],
        "value": library.names[0] if library.names else None,
    }


def by_overlap(library: ExpertLibrary, expert: int) -> Near:
    """The other experts that share a layer with it, the nearest first, each with its overlap."""
    overlaps = overlap_of(library, expert)
    order = np.argsort(-overlaps, kind="stable")  # those without a shared layer come last
    return [
        (library.names[other], float(overlaps[other]))
        for other in order
        if other != expert and np.isfinite(overlaps[other])
    ]


def pictures(library: ExpertLibrary, expert: int) -> dict[str, Picture | None]:
    """What can be drawn of one expert at once, by where it stands."""
    adapter = library.adapters[expert]
    return {
        "scores": _scores(adapter),
        "layers": _layers(library, expert),
        "spectrum": _spectrum(ExpertSummary.from_adapter(adapter, library.aligned[expert])),
    }


def nearest(library: ExpertLibrary, expert: int) -> Picture | None:
    """The experts that respond to what this one responds to, and whether routers can tell them
    from it."""
    near = by_overlap(library, expert)
    if not near:
        return None
    own, (name, most) = library.names[expert], near[0]
    rows = [
        Bar(name=other, value=overlap, is_marked=overlap >= ALIKE)
        for other, overlap in near[:NUM_NEAREST]
    ]
    title = f"Nearest to {own} is {name}, {most:.0%} the same: they can be told apart"
    note = "Mean overlap of the input subspaces: 0 is nothing in common, 1 the same"
    if alike := [other for other, overlap in near if overlap >= ALIKE]:
        title = f"⚠ {own} and {', '.join(alike)} cannot be told apart"
        note = f"They respond to the same inputs: keep one, or merge them. {note}"
    figure = bars(rows, axis="overlap of what they respond to", line=(ALIKE, "alike"))
    figure.update_xaxes(range=[0, 1])
    return Picture(
        title=title,
        note=note,
        figure=figure,
        header=("expert", "overlap"),
        rows=[(bar.name, bar.words(".3f")) for bar in rows],
    )


def _title(adapter: Adapter) -> str:
    record = training_record(adapter)
    return f"{adapter.name}: {_task(record)}" if record else adapter.name


def _task(record: dict[str, Any]) -> str:
    name = record["task"]
    return TASKS[name].title if name in TASKS else name


def facts_of(adapter: Adapter, more: Mapping[str, str] = MappingProxyType({})) -> str:
    """What the files say. more: further facts, by their names."""
    low, high = adapter.ranks
    layers = len(adapter.shapes)
    record = training_record(adapter)
    folder = Path(adapter.source)
    source = folder.name if folder.is_dir() else adapter.source  # not where it is on this machine
    facts = {
        "Task": _task(record) if record else "its files do not say",
        "Rank": f"{low}" if low == high else f"{low} to {high}",
        "Modules": f"{', '.join(adapter.projections)} ({counted(layers, 'linear layer')})",
        "Licence": licence_of(adapter) or "its files do not say",
        "Trained on": adapter.base_model or "its files do not say",
        "Files": f"{source}, {adapter.num_bytes / 1e6:.1f} MB, SHA-256 {adapter.sha256[:12]}…",
    }
    facts |= more
    rows = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    warned = "".join(f"<li>{html.escape(note)}</li>" for note in adapter.notes)
    warned = f'<ul class="warnings" role="note">{warned}</ul>' if warned else ""
    return f'<section class="expert">{warned}<dl>{rows}</dl>{_example(record)}</section>'


def _example(record: dict[str, Any] | None) -> str:
    if record is None:
        return ""
    asked, answer = (html.escape(record["example"][side]) for side in ("prompt", "answer"))
    return (
        f'<div class="pair"><p><b>In</b><span dir="auto">{asked}</span></p>'
        f'<p><b>Out</b><span dir="auto">{answer}</span></p></div>'
    )


def _scores(adapter: Adapter) -> Picture | None:
    """Its score beside those of the base and of the task's baselines."""
    record = training_record(adapter)
    if record is None:
        return None
    scores = {name: score["all"] for name, score in record["scores"].items() if _is_sound(score)}
    if not {"expert", "base"} <= scores.keys():
        return None
    rows = best_first(
        [
            Bar(
                name={"expert": "this expert", "base": "base model"}.get(name, name),
                value=score["mean"],
                low=score["low"],
                high=score["high"],
                is_marked=name == "expert",
            )
            for name, score in scores.items()
        ]
    )
    own, rest = scores["expert"]["mean"], [n for n in scores if n != "expert"]
    best = max(rest, key=lambda name: scores[name]["mean"])
    verb = "beats" if own > scores[best]["mean"] else "does not beat"
    other = "the base" if best == "base" else f"“{best}”"
    return Picture(
        title=f"It {verb} {other}: {own:.2f} against {scores[best]['mean']:.2f}",
        note=f"Held-out prompts, {record['metric']}, with 95% intervals",
        figure=bars(rows, axis=record["metric"]),
        header=("who", "score (95% interval)"),
        rows=[(bar.name, bar.words(".3f")) for bar in rows],
    )


def _is_sound(score: Any) -> bool:
    """A record is a file, and may be a stranger's."""
    every = score.get("all") if isinstance(score, dict) else None
    ends = [every.get(key) for key in ("mean", "low", "high")] if isinstance(every, dict) else []
    return bool(ends) and all(isinstance(end, int | float) for end in ends)


def _layers(library: ExpertLibrary, expert: int) -> Picture:
    """How much it changes each linear layer."""
    sizes = np.full((len(library.projections), library.num_layers), np.nan)
    for bank in library.banks:
        ids = bank.expert_ids.tolist()
        if expert in ids:
            norms = bank.singular_values[:, ids.index(expert)].norm(dim=-1)
            layers, projections = library.places(bank)
            sizes[projections, layers] = norms.cpu().numpy()
    P, L = sizes.shape
    num = int(np.isfinite(sizes).sum())
    projection, layer = np.unravel_index(int(np.nanargmax(sizes)), sizes.shape)
    share = "all" if num == P * L else f"{num} of"
    return Picture(
        title=f"It changes {share} {P * L} linear layers, {library.projections[projection]} of "
        f"layer {layer} most",
        note="Length of the change to each layer’s weights (Frobenius norm); empty: untouched",
        figure=grid(
            sizes,
            x=[str(number) for number in range(L)],
            y=library.projections,
            x_title="layer",
            y_title="",
            is_written=False,
            cell_px=22,
        ),
        header=("layer", *library.projections),
        rows=[
            (str(number), *("-" if np.isnan(size) else f"{size:.2f}" for size in column))
            for number, column in enumerate(sizes.T)
        ],
    )


def _spectrum(summary: ExpertSummary) -> Picture:
    first, rank = summary.spectrum[0], len(summary.spectrum)
    what = (
        "one direction says nearly all" if first > 0.9 else f"the first has {first:.0%} of the size"
    )
    return Picture(
        title=f"Of {counted(rank, 'direction')}, {what}",
        note="Squared singular values of its change, mean of its layers. Arrow scores by the first "
        f"direction, SpectR by all. Effective rank {summary.effective_rank:.1f}",
        figure=spectrum(summary.spectrum, axis="share of the size"),
        header=("direction", "share"),
        rows=[(str(number), f"{x:.1%}") for number, x in enumerate(summary.spectrum, start=1)],
    )


def _list(library: ExpertLibrary) -> str:
    """All experts as a table, as far as a page can hold them."""
    rows = []
    for adapter in library.adapters[:MAX_LISTED]:
        record = training_record(adapter)
        means = ["-", "-"]
        if record:
            means = [f"{record['scores'][n]['all']['mean']:.2f}" for n in ("expert", "base")]
        rank = "-".join(map(str, sorted(set(adapter.ranks))))
        task = _task(record) if record else "-"
        rows.append((adapter.name, task, *means, rank, f"{adapter.num_bytes / 1e6:.1f}"))
    more = len(library.adapters) - len(rows)
    rest = f"<p>{more} more: find them by name above.</p>" if more > 0 else ""
    header = ("expert", "task", "its score", "the base’s", "rank", "MB")
    return (
        f'<details class="twin"><summary>All {counted(len(library.names), "expert")}</summary>'
        f"{table(header, rows)}{rest}</details>"
    )
