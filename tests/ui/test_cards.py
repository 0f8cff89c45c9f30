"""The page's own HTML."""

import html as html_module
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectr_demo.charts import expert_colors
from spectr_demo.config import PAGE_COLUMNS, RouterConfig
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.run import ColumnOutput
from spectr_demo.routing.routers import ROUTERS, parse_router
from spectr_demo.trace import NOT_ROUTED, ColumnTrace, Reading, RoutingTrace
from spectr_demo.ui import cards
from spectr_demo.ui.examples import EXAMPLES
from spectr_demo.ui.run import FITTING, Frame
from tests.trace_samples import sample_trace

NAMES = ("chat", "code", "math", "sql")
LABELS = ("base", "single:sql", "uniform", "spectr")


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return sample_trace(200, expert_names=NAMES, num_layers=2, top_k=1)


def frame_of(text: str, trace: RoutingTrace | None = None, **changes: object) -> Frame:
    column = ColumnOutput(
        label="spectr",
        text=text,
        num_settled=0,
        num_tokens=2,
        is_finished=False,
        tokens_per_second=12.34,
    )
    frame = Frame(
        columns=(column,),
        routers=(parse_router("spectr", NAMES),),
        status="running",
        trace=trace,
    )
    return replace(frame, **changes)


def answer_of(trace: RoutingTrace, label: str) -> str:
    column = trace.column(label)
    return "".join(column.tokens[column.num_prompt :])


def test_what_a_model_wrote_is_escaped(trace: RoutingTrace) -> None:
    evil = '<script>alert(1)</script> & "quotes"'
    for shown in (frame_of(evil), frame_of(evil, trace)):
        html = cards.answers(shown, NAMES)
        assert "<script>" not in html
        assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp;" in html
    assert "<b>" not in cards.notice("<b>") + cards.charts_caption("<b>")


def test_tokens_stand_on_their_experts_colour(trace: RoutingTrace) -> None:
    text = answer_of(trace, "spectr")
    html = cards.answers(frame_of(text + " and more", trace), NAMES)
    column = trace.column("spectr")
    expert, margin = trace.dominant_tokens("spectr")
    used = {expert[t] for t in range(column.num_prompt, column.num_tokens) if margin[t] > 1e-6}
    assert used - {-1}
    colors = list(expert_colors(NAMES).values())
    for e in used - {-1}:
        assert f"--c:{colors[e]}" in html
    assert " and more</div>" in html.replace('<span class="caret"></span>', "")


def test_no_character_is_lost_to_the_colours(trace: RoutingTrace) -> None:
    text = answer_of(trace, "spectr")
    rendered = cards.answers(frame_of(text, trace), NAMES)
    body = re.search(r'<div class="text" dir="auto">(.*?)</div>', rendered, re.S)
    assert body is not None
    assert html_module.unescape(re.sub(r"<[^>]*>", "", body[1])) == text


def test_a_text_unlike_the_trace_is_shown_plain(trace: RoutingTrace) -> None:
    html = cards.answers(frame_of("\x00 something else", trace), NAMES)
    assert "something else" in html
    assert "<mark" not in html


@pytest.mark.parametrize(
    ("status", "is_finished", "word"),
    [
        ("waiting", False, "reading the prompt"),
        ("running", False, "writing"),
        ("running", True, "✓ finished"),
        ("stopped", False, "■ stopped"),
        ("stopped", True, "✓ finished"),
        ("finished", True, "✓ finished"),
    ],
)
def test_each_column_says_how_far_it_is(status: str, is_finished: bool, word: str) -> None:
    frame = frame_of("text", status=status)
    columns = (replace(frame.columns[0], is_finished=is_finished),)
    html = cards.answers(replace(frame, columns=columns), NAMES)
    assert word in html
    assert "2 tokens" in html
    assert "12.3 tokens/s" in html


def test_an_answer_without_an_end_says_that_it_was_cut() -> None:
    def html(status: str, **changes: Any) -> str:
        frame = frame_of("text", status=status)
        columns = (replace(frame.columns[0], **changes),)
        return cards.answers(replace(frame, columns=columns), NAMES)

    assert "■ cut at its length" in html("finished", is_cut=True)
    assert "cut" not in html("finished")
    assert "cut" not in html("running", is_cut=True), "another lane may go on"
    assert "■ cut at its length" in html("running", is_cut=True, is_finished=True)
    assert "■ expert &lt;b&gt; makes" in html("running", error="expert <b> makes", is_finished=True)


@pytest.mark.parametrize(
    ("router", "words"),
    [
        (parse_router("base", NAMES), "no expert"),
        (parse_router("single:sql", NAMES), "this expert for every token"),
        (parse_router("uniform", NAMES), "all 4 experts at 1/4, outputs mixed"),
        (parse_router("uniform", NAMES, composition="parameters"), "factors merged"),
        (parse_router("spectr", NAMES), "K = 1: the best of 4 per token and layer"),
        (
            parse_router("spectr", NAMES, top_k=2),
            "K = 2 of 4 per token and layer, by ‖A* x‖; equal",
        ),
        (parse_router("spectr-context", NAMES), "K = 1: the best of 4 per request"),
        (
            parse_router("spectr-context", NAMES, top_k=2),
            "stands out in the request; equal weights",
        ),
        (parse_router("arrow", NAMES, temperature=0.5), "softmax weights (temperature 0.5)"),
    ],
)
def test_settings_are_told_in_words(router: RouterConfig, words: str) -> None:
    assert words in cards.settings_in_words(router, len(NAMES))


def test_no_two_routers_are_told_in_the_same_words() -> None:
    routers = [parse_router(name, NAMES) for name in ROUTERS if name != "single"]
    words = [cards.settings_in_words(router, len(NAMES)) for router in routers]
    assert len(set(words)) == len(words)
    one = [
        cards.settings_in_words(parse_router(name, NAMES[:1]), 1)
        for name in ROUTERS
        if name != "single"
    ]
    assert "all 1 expert at 1/1" in " ".join(one)


def test_a_single_expert_says_how_it_was_chosen() -> None:
    fitting, single = FITTING, parse_router("single:sql", NAMES)
    assert cards.title(fitting) == "Single expert"
    assert cards.settings_in_words(fitting, 4) == "the expert that fits the prompt"
    frame = frame_of("text", routers=(single,), why="the expert of request 1 of 2")
    html = cards.answers(frame, NAMES)
    assert "Single expert: sql" in html
    assert "the expert of request 1 of 2, for every token" in html


EXAMPLE = next(e for e in EXAMPLES if len(e.requests) == 2)
REFERENCE = "\n".join(request.answer for request in EXAMPLE.requests)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (REFERENCE, "✓ right: 2 of 2"),
        (EXAMPLE.requests[0].answer, "◐ partly right: 1 of 2"),
        ("nothing", "✗ wrong: 0 of 2"),
    ],
)
def test_a_finished_answer_of_an_example_is_graded(text: str, verdict: str) -> None:
    html = cards.answers(frame_of(text, status="finished"), NAMES, EXAMPLE.prompt)
    assert f"<b>{verdict}</b>" in html
    for request in EXAMPLE.requests:
        assert html_module.escape(request.answer) in html


def test_only_what_has_a_reference_and_an_end_is_graded() -> None:
    assert "grade" not in cards.answers(frame_of(REFERENCE), NAMES, EXAMPLE.prompt)
    assert "grade" not in cards.answers(frame_of(REFERENCE, status="finished"), NAMES, "hello")


def test_one_sentence_says_what_is_shown() -> None:
    assert "One message with two requests, answered five ways" in cards.about(EXAMPLE.prompt, 5)
    typed = cards.about("hello", 2)
    assert "One message, answered two ways: " in typed
    assert "graded" not in typed
    assert "Recorded" not in typed


def lanes_trace(lanes: Sequence[tuple[int, ...]], answers: Sequence[Sequence[str]]) -> RoutingTrace:
    """Of a router that reads requests: a prompt of three tokens, and an answer, for each lane.

    lanes: the experts of each, which share its weight. A line end of the prompt is in no lane.
    """
    owners = [lane for i in range(len(lanes)) for lane in (i, i, i, -1)][:-1]
    pieces = ["word "] * len(owners)
    for lane, answer in enumerate(answers):
        owners += [lane] * len(answer)
        pieces += answer
    width = max(1, *map(len, lanes))
    experts = np.full((len(owners), 2, 1, width), NOT_ROUTED, np.int16)
    weights = np.zeros(experts.shape, np.float32)
    for t, lane in enumerate(owners):
        if lane < 0:
            continue
        num = len(lanes[lane])
        experts[t, ..., :num] = lanes[lane]
        weights[t, ..., :num] = 1 / max(1, num)
    ends = np.cumsum([len(piece) for piece in pieces])
    unknown = np.full(len(owners), np.nan, np.float32)
    column = ColumnTrace(
        label="spectr-context",
        router={"name": "spectr-context"},
        token_ids=np.zeros(len(owners), np.int32),
        tokens=tuple(pieces),
        spans=np.stack([ends - [len(piece) for piece in pieces], ends], 1).astype(np.int32),
        num_prompt=4 * len(lanes) - 1,
        experts=experts,
        weights=weights,
        scores=np.full_like(weights, np.nan),
        logprob=unknown,
        entropy=unknown,
        kl=unknown,
        reading=Reading(
            lanes=np.array(owners, np.int16),
            standing=np.zeros((len(lanes), len(NAMES)), np.float32),
            certainty=np.zeros((len(lanes), 2, len(NAMES)), np.float32),
        ),
    )
    return RoutingTrace(expert_names=NAMES, projections=("q",), num_layers=2, columns=(column,))


def lanes_card(trace: RoutingTrace, text: str, name: str = "spectr-context") -> str:
    column = ColumnOutput(
        label="spectr-context",
        text=text,
        num_settled=0,
        num_tokens=2,
        is_finished=False,
        tokens_per_second=1.0,
    )
    router = parse_router(name, NAMES)
    return cards.answers(
        Frame(columns=(column,), routers=(router,), status="running", trace=trace), NAMES
    )


@pytest.mark.parametrize(
    ("lanes", "words"),
    [
        ([(3,)], "For sql"),
        ([(3,), (0,)], "For sql, then chat"),
        ([(3,), (0,), (3,)], "For sql, then chat, then sql"),
        ([(3,), ()], "For sql, then the base"),
        ([(1, 3), (1, 2)], "For code and sql, then code and math"),
        ([()], "No expert stands out; the base answers"),
    ],
)
def test_a_card_says_whom_each_request_was_for(lanes: list[tuple[int, ...]], words: str) -> None:
    trace = lanes_trace(lanes, [["a", "\n"]] * len(lanes))
    html = lanes_card(trace, "a\n" * len(lanes))
    whom = re.search(r'<p class="whom">(.*?)</p>', html)
    assert whom is not None
    assert re.sub(r"<[^>]*>", "", whom[1]) == words
    assert "whom" not in lanes_card(trace, "a", name="spectr"), "it chooses at every token"


def test_lines_that_grow_side_by_side_keep_their_colours() -> None:
    trace = lanes_trace([(3,), (0,), ()], [["one", " two\n"], ["uno", "\n"], ["un"]])
    text = "one two three\nuno\nun deux"
    html = lanes_card(trace, text)
    body = re.search(r'<div class="text" dir="auto">(.*?)</div>', html, re.S)
    assert body is not None
    colors = expert_colors(NAMES)
    runs = re.findall(r'<mark style="--c:(#\w+);[^>]*>(.*?)</mark>', body[1], re.S)
    runs = [(color, re.sub("</?i>", "", text)) for color, text in runs]
    assert runs == [(colors["sql"], "one two three\n"), (colors["chat"], "uno\n")]
    assert html_module.unescape(re.sub(r"<[^>]*>", "", body[1])) == text


def test_the_share_bar_adds_up(trace: RoutingTrace) -> None:
    html = cards.answers(frame_of("", trace), NAMES)
    widths = [float(w) for w in re.findall(r'<i style="width:([\d.]+)%', html)]
    assert np.isclose(sum(widths), 100, atol=0.5)


def test_the_share_bar_hatches_what_the_base_answered() -> None:
    html = lanes_card(lanes_trace([(3,), ()], [["a", "\n"], ["b", "\n"]]), "a\nb\n")
    assert 'aria-label="50% sql, 50% base"' in html
    assert '<i class="is-base" style="width:50.0%"></i>' in html


def test_each_token_of_the_trace_is_an_element() -> None:
    html = lanes_card(lanes_trace([(3,), ()], [["<a>", "\n"], ["b"]]), "<a>\nb")
    body = re.search(r'<div class="text" dir="auto">(.*?)</div>', html, re.S)
    assert body is not None
    assert re.findall("<i>(.*?)</i>", body[1], re.S) == ["&lt;a&gt;", "\n", "b"]
    assert 'data-column="spectr-context"' in html


def test_the_header_says_what_is_loaded(routed_model: SpectrModel) -> None:
    html = cards.header(routed_model)
    for fact in ("tiny", "float32", "cpu", "rank 4", "red", "green", "blue"):
        assert fact in html
    for color in expert_colors(routed_model.library.names).values():
        assert color in html
    assert re.findall(
        r'<a href="https://[^"]+" target="_blank" rel="noopener">(\w+)</a>', html
    ) == [
        "Paper",
        "Code",
        "Docs",
    ]


def test_an_expert_says_what_it_does(routed_model: SpectrModel, tmp_path: Path) -> None:
    record = {
        "task": "sql",
        "metric": "same rows in sqlite",
        "example": {"prompt": "list <all> books", "answer": "SELECT 1;"},
        "scores": {"expert": {"all": {"mean": 0.98}}, "base": {"all": {"mean": 0.0}}},
    }
    first, *others = routed_model.library.adapters
    adapters = (replace(first, source=str(tmp_path)), *others)
    library = replace(routed_model.library, adapters=adapters)
    routed_model.snapshot = replace(routed_model.snapshot, library=library)
    tip = re.compile(r'<span role="tooltip" class="tip" id="tip-0">(.*?)</span></span></span>')
    for content, shown in (
        (
            json.dumps(record),
            ("Question to SQL", "list &lt;all&gt; books", "expert 0.98, base 0.00"),
        ),
        (json.dumps(record | {"task": "mine"}), ("mine", "SELECT 1;")),
        # Another program's file of this name, or a damaged one
        ("[1]", ("rank 4",)),
        (json.dumps(record | {"scores": {"expert": 1}}), ("rank 4",)),
        ("{", ("rank 4",)),
    ):
        (tmp_path / "scores.json").write_text(content)
        found = tip.search(cards.header(routed_model))
        assert found is not None
        for words in shown:
            assert words in found[1]
        assert ("→" in found[1]) == (len(shown) > 1)


def test_the_first_page_shows_the_columns_that_are_ticked() -> None:
    titles = re.findall(r"<h3>(.*?)</h3>", cards.placeholder())
    assert titles == [ROUTERS[name].display_name for name in PAGE_COLUMNS]


def test_the_bases_notices_are_shown(routed_model: SpectrModel) -> None:
    before = cards.header(routed_model)
    routed_model.base = replace(routed_model.base, notices=("not used: <temperature>",))
    assert "<li>not used: &lt;temperature&gt;</li>" in cards.header(routed_model)
    assert "temperature" not in before


def test_copies_are_escaped_and_know_their_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPACE_ID", raising=False)
    html = cards.copies("print('<b>')", 'say "hi"', "prompt=a&seed=3")
    assert 'data-copy="print(&#x27;&lt;b&gt;&#x27;)"' in html
    assert 'data-query="prompt=a&amp;seed=3" data-space=""' in html
    monkeypatch.setenv("SPACE_ID", "owner/name")
    assert 'data-space="owner/name"' in cards.copies("", "", "")
