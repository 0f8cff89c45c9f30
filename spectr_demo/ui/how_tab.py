"""The tab that shows how it works: one token through one linear layer, step by step."""

import html
import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import gradio as gr
import numpy as np

from spectr_demo.charts import Bar, Picture, bars, best_first, grid
from spectr_demo.charts.text import counted, visible
from spectr_demo.engine.model import SpectrModel
from spectr_demo.ui import cards
from spectr_demo.ui.how import Floats, Look, look_inside, places
from spectr_demo.ui.libraries import Libraries
from spectr_demo.ui.line import Line, in_line
from spectr_demo.ui.lists import ExpertLists
from spectr_demo.ui.pictures import Slot, Updates
from spectr_demo.ui.records import training_record
from spectr_demo.ui.run import Waiting
from spectr_demo.web import log_fault

logger = logging.getLogger(__name__)

PRIVATE: dict[str, Any] = {"api_visibility": "private"}
GPU_SECONDS = 15
MAX_SHOWN = 12  # experts in one picture
_FEW = 4  # numbers of a vector that are shown
STEPS = {
    "z": "Step 2: each expert looks at the token.  zₑ = A*ₑ x",
    "scores": "Step 3: how much of it does each see?  sₑ = ‖A*ₑ x‖",
    "mix": "Step 4: the best K are mixed.  h = Σ wₑ zₑ,  wₑ = 1/K",
    "output": "Step 5: the layer’s output.  y = W x + (Σ wₑ B*ₑ) h",
    "votes": "And in the other layers?  This token’s best expert in each",
}


def lay_out(
    tab: gr.Tab,
    libraries: Libraries,
    gpu: Callable[..., Any] | None,
    line: Line,
    queue: dict[str, Any],
    lists: ExpertLists,
) -> None:
    """Place the tab's content and wire it. The model reads nothing before the tab is opened.

    libraries: whose experts it shows. gpu: see `page.build`. line, queue: of all that uses the
    model. lists: what tells which experts there are.
    """
    model = libraries.shared
    gr.HTML(_introduction())
    without = gr.HTML(
        '<p class="about">No expert is loaded: each layer’s output is the base’s own, y = W x. '
        "<code>python app.py --experts FOLDER</code> loads LoRA adapters.</p>",
        visible=not model.library.banks,
    )
    look = look_inside(model)
    if gpu is not None:
        look = gpu(duration=GPU_SECONDS)(look)
    looks = in_line(look, line)
    layers, projections = _places(model)
    with gr.Row(visible=bool(model.library.banks)) as asked:
        prompt = gr.Textbox(
            label="A short prompt",
            info="the base reads it; Enter looks inside",
            value=_first_prompt(model),
            lines=1,
            max_lines=4,
            scale=5,
            min_width=260,
            elem_id="how-prompt",
        )
        button = gr.Button("Look inside", variant="primary", scale=1, elem_id="how-run")
    with gr.Row(visible=bool(model.library.banks)) as places_shown:
        token_shown = gr.Dropdown(label="Token", choices=[], min_width=90, elem_id="how-token")
        layer = gr.Dropdown(label="Layer", **layers, min_width=90, elem_id="how-layer")
        projection = gr.Dropdown(
            label="Linear layer in it", **projections, min_width=90, elem_id="how-projection"
        )
    notice = gr.HTML(visible=False, elem_id="how-notice")
    with gr.Column(visible=False, elem_id="how-steps") as steps:
        first = gr.HTML(elem_id="how-x")
        slots = {}
        for pair in (("z", "scores"), ("mix", "output"), ("votes",)):
            with gr.Row(elem_classes="pictures"):
                for key in pair:
                    slots[key] = Slot.place(f"how-{key}", STEPS[key])
    is_read = gr.State(False)

    def inside(prompt: str, token: int | None, layer: int, projection: str) -> Iterator[Updates]:
        try:
            looked = libraries.bound(looks, libraries.model.snapshot)
            with closing(looked(prompt, token, layer, projection)) as going:
                for found in going:
                    yield _waits(found) if isinstance(found, Waiting) else _shows(found)
        except gr.Error as error:
            yield {notice: gr.update(value=cards.notice(error.message), visible=True)}
        except Exception as error:
            log_fault(logger, "a look inside failed", error)
            message = f"The look inside failed ({type(error).__name__}); try again."
            yield {notice: gr.update(value=cards.notice(message), visible=True)}

    def _waits(waiting: Waiting) -> Updates:
        words = cards.in_line(waiting) if waiting.place > 1 else "reading the prompt …"
        return {notice: gr.update(value=f'<p class="caption">{words}</p>', visible=True)}

    def _shows(at: Look) -> Updates:
        pictures = pictures_of(at)
        shown = [slot.show(pictures[key]) for key, slot in slots.items()]
        return {
            is_read: True,
            notice: gr.update(visible=False),
            steps: gr.update(visible=True),
            first: first_step(at),
            token_shown: gr.update(choices=_choices(at.tokens), value=at.token),
            **{part: new for updates in shown for part, new in updates.items()},
        }

    def read(prompt: str, layer: int, projection: str) -> Iterator[Updates]:
        yield from inside(prompt, None, layer, projection)

    def open_how(was_read: bool, prompt: str, layer: int, projection: str) -> Iterator[Updates]:
        if was_read or not libraries.model.library.banks:
            yield {is_read: was_read}
        else:
            yield from read(prompt, layer, projection)

    def renew(model: SpectrModel) -> Updates:
        """After a change: what was read is of other experts."""
        has_experts, (layers, projections) = bool(model.library.banks), _places(model)
        return {
            is_read: False,
            steps: gr.update(visible=False),
            notice: gr.update(visible=False),
            without: gr.update(visible=not has_experts),
            **{row: gr.update(visible=has_experts) for row in (asked, places_shown)},
            layer: gr.update(**layers),
            projection: gr.update(**projections),
        }

    lists.add([is_read, steps, notice, without, asked, places_shown, layer, projection], renew)
    outputs = [is_read, notice, steps, first, token_shown]
    outputs += [part for slot in slots.values() for part in slot.parts]
    options = {"show_progress": "minimal", "show_progress_on": button, **queue, **PRIVATE}
    gr.on([button.click, prompt.submit], read, [prompt, layer, projection], outputs, **options)
    gr.on(
        [token_shown.input, layer.input, projection.input],
        inside,
        [prompt, token_shown, layer, projection],
        outputs,
        trigger_mode="always_last",
        **options,
    )
    tab.select(open_how, [is_read, prompt, layer, projection], outputs, **options)


def _introduction() -> str:
    return (
        '<h2 class="section">One token through one layer</h2>'
        '<p class="caption">A linear layer of the base turns x into W x. Each expert was written '
        "once as two factors, B*ₑ A*ₑ: the rows of A*ₑ are the directions it responds to, the "
        "largest first. SpectR lets these directions choose. Here it does so with the experts that "
        "are loaded, with the paper’s K = 4 where there are so many. The bare base reads the "
        "prompt, so nothing is added in the layers below.</p>"
    )


def _places(model: SpectrModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """Choices and value: of the layers that some expert touches, and of their projections."""
    by_layer = places(model.library)
    if not by_layer:
        return {"choices": [], "value": None}, {"choices": [], "value": None}
    projections = list(dict.fromkeys(name for names in by_layer.values() for name in names))
    middle = list(by_layer)[len(by_layer) // 2]
    return (
        {"choices": list(by_layer), "value": middle},
        {"choices": projections, "value": by_layer[middle][0]},
    )


def _first_prompt(model: SpectrModel) -> str:
    """What an expert is for, by its record; else a question for anyone."""
    for adapter in model.library.adapters:
        if adapter.name == "sql" and (record := training_record(adapter)):
            return str(record["example"]["prompt"])
    return "What is the capital of France?"


def _choices(tokens: tuple[str, ...]) -> list[tuple[str, int]]:
    return [(f"{number}: {_shown(token)}", number) for number, token in enumerate(tokens)]


def _shown(token: str) -> str:
    """A token's text, its spaces and line breaks visible."""
    return visible(token).replace(" ", "␣") or "(part of a character)"


def first_step(look: Look) -> str:
    """The token, and what it is in this layer."""
    length = float(np.linalg.norm(look.x))
    numbers = ", ".join(f"{value:.2f}" for value in look.x[:_FEW])
    before = "".join(look.tokens[max(0, look.token - 12) : look.token])
    after = "".join(look.tokens[look.token + 1 : look.token + 13])
    text = f"{html.escape(before.lstrip())}<mark>{html.escape(look.tokens[look.token])}</mark>"
    return (
        '<div class="chart picture"><p class="asked">Step 1: the token’s vector.  x</p>'
        f'<div class="finding"><h3>“{html.escape(_shown(look.tokens[look.token]))}” comes to '
        f"{html.escape(look.projection)} of layer {look.layer} as {len(look.x)} numbers, of length "
        f"{length:.1f}</h3><p>x = ({numbers}, …)</p></div>"
        f'<p class="read" dir="auto">{text}{html.escape(after)}</p></div>'
    )


def pictures_of(look: Look) -> dict[str, Picture]:
    """One for each further step."""
    return {
        "z": _directions(look),
        "scores": _scores(look),
        "mix": _mix(look),
        "output": _output(look),
        "votes": _votes(look),
    }


def _best(look: Look) -> list[int]:
    """Experts by score, as many as a picture shows."""
    return np.argsort(-look.scores, kind="stable")[:MAX_SHOWN].tolist()


def _more(look: Look) -> str:
    rest = len(look.experts) - MAX_SHOWN
    return f"; {rest} with lower scores are left out" if rest > 0 else ""


def _directions(look: Look) -> Picture:
    shown = _best(look)
    sizes = np.abs(look.z[shown])
    row, direction = np.unravel_index(int(sizes.argmax()), sizes.shape)
    name = look.experts[shown[row]]
    r = sizes.shape[1]
    return Picture(
        title=f"{name} responds most: {sizes.max():.2f} along its direction {direction + 1} of {r}",
        note="Size of x along each direction of each expert, the direction with the largest "
        f"singular value first{_more(look)}",
        figure=_grid(sizes, [look.experts[i] for i in shown]),
        header=("expert", *map(str, range(1, r + 1))),
        rows=[(look.experts[i], *(f"{value:.3f}" for value in look.z[i])) for i in shown],
    )


def _grid(sizes: Floats, names: list[str]) -> Any:
    """Experts down, directions across."""
    r = sizes.shape[1]
    return grid(
        sizes.astype(float),
        x=[str(number) for number in range(1, r + 1)],
        y=names,
        x_title="direction",
        y_title="",
        form=".1f",
        is_written=r <= 8,
    )


def _scores(look: Look) -> Picture:
    shown = _best(look)
    rows = [
        Bar(name=look.experts[i], value=float(look.scores[i]), is_marked=i in look.chosen)
        for i in shown
    ]
    first = rows[0]
    title = f"{first.name} sees {first.value:.2f} of the token’s {np.linalg.norm(look.x):.1f}"
    if len(rows) > 1:
        lead = first.value / max(rows[1].value, 1e-12) - 1
        title = f"{first.name} scores highest, {lead:.0%} above {rows[1].name}"
    return Picture(
        title=title,
        note=f"Length of zₑ: what of x lies in the expert’s directions. Marked: the "
        f"{counted(len(look.chosen), 'expert')} with the best score{_more(look)}",
        figure=bars(rows, axis="score"),
        header=("expert", "score", "chosen"),
        rows=[(bar.name, bar.words(".4f"), "yes" if bar.is_marked else "no") for bar in rows],
    )


def _mix(look: Look) -> Picture:
    names = [look.experts[i] for i in look.chosen]
    sizes = np.abs(np.stack([*(look.z[i] for i in look.chosen), look.mixed]))
    weights = ", ".join(
        f"{name} {weight:.2f}" for name, weight in zip(names, look.weights, strict=True)
    )
    length = float(np.linalg.norm(look.mixed))
    mean = float(np.mean([look.scores[i] for i in look.chosen]))
    title = f"The mix of {counted(len(names), 'expert')} has length {length:.2f}"
    if len(names) > 1:
        title += f"; theirs is {mean:.2f} in the mean: they cancel in part"
    return Picture(
        title=title,
        note=f"Weights: {weights}. The last row is the mix h; it goes through the mixed B*",
        figure=_grid(sizes, [*names, "h, the mix"]),
        header=("expert", "weight", *map(str, range(1, sizes.shape[1] + 1))),
        rows=[
            *(
                (name, f"{weight:.2f}", *(f"{value:.3f}" for value in look.z[i]))
                for name, weight, i in zip(names, look.weights, look.chosen, strict=True)
            ),
            ("h, the mix", "", *(f"{value:.3f}" for value in look.mixed)),
        ],
    )


def _output(look: Look) -> Picture:
    share = look.delta_length / max(look.base_length, 1e-12)
    rows = [
        Bar(name="base: W x", value=look.base_length),
        Bar(name="experts add", value=look.delta_length, is_marked=True),
    ]
    return Picture(
        title=f"The experts change this output by {share:.0%} of its length",
        note="Length of what the base computes, and of what is added to it",
        figure=bars(rows, axis="length"),
        header=("what", "length"),
        rows=[(bar.name, bar.words(".4f")) for bar in rows],
    )


def _votes(look: Look) -> Picture:
    total = sum(look.votes.values())
    rows = best_first(
        [
            Bar(name=name, value=num, is_marked=name == look.experts[look.chosen[0]])
            for name, num in look.votes.items()
        ]
    )
    first = rows[0]
    return Picture(
        title=f"{first.name} is best in {first.value:.0f} of {counted(total, 'linear layer')}: "
        f"{_sure(first.value / total)}",
        note="Each linear layer chooses for itself. SpectR in context asks all layers and all "
        "tokens of a request, in the metric of ordinary text, and chooses once. Marked: the best "
        "of the layer above",
        figure=bars(rows[:MAX_SHOWN], axis="linear layers", form=".0f"),
        header=("expert", "linear layers"),
        rows=[(bar.name, bar.words(".0f")) for bar in rows],
    )


def _sure(share: float) -> str:
    if share == 1:
        return "they agree"
    return "most agree" if share > 0.5 else "one token alone leaves it open"
