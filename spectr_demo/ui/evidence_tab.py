"""The tab of evidence: what was measured, what each router does, and a small evaluation to run."""

import html
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from spectr_demo.charts import table
from spectr_demo.config import DEFAULT_ROUTER, RouterConfig
from spectr_demo.evaluation.report import conditions, load_results
from spectr_demo.routing.routers import ROUTERS, parse_router
from spectr_demo.ui import cards, evidence
from spectr_demo.ui.libraries import Libraries
from spectr_demo.ui.pictures import Slot, Updates
from spectr_demo.ui.run import FITTING, MAX_COLUMNS, Steps
from spectr_demo.ui.trial import (
    NUM_PROMPTS,
    Trial,
    check_routers,
    chosen_prompts,
    domains_for,
    run_trial,
)
from spectr_demo.web import log_fault

logger = logging.getLogger(__name__)

PRIVATE: dict[str, Any] = {"api_visibility": "private"}
QUESTIONS = {
    "right": "Who answers right?",
    "finds": "Who finds the expert?",
    "chat": "Who leaves ordinary chat alone?",
    "cost": "What does it cost?",
    "confusion": "Which expert was chosen for which domain?",
}
TICKED = ("base", "spectr-paper", DEFAULT_ROUTER)
_MARKS = {"right": "✓", "partly right": "◐", "wrong": "✗"}


def lay_out(tab: gr.Tab, libraries: Libraries, steps: Steps, queue: dict[str, Any]) -> None:
    """Place the tab's content and wire it. Nothing is drawn before the tab is opened.

    libraries: whose experts it evaluates. steps: a run of the model. queue: of all that uses it.
    """
    if results := load_results():
        _measured(tab, results)
    gr.HTML(_routers())
    _small_evaluation(libraries, steps, queue)


def _measured(tab: gr.Tab, results: dict[str, Any]) -> None:
    gr.HTML(
        '<h2 class="section">Measured with the shipped experts</h2>'
        f'<p class="caption">{html.escape(_plain(conditions(results["meta"])))}</p>'
    )
    domain = gr.Dropdown(
        label="Domain",
        info="filters answers, decisions and choices",
        choices=evidence.domains(results),
        value=evidence.ALL,
        elem_id="evidence-domain",
    )
    slots = {}
    for pair in (("right", "finds"), ("chat", "cost"), ("confusion",)):
        with gr.Row(elem_classes="pictures"):
            for key in pair:
                slots[key] = Slot.place(f"evidence-{key}", QUESTIONS[key])

    def show(domain: str) -> Updates:
        found = evidence.pictures(results, domain)
        return {
            part: new for key, slot in slots.items() for part, new in slot.show(found[key]).items()
        }

    outputs = [part for slot in slots.values() for part in slot.parts]
    for event in (domain.input, tab.select):
        event(
            show,
            domain,
            outputs,
            show_progress="hidden",
            trigger_mode="always_last",
            **PRIVATE,
        )


def _plain(text: str) -> str:
    """Without Markdown's marks of code."""
    return text.replace("`", "")


def _routers() -> str:
    """A sentence of each router, from their table."""
    rows = [
        (row.display_name, row.sentence, row.equation, _plain(row.paper))
        for row in ROUTERS.values()
    ]
    header = ("router", "what it does", "score of expert e, or weight", "source")
    return (
        '<h2 class="section">The routers, a sentence each</h2>'
        f'<div class="routers">{table(header, rows)}</div>'
    )


def _small_evaluation(libraries: Libraries, steps: Steps, queue: dict[str, Any]) -> None:
    domains = domains_for(libraries.shared.library.names)
    gr.HTML(
        '<h2 class="section">Try it: a small evaluation, here and now</h2>'
        '<p class="caption">Held-out prompts, which no expert was trained on, answered side by '
        "side and graded by each task’s own scorer.</p>"
    )
    if not domains:
        gr.HTML(
            '<p class="about">None of the loaded experts is of a domain with held-out prompts '
            "here. <code>python -m spectr_demo evaluate</code> takes your own prompts.</p>"
        )
        return
    with gr.Row():
        chosen = gr.CheckboxGroup(
            label="Domains",
            choices=domains,
            value=domains[:3],
            scale=3,
            elem_id="trial-domains",
        )
        num = gr.Slider(
            label="Prompts a domain",
            minimum=1,
            maximum=NUM_PROMPTS,
            step=1,
            value=1,
            scale=1,
            min_width=200,
            elem_id="trial-num",
        )
    routers = gr.CheckboxGroup(
        label=f"Routers (1 to {MAX_COLUMNS})",
        choices=[(row.display_name, row.key) for row in ROUTERS.values()],
        value=list(TICKED),
        elem_id="trial-routers",
    )
    with gr.Row(elem_id="trial-actions"):
        run = gr.Button("Evaluate", variant="primary", elem_id="trial-run")
        cancel = gr.Button("Cancel", interactive=False, elem_id="trial-cancel")
    notice = gr.HTML(visible=False, elem_id="trial-notice")
    shown = gr.HTML(elem_id="trial")
    stopping = gr.State(None)

    def evaluate(domains: list[str], routers: list[str], num: float) -> Iterator[Updates]:
        stop = threading.Event()
        try:
            examples = chosen_prompts(domains, int(num))
            snapshot = libraries.model.snapshot
            configs = _configs(routers, snapshot.library.names)
            yield {
                stopping: stop,
                run: gr.update(interactive=False),
                cancel: gr.update(interactive=True),
                notice: gr.update(visible=False),
            }
            for trial in run_trial(libraries.bound(steps, snapshot), examples, configs, stop):
                yield {shown: trial_html(trial)}
            message = ""
        except ValueError as error:
            message = str(error)
        except gr.Error as error:
            message = error.message
        except Exception as error:
            log_fault(logger, "a small evaluation failed", error)
            message = f"The evaluation broke off ({type(error).__name__}); run it again."
        yield {
            run: gr.update(interactive=True),
            cancel: gr.update(interactive=False),
            notice: gr.update(value=cards.notice(message), visible=bool(message)),
        }

    run.click(
        evaluate,
        [chosen, routers, num],
        [stopping, run, cancel, notice, shown],
        show_progress="hidden",
        **queue,
        **PRIVATE,
    )
    cancel.click(_stop, stopping, None, queue=False, **PRIVATE)


def _configs(keys: Sequence[str], names: Sequence[str]) -> list[RouterConfig]:
    """In the order of the table of routers."""
    routers = [
        FITTING if key == "single" else parse_router(key, names) for key in ROUTERS if key in keys
    ]
    check_routers(routers)
    return routers


def _stop(stop: threading.Event | None) -> None:
    if stop is not None:
        stop.set()


def trial_html(trial: Trial) -> str:
    """How many are right so far, and each prompt with its answers."""
    names = [ROUTERS[router.name].display_name for router in trial.routers]
    graded = trial.graded
    tallies = "".join(
        f"<li><b>{html.escape(name)}</b> "
        f"{sum(row.verdicts[number] == 'right' for row in graded)} of {len(graded)} right</li>"
        for number, name in enumerate(names)
    )
    state = {
        "finished": "✓ finished",
        "stopped": f"■ stopped after {len(graded)} of {trial.num} prompts",
    }.get(trial.status, f"prompt {len(trial.rows)} of {trial.num} …")
    if trial.in_line:
        state += f" {cards.in_line(trial.in_line)}"
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in ("prompt", *names))
    body = "".join(_row(row, len(names)) for row in trial.rows)
    return (
        f'<div class="trial is-{trial.status}"><p class="state" role="status">{state}</p>'
        f'<ul class="tallies">{tallies}</ul>'
        '<div class="table" tabindex="0" role="group" aria-label="Prompts and answers">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></div>"
    )


def _row(row: Any, num: int) -> str:
    cells = []
    for number in range(num):
        answer = row.answers[number] if row.answers else ""
        verdict = row.verdicts[number] if row.verdicts else ""
        mark = f"<b>{_MARKS[verdict]} {verdict}</b> " if verdict else ""
        kind = verdict.split()[0] if verdict else "open"
        cells.append(
            f'<td class="is-{kind}">{mark}<code dir="auto">{html.escape(answer)}</code></td>'
        )
    (request,) = row.example.requests
    asked = html.escape(row.example.prompt)
    return (
        f'<tr><th scope="row"><small>{html.escape(row.domain)}</small>'
        f'<span dir="auto">{asked}</span>'
        f'<code dir="auto">→ {html.escape(request.answer)}</code></th>{"".join(cells)}</tr>'
    )
