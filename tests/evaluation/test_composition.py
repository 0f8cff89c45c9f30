"""Messages with several requests: which are asked, how answers are split and scored, who chose."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from spectr_demo.config import RouterConfig
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.reading import Lane
from spectr_demo.evaluation import composition
from spectr_demo.evaluation.composition import (
    Message,
    make_messages,
    part_score,
    routed_parts,
    score_parts,
    segment_parts,
    segment_routing,
    single_parts,
    split_answer,
)
from spectr_demo.evaluation.messages import FORMATS
from spectr_demo.evaluation.reading import Reading, Text
from spectr_demo.evaluation.tasks import Example
from spectr_demo.routing.routers import parse_router
from spectr_demo.trace import NOT_ROUTED
from tests.conftest import IN_CONTEXT, BuildModel

NAMES = [f"task{i}" for i in range(10)]


def example(text: str, answer: str = "yes") -> Example:
    return Example(
        prompt=f"Say {text}",
        answer=answer,
        text=text,
        key=text,
        wording="Say {text}",
        is_heldout_wording=False,
    )


def held(num: int = 120) -> dict[str, list[Example]]:
    return {name: [example(f"{name} {i}") for i in range(num)] for name in NAMES}


def test_every_pair_comes_once_then_in_every_format() -> None:
    once, all_formats = make_messages(held(), 90, 0), make_messages(held(), 450, 0)
    pairs = {(a, b) for a in NAMES for b in NAMES if a != b}
    assert {m.names for m in once} == pairs
    assert {(m.names, m.format) for m in all_formats} == {(p, f) for p in pairs for f in FORMATS}
    assert all_formats[:90] == once
    for place in range(2):
        by_domain = Counter((m.names[place], m.format) for m in once)
        assert set(by_domain.values()) <= {1, 2} and len(by_domain) == 50


def test_in_triples_each_domain_is_equally_often_at_each_place() -> None:
    messages = make_messages(held(), 0, 60)
    assert all(len(set(m.names)) == 3 for m in messages)
    for place in range(3):
        assert set(Counter(m.names[place] for m in messages).values()) == {6}
    assert set(Counter(m.format for m in messages).values()) == {12}
    assert messages == make_messages(held(), 0, 60), "the same messages every time"
    assert len({m.names for m in messages}) > 50


def test_no_example_comes_twice_before_all_have_come() -> None:
    messages = make_messages(held(18), 90, 0)
    used = [e.text for m in messages for e in m.examples]
    assert len(used) == len(set(used)) == 180
    assert used != [e.text for m in make_messages(held(19), 90, 0) for e in m.examples]


def test_two_domains_have_pairs_alone() -> None:
    two = {name: held()[name] for name in NAMES[:2]}
    assert [m.names for m in make_messages(two, 3, 5)] == [
        ("task0", "task1"),
        ("task1", "task0"),
        ("task0", "task1"),
    ]


def test_examples_of_several_lines_are_left_out() -> None:
    one = held()
    one["task3"] = [example("a\nb"), example("c", "d\ne"), example("one line")]
    messages = make_messages(one, 90, 0)
    texts = [e.text for m in messages for e in m.examples if e in one["task3"]]
    assert set(texts) == {"one line"}
    one["task3"].pop()
    with pytest.raises(ValueError, match="task 'task3': none of its 2 held-out examples"):
        make_messages(one, 90, 0)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("one\ntwo", ["one", "two"]),
        ("\n one \n\n  two\n", ["one", "two"]),
        ("one", ["one", ""]),
        ("", ["", ""]),
        ("one\ntwo\nthree", ["one", "two"]),
        ("1. one\n2) two", ["1. one", "2) two"]),
    ],
)
def test_a_part_is_a_line(answer: str, expected: list[str]) -> None:
    assert split_answer(answer, 2) == expected


@pytest.mark.parametrize("mark", ["", "1. ", "2) ", "- ", "* ", "• "])
def test_a_list_mark_costs_nothing(mark: str) -> None:
    positive = replace(example("fine"), answer="positive")
    assert part_score("sentiment", f"{mark}positive", positive) == 1
    assert part_score("sentiment", f"{mark}negative", positive) == 0
    # An answer that begins like a mark is read as it is, too.
    assert part_score("cron", f"{mark}* 9 * * 1", replace(positive, answer="* 9 * * 1")) == 1


def test_each_part_is_scored_by_its_own_task() -> None:
    chord, feeling = replace(example("C"), answer="C E G"), replace(example("x"), answer="negative")
    message = Message(names=("chords", "sentiment"), examples=(chord, feeling), format="lines")
    assert score_parts([message], [["C E G", "negative"]]) == [[1, 1]]
    assert score_parts([message], [["negative", "C E G"]]) == [[0, 0]]
    half = [[pytest.approx(2 / 3), 0]]
    assert score_parts([message], [["C E A", ""]]) == half
    permuted = Message(names=message.names[::-1], examples=message.examples[::-1], format="lines")
    assert score_parts([permuted], [["negative", "C E G"]]) == [[1, 1]]


@pytest.fixture
def engine(build_engine: BuildModel) -> SpectrModel:
    return build_engine()


@pytest.fixture
def messages() -> list[Message]:
    chord, query = example("C", "C E"), example("all", "SELECT 1;")
    return [
        Message(names=("chords", "sql"), examples=(chord, query), format="lines"),
        Message(names=("sql", "chords"), examples=(query, chord), format="numbered"),
    ]


def test_every_way_to_answer_gives_each_part_of_each_message(
    engine: SpectrModel, messages: list[Message]
) -> None:
    router = RouterConfig(name="uniform")
    for answers in (
        routed_parts(engine, router, messages),
        segment_parts(engine, messages),
        single_parts(engine, messages),
    ):
        assert [len(parts) for parts in answers] == [2, 2]
    single = single_parts(engine, messages)
    assert single[0] == single[1][::-1], "alone, a request does not know its message"
    assert segment_parts(engine, messages, 1) == segment_parts(engine, messages, 2)


def test_the_segment_oracles_parts_are_lines_too(
    engine: SpectrModel, messages: list[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [["C E", "SELECT 1;\nand more"], ["", "C"]]
    monkeypatch.setattr(composition, "segment_answers", lambda *a, **k: said)
    assert segment_parts(engine, messages) == [["C E", "SELECT 1;"], ["", "C"]]


def test_message_and_reference_are_read_as_a_router_would_see_them(
    engine: SpectrModel, messages: list[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[Text] = []
    read = composition.read

    def noted(engine: SpectrModel, router: RouterConfig, given: list[Text], **settings: Any) -> Any:
        texts.extend(given)
        return read(engine, router, given, **settings)

    monkeypatch.setattr(composition, "read", noted)
    assert segment_routing(engine, RouterConfig(name="uniform"), messages) is None
    rows = segment_routing(engine, parse_router("spectr", engine.library.names), messages)
    assert rows is not None and len(rows) == len(texts) == 2
    assert list(texts[1].prompt_ids) == engine.encode("1. Say all\n2. Say C")
    assert engine.tokenizer.decode(texts[1].answer_ids) == "SELECT 1;\nC E<|im_end|>"
    for row in rows:
        assert all(len(row[key]) == 2 for key in ("prompt", "answer", "switch", "switched"))
        assert 0 < sum(row["prompt"]) < 2, "random experts share the decisions"


def test_figures_of_a_reading_by_hand() -> None:
    own, other = 0, 1
    chosen = [
        *(NOT_ROUTED, own, other),  # opening, first request, second request
        *(other, own),  # closing; the first answer's only word, from which its newline comes
        *(own, own, other),  # the newline, and the second answer's words
    ]
    reading = Reading(
        logprob=np.zeros(5, np.float32),
        kl=np.zeros(0, np.float32),
        agrees=np.zeros(0, np.bool_),
        base_logprob=np.zeros(0, np.float32),
        choices=np.array(chosen, np.int16)[:, None, None, None].repeat(3, 1),
        num_prompt=4,
        num_opening=1,
    )
    figures = composition._routing(reading, [own, other], np.array([-1, 0, 1, -2]), [2, 3])
    assert figures["prompt"] == [1, 1]
    assert figures["answer"] == [0.5, pytest.approx(1 / 3)]
    assert figures["switch"] == [1, 2]
    assert figures["switched"] == [1, 1]
    swapped = composition._routing(reading, [other, own], np.array([-1, 0, 1, -2]), [2, 3])
    assert swapped["prompt"] == [0, 0]
    assert swapped["switch"] == [0, 0]
    third = composition._routing(reading, [2, 2], np.array([-1, 0, 1, -2]), [2, 3])
    assert third["switch"] == [2, 3] and third["switched"] == [0, 0]


def lane(start: int, stop: int, expert: int | None) -> Lane:
    weights = torch.zeros(3)
    if expert is not None:
        weights[expert] = 1
    return Lane(start=start, stop=stop, ids=[], weights=weights, standing=weights)


def test_figures_of_lanes_by_hand() -> None:
    owners = np.array([-1, 0, 0, 1, 1, -2])
    of = composition._lane_routing
    right = of([lane(1, 3, 2), lane(3, 5, 0)], [2, 0], owners)
    assert right["prompt"] == right["answer"] == right["switched"] == [1, 1]
    assert right["switch"] == [0, 0]
    late = of([lane(1, 4, 2), lane(4, 5, 0)], [2, 0], owners)
    assert late["prompt"] == [1, 0.5] and late["answer"] == [1, 1]
    apart = of([lane(1, 3, 2), lane(4, 5, 0)], [2, 0], owners)
    assert apart == right, "what is in no lane does not count"
    one = of([lane(1, 5, 2)], [2, 0], owners)
    assert one["prompt"] == [1, 0] and one["answer"] == [0, 0], "one line answers no second part"
    unsure = of([lane(1, 3, None), lane(3, 5, 0)], [2, 0], owners)
    assert unsure["prompt"] == [0, 1] and unsure["answer"] == [0, 1]
    swapped = of([lane(1, 3, 0), lane(3, 5, 2)], [2, 0], owners)
    assert swapped["answer"] == [0, 0]


def test_lanes_are_the_engines(engine: SpectrModel, messages: list[Message]) -> None:
    router = parse_router(IN_CONTEXT, engine.library.names)
    rows = segment_routing(engine, router, messages)
    assert rows is not None
    for message, row in zip(messages, rows, strict=True):
        lanes = engine.lanes(router, engine.encode(message.text))
        own = [engine.library.index(name) for name in message.names]
        assert row["answer"] == [
            float(len(lanes) == 2 and one.expert == expert)
            for one, expert in zip([*lanes, *lanes], own, strict=False)
        ]


def test_the_commonest_choice_may_be_none() -> None:
    assert composition._majority(np.array([NOT_ROUTED, NOT_ROUTED, 2])) == NOT_ROUTED
    assert composition._majority(np.array([[NOT_ROUTED, 2], [2, 0]])) == 2
