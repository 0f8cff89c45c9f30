"""The page's own HTML: what is loaded, the answers side by side, and messages.

Everything that a model, an adapter or a visitor wrote is escaped here, and only here.
"""

import datetime
import html
from collections.abc import Mapping, Sequence

import numpy as np

from spectr_demo.charts import expert_colors, trace_colors
from spectr_demo.charts.text import counted
from spectr_demo.config import DEFAULT_ROUTER, PAGE_COLUMNS, RouterConfig, space_id
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.run import ColumnOutput
from spectr_demo.evaluation.tasks import TASKS
from spectr_demo.experts import inspection
from spectr_demo.experts.adapters import Adapter
from spectr_demo.experts.messages import MOST_SAID, shown
from spectr_demo.routing.routers import ROUTERS
from spectr_demo.trace import NOT_ROUTED, TIE_MARGIN, RoutingTrace
from spectr_demo.ui.examples import Example, example_of
from spectr_demo.ui.grades import Grade, Verdict, grade, overall
from spectr_demo.ui.recorded import Recording
from spectr_demo.ui.records import training_record
from spectr_demo.ui.run import Frame, Waiting

MAX_CHIPS = 24
MAX_CHECKED = 100  # experts whose pairs are compared when the page is made: a second's work
# Colour behind an answer's token, in percent, by its expert's lead over the second.
_WEAKEST, _STRONGEST, _STEP = 14, 44, 6
# The columns that are ticked when the page opens, in a few words each.
_IN_SHORT = {
    "base": "no expert",
    "single": "the one that fits the prompt",
    "uniform": "all experts at once",
    "spectr-paper": "each token its own",
    "spectr-context": "each request its own",
}
# What a router chooses by, in words; a router that is not here is told by its equation.
_BY = {
    "arrow": "by |a* · x|, the expert’s main direction",
    "spectr": "by ‖A* x‖",
    "spectr-paper": "by ‖A* x‖",
    "spectr-calibrated": "by ‖A* x‖ beside that of ordinary text",
    "spectr-context": "by how far it stands out in the request",
    "lag": "by ‖A* x‖, among the 20 with the best main direction",
    "norm": "by ‖B A x‖, the length of its output",
}
_LINKS = {
    "Paper": "https://arxiv.org/abs/2504.03454",
    "Code": "https://github.com/spectr-demo/spectr-demo",
    "Docs": "https://github.com/spectr-demo/spectr-demo/tree/main/docs",
}
_MARKS: dict[Verdict, str] = {"right": "✓", "partly right": "◐", "wrong": "✗"}
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def header(model: SpectrModel) -> str:
    """What this is in two sentences, where to read on, and what is loaded."""
    base, library = model.base, model.library
    dtype = str(base.compute_dtype).removeprefix("torch.")
    facts = (
        base.name,
        f"{base.bits}-bit: {base.quantization}",
        f"computes in {dtype} on {base.device}",
    )
    colors = expert_colors(library.names)
    chips = [
        _chip(number, adapter, colors[adapter.name])
        for number, adapter in enumerate(library.adapters[:MAX_CHIPS])
    ]
    if len(library.adapters) > MAX_CHIPS:
        chips.append(f'<span class="chip">and {len(library.adapters) - MAX_CHIPS} more</span>')
    experts = "".join(chips) or '<span class="chip">none loaded</span>'
    links = " · ".join(
        f'<a href="{url}" target="_blank" rel="noopener">{name}</a>' for name, url in _LINKS.items()
    )
    return (
        '<header class="masthead"><h1>Every request finds its expert</h1>'
        "<p>One language model, several LoRA experts, and no trained router: the experts’ own "
        "weights say what they are for. SpectR asks them at every token and layer, SpectR in "
        f"context once for each request of a message. {links}</p>"
        f"<details open><summary>{counted(len(library.adapters), 'expert')} loaded</summary>"
        f'<dl class="loaded"><dt>Base</dt><dd>{escape(" · ".join(facts))}</dd>'
        f'<dt>Experts</dt><dd class="chips">{experts}</dd>{_warnings(model)}</dl></details>'
        "</header>"
    )


def _warnings(model: SpectrModel) -> str:
    """What is not used as its files say, and experts that cannot be told apart, or are weak; these
    are not looked for in a library too large to say."""
    warnings = list(model.base.notices)
    if len(model.library.names) <= MAX_CHECKED:
        warnings += inspection.warnings(model.library)
    found = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    return f'<dt>Warnings</dt><dd><ul class="warnings">{found}</ul></dd>' if found else ""


def placeholder() -> str:
    """What stands in the answers' place before the first run."""
    ghosts = "".join(
        f'<article class="answer is-ghost"><header><h3>{ROUTERS[name].display_name}</h3>'
        f"<p>{_IN_SHORT[name]}</p></header>"
        '<div class="line"></div><div class="line"></div><div class="line"></div></article>'
        for name in PAGE_COLUMNS
    )
    return (
        f'<div class="answers" style="--n:{len(PAGE_COLUMNS)}">{ghosts}</div>'
        '<p class="hint">The answers will be written here, side by side, each token on the colour '
        "of the expert that served it. Which layer chose it is drawn below.</p>"
    )


def answers(frame: Frame, expert_names: Sequence[str], prompt: str = "") -> str:
    """The columns of a run as cards; their tokens coloured as far as the frame's trace goes.

    prompt: of an example, whose finished answers are graded.
    """
    colors = trace_colors(frame.trace) if frame.trace else expert_colors(expert_names)
    example = example_of(prompt)
    cards = "".join(
        _answer(frame, column, router, colors, example)
        for column, router in zip(frame.columns, frame.routers, strict=True)
    )
    n = len(frame.columns)
    return f'<div class="answers" style="--n:{n if n < 6 else 3}">{cards}</div>'


def about(prompt: str, num_columns: int, recording: Recording | None = None) -> str:
    """The sentence that says what the cards show, and whether it was recorded."""
    example = example_of(prompt)
    ways = _NUMBERS[num_columns] if num_columns < len(_NUMBERS) else str(num_columns)
    num = len(example.requests) if example else 1
    what = "One message" if num == 1 else f"One message with {_NUMBERS[num]} requests"
    graded = " and graded by the reference answer" if example else ""
    sentence = (
        f"{what}, answered {ways} ways{graded}: each token stands on the colour of the expert "
        "that served it."
    )
    return (
        f'<h2 class="heard">Answers</h2><p class="about">{sentence}'
        f"{_mark(recording) if recording else ''}</p>"
    )


def _mark(recording: Recording) -> str:
    """That a run was recorded: when, with what, and how to have it live."""
    day = datetime.date.fromisoformat(recording.date)
    settings = recording.settings
    how = "greedy" if settings.temperature == 0 else f"temperature {settings.temperature:g}"
    facts = (
        f"on {day.day} {day:%B %Y}",
        recording.model,
        recording.device,
        f"{how}, up to {settings.max_new_tokens} tokens",
        f"experts of commit {recording.commit}",
    )
    return (
        f' <span class="recorded"><b>Recorded</b> {escape(", ".join(facts))}. '
        "<b>Run</b> answers it here and now.</span>"
    )


def title(router: RouterConfig) -> str:
    """A router's name for people."""
    name = ROUTERS[router.name].display_name
    return f"{name}: {router.expert}" if router.expert else name


def titles(frame: Frame) -> list[tuple[str, str]]:
    """The name and the label of each column."""
    pairs = zip(frame.routers, frame.columns, strict=True)
    return [(title(router), column.label) for router, column in pairs]


def opens_on(frame: Frame) -> str:
    """The label of the column whose routing is shown first: the default router's; else of one that
    chooses, or one with an expert."""
    columns = zip(frame.routers, frame.columns, strict=True)
    _, column = min(
        columns,
        key=lambda each: (
            each[0].name != DEFAULT_ROUTER,
            not ROUTERS[each[0].name].chooses,
            each[0].name == "base",
        ),
    )
    return column.label


def settings_in_words(router: RouterConfig, num_experts: int, why: str = "") -> str:
    """What a router does with its experts, such as "the best 4 of 9 experts, equal weights".

    why: of a single expert that was chosen.
    """
    if router.name == "base":
        return "no expert"
    if router.name == "single":
        if not router.expert:
            return "the expert that fits the prompt"
        return f"{why}, for every token" if why else "this expert for every token"
    what = "factors merged" if router.composition == "parameters" else "outputs mixed"
    if router.name == "uniform":
        return f"all {counted(num_experts, 'expert')} at 1/{num_experts}, {what}"
    row = ROUTERS[router.name]
    of = f"of {num_experts} per {'request' if row.reads_request else 'token and layer'}"
    by = _BY.get(router.name, f"by {row.equation}")
    if router.top_k == 1:
        return f"K = 1: the best {of}, {by}"
    weights = "equal weights"
    if router.weighting == "softmax":
        weights = f"softmax weights (temperature {router.temperature:g})"
    return f"K = {router.top_k} {of}, {by}; {weights}, {what}"


def notice(message: str) -> str:
    """One message about what could not be done; nothing else on the page changes."""
    return f'<div class="notice" role="alert">{escape(shown(message, MOST_SAID))}</div>'


def copies(python: str, command: str, query: str) -> str:
    """What copies a run as code, and the link to it; the script does it."""
    texts = (("Copy as Python", python), ("Copy as command", command))
    buttons = "".join(
        f'<button type="button" class="copy" data-copy="{escape(text)}">{name}</button>'
        for name, text in texts
    )
    space = escape(space_id())
    link = f'data-query="{escape(query)}" data-space="{space}"'
    return (
        f'<p class="copies">{buttons}<button type="button" class="copy" {link}>Copy link</button>'
        "</p>"
    )


def charts_caption(prompt: str) -> str:
    """Whose routing is drawn."""
    prompt = " ".join(prompt.split())
    short = prompt if len(prompt) <= 120 else prompt[:119] + "…"
    return f'<p class="caption">Of the run “{escape(short)}”</p>'


def in_line(waiting: Waiting) -> str:
    """Where a run stands that waits, such as "number 2 in line, about 12 s"."""
    words = f"number {waiting.place} in line"
    if waiting.seconds is None:
        return words
    return f"{words}, about {max(1, round(waiting.seconds))} s"


def _answer(
    frame: Frame,
    column: ColumnOutput,
    router: RouterConfig,
    colors: Mapping[str, str],
    example: Example | None,
) -> str:
    is_done = column.is_finished or frame.status == "finished"
    state = "finished" if is_done else frame.status
    word = {
        "waiting": in_line(frame.in_line) if frame.in_line else "reading the prompt …",
        "running": "writing …",
        "finished": "✓ finished",
        "stopped": "■ stopped",
    }[state]
    if is_done and column.is_cut:
        word = "■ cut at its length"
    if column.error:
        word = f"■ {escape(column.error)}"
    facts = [f'<span class="state{" is-cut" if "cut" in word else ""}">{word}</span>']
    if column.num_tokens:
        facts.append(f"<span>{counted(column.num_tokens, 'token')}</span>")
    if column.tokens_per_second:
        facts.append(f"<span>{column.tokens_per_second:.1f} tokens/s</span>")
    body = _text(column, frame.trace, colors)
    if not body and is_done:
        body = '<span class="empty">ended without a word</span>'
    caret = '<span class="caret"></span>' if state in ("waiting", "running") else ""
    words = settings_in_words(router, len(colors), frame.why)
    graded = _graded(grade(example, column.text)) if example and is_done else ""
    return (
        f'<article class="answer is-{state}" data-column="{escape(column.label)}">'
        f"<header><h3>{escape(title(router))}</h3>"
        '<button type="button" class="copy" aria-label="Copy this answer">Copy</button>'
        f"<p>{words}</p>{_whom(column, router, frame.trace, colors)}</header>"
        f'<div class="text" dir="auto">{body}{caret}</div>'
        f"{_share_bar(column, frame.trace, colors)}"
        f"<footer>{''.join(facts)}</footer>{graded}</article>"
    )


def _graded(grades: list[Grade]) -> str:
    """Right, partly right or wrong; the reference answers are one click away."""
    verdict = overall(grades)
    words = f"{_MARKS[verdict]} {verdict}"
    if len(grades) > 1:
        num_right = sum(each.verdict == "right" for each in grades)
        words += f": {num_right} of {len(grades)}"
    elif verdict == "partly right":
        words += f": {grades[0].score:.2f}"
    rows = "".join(
        f"<li>{_MARKS[each.verdict]} <code>{escape(each.request.answer)}</code> "
        f"<small>{escape(each.request.task or 'ordinary question')}, {each.metric}: "
        f"{each.score:.2f}</small></li>"
        for each in grades
    )
    kind = verdict.split()[0]
    return (
        f'<details class="grade is-{kind}"><summary><b>{words}</b> <u>reference</u></summary>'
        f"<ol>{rows}</ol></details>"
    )


def _whom(
    column: ColumnOutput,
    router: RouterConfig,
    trace: RoutingTrace | None,
    colors: Mapping[str, str],
) -> str:
    """Whom the requests of a message were for, once that is known, and where a router reads them.

    The answer says it: each request has tokens there, in the order of the message.
    Two requests that follow each other and are for the same expert are one.
    """
    if trace is None or not ROUTERS[router.name].reads_request:
        return ""
    names, recorded = np.array(trace.expert_names), trace.column(column.label)
    share = trace.token_share(column.label)[recorded.part_slice("answer")]
    if not len(share):
        return ""
    is_next = np.append(True, (share[1:] != share[:-1]).any(axis=1))
    lanes = [names[weights > 0] for weights in share[is_next]]
    if not any(map(len, lanes)):
        return '<p class="whom">No expert stands out; the base answers</p>'
    named = [
        " and ".join(
            f'<span><i style="background:{colors[name]}"></i><b>{escape(name)}</b></span>'
            for name in lane
        )
        or "the base"
        for lane in lanes
    ]
    return f'<p class="whom">For {", then ".join(named)}</p>'


def _text(column: ColumnOutput, trace: RoutingTrace | None, colors: Mapping[str, str]) -> str:
    """The answer so far: coloured up to where the trace ends, plain after it. Each token of the
    trace is an element, which the routing view can mark.

    The answers to several requests grow side by side, a line each. So what a line has gained since
    the trace stands between its last token there and the next line.
    """
    if trace is None:
        return escape(column.text)
    recorded = trace.column(column.label)
    expert, margin = trace.dominant_tokens(column.label)
    runs: list[tuple[str, str]] = []  # (style, tokens); neighbours of one style become one element
    done = 0
    for t in range(recorded.num_prompt, recorded.num_tokens):
        piece = recorded.tokens[t]
        if not column.text.startswith(piece, done):
            end = column.text.find("\n", done)
            if not piece.endswith("\n") or end < 0 or not column.text[done:].startswith(piece[:-1]):
                break  # an end token, which has no text; or text that settles with the next one
            piece = column.text[done : end + 1]
        done += len(piece)
        style = ""
        if expert[t] != NOT_ROUTED and margin[t] > TIE_MARGIN:
            strength = _WEAKEST + (_STRONGEST - _WEAKEST) * float(np.sqrt(min(1.0, margin[t])))
            color = colors[trace.expert_names[expert[t]]]
            style = f"--c:{color};--a:{round(strength / _STEP) * _STEP}%"
        token = f"<i>{escape(piece)}</i>"
        if runs and runs[-1][0] == style:
            runs[-1] = style, runs[-1][1] + token
        else:
            runs.append((style, token))
    coloured = "".join(
        f'<mark style="{style}">{tokens}</mark>' if style else tokens for style, tokens in runs
    )
    return coloured + escape(column.text[done:])


def shares(trace: RoutingTrace, label: str) -> list[tuple[str, float]]:
    """Who served an answer, and how much of it, the largest part first; "base" is what no expert
    served. Empty where nothing was read yet."""
    answer = trace.column(label).part_slice("answer")
    if not trace.is_token_read(label)[answer].any():
        return []
    share = trace.share(label, "answer")
    found = zip([*trace.expert_names, "base"], np.append(share, 1 - share.sum()), strict=True)
    kept = [(name, float(value)) for name, value in found if value >= 0.001]
    return sorted(kept, key=lambda each: -each[1])


def shares_in_words(trace: RoutingTrace, label: str) -> str:
    """Such as "60% base, 40% kjv"."""
    return _in_words(shares(trace, label))


def _in_words(found: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{value:.0%} {name}" for name, value in found)


def _share_bar(column: ColumnOutput, trace: RoutingTrace | None, colors: Mapping[str, str]) -> str:
    """Who served the answer so far as one thin bar; what no expert served is hatched."""
    found = shares(trace, column.label) if trace else []
    if trace is None or not found:
        return '<div class="share"></div>'
    parts = "".join(
        f'<i style="width:{value:.1%};background:{colors[name]}"></i>'
        if name in colors
        else f'<i class="is-base" style="width:{value:.1%}"></i>'
        for name, value in found
    )
    words = _in_words(found)
    return (
        f'<div class="share" role="img" aria-label="{escape(words)}" title="{escape(words)}">'
        f"{parts}</div>"
    )


def _chip(number: int, adapter: Adapter, color: str) -> str:
    """An expert's name and colour; what it does stands in a tip, for mouse, keyboard and finger."""
    tip = "".join(f"<span>{escape(line)}</span>" for line in _what_it_does(adapter))
    return (
        f'<span class="has-tip"><button type="button" class="chip" aria-describedby="tip-{number}">'
        f'<i style="background:{color}"></i><b>{escape(adapter.name)}</b></button>'
        f'<span role="tooltip" class="tip" id="tip-{number}">{tip}</span></span>'
    )


def _what_it_does(adapter: Adapter) -> list[str]:
    """Of an expert that this project trained: its task, an example, its score. Its size of any."""
    low, high = adapter.ranks
    rank = f"rank {low}" if low == high else f"rank {low}–{high}"
    size = f"{rank}, {adapter.num_bytes / 1e6:.1f} MB"
    record = training_record(adapter)
    if record is None:
        return [size]
    task, example, scores = record["task"], record["example"], record["scores"]
    means = [f"{name} {scores[name]['all']['mean']:.2f}" for name in ("expert", "base")]
    return [
        TASKS[task].title if task in TASKS else task,
        f"“{example['prompt']}” → {example['answer']}",
        f"{record['metric']}, held-out prompts: {', '.join(means)}",
        size,
    ]


def escape(text: str) -> str:
    return html.escape(text, quote=True)
