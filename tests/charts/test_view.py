"""The routing view: what its pictures, its words and its table say of a trace."""

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectr_demo import charts
from spectr_demo.trace import NOT_ROUTED, Candidates, ColumnTrace, Reading, RoutingTrace
from tests.trace_samples import make_column, make_trace, sample_trace


def drawn(trace: RoutingTrace, label: str = "spectr") -> str:
    return charts.routing_view(trace, label).html


def finding(view: str) -> str:
    return re.sub("<[^>]*>", "", re.search("<h3>(.*?)</h3>", view, re.S)[1])  # type: ignore[index]


def legend(view: str) -> list[str]:
    part = re.search(r'<ul class="rv-legend".*?</ul>', view, re.S)
    assert part is not None
    return [re.sub("<[^>]*>", "", entry) for entry in re.findall("<li.*?</li>", part[0])]


def cells(view: str, kind: str) -> list[np.ndarray]:
    """Of each block, in order: the answer's first, then the prompt's."""
    return [
        np.fromstring(found, int, sep=",") for found in re.findall(f'data-{kind}="(.*?)"', view)
    ]


def row(view: str, t: int) -> str:
    found = re.search(rf'<tr data-t="{t}">(.*?)(?=<tr|</table>)', view, re.S)
    assert found is not None
    return re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", found[1])).strip()


def lanes(experts: list[int], **changes: Any) -> RoutingTrace:
    """A router that reads requests: two tokens of prompt and three of answer for each."""
    num = len(experts)
    owners = [*np.repeat(np.arange(num), 2), *np.repeat(np.arange(num), 3)]
    chosen = np.array([experts[lane] for lane in owners]).reshape(-1, 1, 1, 1)
    chosen = np.broadcast_to(chosen, (len(owners), 2, 1, 1))
    reading = Reading(
        lanes=np.array(owners, np.int16),
        standing=np.arange(3 * num, dtype=np.float32).reshape(num, 3),
        certainty=np.broadcast_to(np.float32([[0.1, 0.5, 0.9]]), (num, 2, 3)).copy(),
    )
    column = make_column(chosen, chosen != NOT_ROUTED, num_prompt=2 * num, reading=reading)
    return make_trace(replace(column, **changes))


@pytest.mark.parametrize("label", ["base", "single:sql", "uniform", "spectr"])
@pytest.mark.parametrize("num_tokens", [1, 40, 45, 120])
def test_every_column_is_drawn(label: str, num_tokens: int) -> None:
    # 1 and 40 tokens end inside the prompt: the answer is empty.
    trace = sample_trace(num_tokens, num_layers=3)
    view = drawn(trace, label)
    column = trace.column(label)
    assert f'data-column="{label}"' in view
    assert view.count('class="rv-block"') == 1 + (column.num_prompt < num_tokens)
    assert view.count("<tr data-t") == num_tokens
    assert view.count("<p class") < 40
    assert ("Nothing is answered" in finding(view)) == (column.num_prompt == num_tokens)


def test_cells_are_the_best_scores_and_what_was_used(trace: RoutingTrace) -> None:
    view = drawn(trace)
    column = trace.column("spectr")
    best, used = trace.best_scores("spectr"), trace.dominant_cells("spectr")
    assert best is not None
    for kind, expert, strength in (
        ("best", best.expert, best.lead),
        ("used", used.expert, used.weight),
    ):
        answer, prompt = cells(view, kind)
        for found, part in (
            (answer, slice(column.num_prompt, None)),
            (prompt, slice(0, column.num_prompt)),
        ):
            expected = np.where(
                expert[part] == NOT_ROUTED,
                -1,
                128 * expert[part].astype(int) + np.rint(100 * strength[part]).astype(int),
            )
            np.testing.assert_array_equal(found, expected.T.ravel())
    assert json.loads(html.unescape(re.search('data-names="(.*?)"', view)[1])) == list(  # type: ignore[index]
        trace.expert_names
    )


def test_cells_are_painted_in_their_experts_colour() -> None:
    experts = np.array([[0, 1, NOT_ROUTED], [0, 1, NOT_ROUTED]]).T.reshape(3, 2, 1, 1)
    trace = make_trace(make_column(experts, experts != NOT_ROUTED, num_prompt=0))
    picture = re.search(r'<svg class="rv-map".*?</svg>', drawn(trace), re.S)
    assert picture is not None
    paths = dict(re.findall(r'color-mix\(in srgb,(#\w+) 100%.*?d="(.*?)"', picture[0]))
    first, second, _ = charts.expert_colors(trace.expert_names).values()
    # Two layers; the last token has no expert, and its places stay free for the hatching.
    assert paths == {first: "M0 0h1v1h-1zM0 1h1v1h-1z", second: "M1 0h1v1h-1zM1 1h1v1h-1z"}
    ribbon = re.search(r'<svg class="rv-ribbon".*?</svg>', drawn(trace), re.S)
    assert ribbon is not None
    # That the last token was not read is blank, and neither hatched nor coloured.
    assert re.findall(r'd="(.*?)"', ribbon[0]) == [
        "M0 1000h1V0H0z",
        "M1 1000h1V0H1z",
        "M2 0h1v1000h-1z",
    ]


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        ([1], "This router used expert-1 for the whole answer"),
        ([NOT_ROUTED], "This router left the answer to the base: no expert stands out"),
        ([1, 2], "This router used expert-1 for line 1 and expert-2 for line 2"),
        (
            [1, NOT_ROUTED, 0],
            "This router used expert-1 for line 1, the base for line 2 and expert-0 for line 3",
        ),
    ],
)
def test_the_title_says_whom_each_line_was_for(experts: list[int], words: str) -> None:
    assert finding(drawn(lanes(experts))) == words


def test_the_title_says_what_a_column_did(trace: RoutingTrace) -> None:
    assert finding(drawn(trace, "base")) == "The base answered alone: no expert was used"
    assert finding(drawn(trace, "single:sql")) == "sql served every token"
    assert finding(drawn(trace, "uniform")) == "All 4 experts served every token alike"
    share = trace.share("spectr", "answer")
    most = trace.expert_names[share.argmax()]
    assert finding(drawn(trace)) == (
        f"This router used {most} most, {share.max():.0%} of the answer, and 4 of 4 experts at a "
        "typical token"
    )


def test_the_base_counts_in_the_shares() -> None:
    view = drawn(lanes([1, NOT_ROUTED, NOT_ROUTED]))
    assert legend(view) == ["base, no expert 67%", "expert-1 33%"]
    assert 'class="rv-base"' in view
    assert legend(drawn(lanes([1, 2]))) == ["expert-1 50%", "expert-2 50%"]


def test_a_lane_has_its_evidence_and_its_part_of_the_prompt() -> None:
    view = drawn(lanes([1, NOT_ROUTED]))
    assert "The prompt: 4 tokens in 2 lanes" in view
    assert re.findall("<h4>(.*?)</h4>", view) == [
        "Request 1, for expert-1",
        "Request 2, for the base",
    ]
    assert '<details class="rv-prompt">' in view  # folded
    answer, *prompt = cells(view, "best")
    np.testing.assert_array_equal(answer, [128 * 2 + 40] * 12)  # 0.9 - 0.5, though it was not used
    assert [len(each) for each in prompt] == [4, 4]
    assert not cells(view, "used")  # the same in all layers
    assert 'class="rv-line" d="M3 0V2"' in view
    assert "Evidence of each layer" in view
    # By share, then by standing; of the second lane by standing alone
    assert "expert-1 100% standing 1.00 expert-2 0% standing 2.00" in row(view, 4)
    assert "no expert 100% expert-2 0% standing 5.00 expert-1 0% standing 4.00" in row(view, 7)


def test_the_table_has_the_five_best_experts() -> None:
    names = tuple(f"expert {index}" for index in range(9))
    trace = sample_trace(100, expert_names=names, num_layers=4, top_k=4)
    column, share = trace.column("spectr"), trace.token_share("spectr")
    t = column.num_prompt + 2
    view = drawn(trace)
    best = np.argsort(-share[t])[:5]
    scores = trace.token_scores("spectr")[t]
    told = " ".join(f"{names[e]} {share[t, e]:.0%} score {scores[e]:.2f}" for e in best)
    rest = 1 - share[t].sum()
    assert rest < 5e-4
    assert row(view, t).startswith(f"{t} answer ")
    assert told in row(view, t)
    assert row(view, t).endswith(f"{column.logprob[t]:.2f} {column.kl[t]:.2f} –")
    assert "-0.00" not in view
    assert "the last token is not read" in row(view, 99)
    assert "no expert" not in row(view, 99)


def test_a_run_in_progress_has_no_distance_yet(trace: RoutingTrace) -> None:
    column = trace.column("spectr")
    unknown = np.full(column.num_tokens, np.nan, np.float32)
    running = replace(column, kl=unknown, logprob=unknown, entropy=unknown)
    view = drawn(replace(trace, columns=(running,)))
    assert "KL from the base: measured at the end" in view
    assert "nan" not in view
    assert "nats" in drawn(trace)


def test_names_and_tokens_are_escaped() -> None:
    names = ("<b>bold</b>", '"quoted"', "a&b")
    trace = sample_trace(200, expert_names=names, num_layers=2)
    for label in trace.labels:
        view = drawn(trace, label)
        assert "<b>bold" not in view
        assert "<|im_start|>" not in view
        assert "with <b>SQL" not in view
    assert "&lt;b&gt;bold" in drawn(trace)


def test_right_to_left_text_keeps_to_itself() -> None:
    column = make_column([[[[0]]]] * 3, [[[[1]]]] * 3)
    view = drawn(make_trace(replace(column, tokens=("a", "שלום", "\n"), spans=column.spans)))
    assert "<td><bdi>שלום</bdi>" in view
    assert "<span>↵</span>" in view


def test_a_long_text_is_drawn_in_part() -> None:
    trace = sample_trace(2400, num_layers=1, top_k=1)
    long_prompt = replace(trace, columns=tuple(replace(c, num_prompt=1800) for c in trace.columns))
    view = drawn(long_prompt)
    assert "The last 512 tokens" in view
    assert "The first 512 of 600 tokens are drawn" in view
    assert view.count("<tr data-t") == 1024
    assert len(cells(view, "best")[1]) == 512


def test_a_large_library_is_grouped() -> None:
    names = tuple(f"expert {index}" for index in range(30))
    view = drawn(sample_trace(100, expert_names=names, num_layers=3))
    assert any("others (18)" in entry for entry in legend(view))
    assert charts.OTHERS_COLOR in view


def test_colours_follow_the_page() -> None:
    style = charts.CSS.read_text(encoding="utf-8")
    assert "var(--card" in style
    view = drawn(sample_trace(60, num_layers=2))
    fills = re.findall(r"fill:(.*?)\"", view)
    assert fills
    assert all("var(--rv-card)" in fill for fill in fills)


def test_a_notebook_and_a_file_need_no_network(trace: RoutingTrace, tmp_path: Path) -> None:
    view = charts.routing_view(trace, "spectr")
    shown = view._repr_html_()
    assert view.html in shown
    assert "<style>" in shown
    assert "<script>" in shown
    view.write_html(tmp_path / "routing.html")
    page = charts.routing_page(trace, "what is <b>this</b>?")
    assert "&lt;b&gt;this" in page
    assert page.count("<script>") == 1
    assert page.count('<section class="rv"') == len(trace.columns)
    for text in ((tmp_path / "routing.html").read_text(encoding="utf-8"), page):
        assert not re.search(r"<(script|link|img)[^>]+(src|href)=|https?://|url\(", text)


def test_an_unknown_column_is_an_error(trace: RoutingTrace) -> None:
    with pytest.raises(ValueError, match="unknown column 'nope'"):
        charts.routing_view(trace, "nope")


def column_of_one_layer() -> ColumnTrace:
    return make_column([[[[0]]]] * 3, [[[[1]]]] * 3)


def test_one_layer_is_not_several() -> None:
    view = drawn(make_trace(column_of_one_layer()))
    assert not re.search(r"\b1 (layers|tokens|answer tokens)\b", view)


def test_a_token_is_told_with_what_might_have_stood_there() -> None:
    """Of this column, of the base on the same text, and of columns that wrote the same so far."""

    def candidates(*texts: str) -> Candidates:
        probs = np.tile(np.array([[0.5, 0.25], [0.75, 0.125]], np.float32), (4, 1, 1))
        return Candidates(texts=(texts,) * 4, probs=probs)

    routed = np.zeros((4, 1, 1, 1)), np.ones((4, 1, 1, 1))
    this = make_column(*routed, candidates=candidates("a", "<b>", "c", "d"))
    other = make_column(
        *routed,
        label="norm",
        token_ids=np.array([0, 1, 2, 9], np.int32),
        candidates=candidates("e", "f", "g", "h"),
    )
    early = make_column(
        *routed,
        label="lag",
        token_ids=np.array([0, 7, 2, 3], np.int32),
        candidates=candidates("i", "j", "k", "l"),
    )
    view = charts.routing_view(make_trace(early, other, this), "spectr").html
    assert row(view, 0).endswith("–")  # of the prompt
    first, _, last = (row(view, t).partition("spectr ")[2] for t in (1, 2, 3))
    assert "<bdi>“a”</bdi>&nbsp;50% <bdi>“&lt;b&gt;”</bdi>&nbsp;25%" in view
    assert "base, after this text “c” &nbsp;75% “d” &nbsp;12%" in first
    assert "lag “i” &nbsp;50%" in first, "both had written the same before this token"
    assert "norm “e” &nbsp;50%" in last
    assert "lag" not in last


def test_a_router_that_is_made_to_change_in_the_middle_of_a_lane() -> None:
    trace = lanes([1, 1])
    column = trace.column("spectr")
    experts = column.experts.copy()
    experts[-2:] = 2
    changed = replace(trace, columns=(replace(column, experts=experts),))
    assert (
        finding(drawn(changed))
        == "This router used expert-1 for line 1 and expert-1, then expert-2 for line 2"
    )


def test_a_run_in_progress_has_no_candidates() -> None:
    view = charts.routing_view(sample_trace(60, num_layers=2), "spectr").html
    assert "rv-next" not in view
