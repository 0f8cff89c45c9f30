"""Lanes: which parts of a message are requests of their own."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectr_demo.routing.lanes import (
    COST_INSIDE_A_LINE,
    COST_OF_LINE,
    Span,
    best_cut,
    cost_of_cut,
    joined,
    spans,
)


def explained(
    num_parts: int, best: dict[Span, float], other: float = 0.0
) -> dict[Span, torch.Tensor]:
    """Of two experts, the second the better one."""
    return {span: torch.tensor([-1.0, best.get(span, other)]) for span in spans(num_parts)}


@pytest.mark.parametrize(
    ("num_parts", "expected"),
    [(0, []), (1, [(0, 1)]), (3, [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])],
)
def test_spans(num_parts: int, expected: list[Span]) -> None:
    assert spans(num_parts) == expected


def test_a_text_that_one_expert_explains_is_not_cut() -> None:
    """Not even where a cut costs nothing and explains as much."""
    same = explained(3, {}, other=0.4)
    assert best_cut([5, 5, 5], [0.0] * 3, same) == [(0, 3)]


def test_a_cut_must_explain_more_than_it_costs() -> None:
    for gain, expected in ((0.9, [(0, 2)]), (1.1, [(0, 1), (1, 2)])):
        found = 0.4 + gain * COST_INSIDE_A_LINE
        case = explained(2, {(0, 1): found, (1, 2): found, (0, 2): 0.4})
        assert best_cut([5, 5], [0.0, COST_INSIDE_A_LINE], case) == expected
        # A new line costs less.
        assert best_cut([5, 5], [0.0, COST_OF_LINE], case) == [(0, 1), (1, 2)]


def test_long_lanes_count_more() -> None:
    case = explained(2, {(0, 1): 0.9, (1, 2): 0.1, (0, 2): 0.5})
    assert best_cut([1, 1], [0.0, 0.0], case) == [(0, 2)]
    assert best_cut([3, 1], [0.0, 0.0], case) == [(0, 1), (1, 2)]
    assert best_cut([1, 3], [0.0, 0.0], case) == [(0, 2)]


def test_three_parts_of_which_two_belong_together() -> None:
    case = explained(3, {(0, 2): 0.8, (2, 3): 0.7, (0, 3): 0.5})
    assert best_cut([4, 4, 4], [0.0, 0.03, 0.0], case) == [(0, 2), (2, 3)]


@given(data=st.data(), num_parts=st.integers(1, 6))
def test_no_cut_is_better(data: st.DataObject, num_parts: int) -> None:
    """Against all of them."""
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=num_parts, max_size=num_parts))
    some = st.sampled_from([0.0, COST_OF_LINE, COST_INSIDE_A_LINE])
    costs = data.draw(st.lists(some, min_size=num_parts, max_size=num_parts))
    values = st.lists(st.floats(-1, 1, width=16), min_size=3, max_size=3)
    case = {span: torch.tensor(data.draw(values)) for span in spans(num_parts)}

    def value(cut: list[Span]) -> float:
        gains = [sum(lengths[a:b]) / sum(lengths) * float(case[a, b].max()) for a, b in cut]
        return sum(gains) - sum(costs[a] for a, _ in cut[1:])

    cuts = []
    for num in range(num_parts):
        for inner in itertools.combinations(range(1, num_parts), num):
            cuts.append(list(itertools.pairwise([0, *inner, num_parts])))
    found = best_cut(lengths, costs, case)
    assert found in cuts
    assert value(found) == pytest.approx(max(map(value, cuts)), abs=1e-6)
    equal = [cut for cut in cuts if abs(value(cut) - value(found)) < 1e-12]
    assert len(found) == min(map(len, equal))


@pytest.mark.parametrize(
    ("experts", "is_next", "expected"),
    [
        ([3], [False], [(0, 1)]),
        ([3, 3], [False, True], [(0, 2)]),  # one expert knows several requests of its own
        ([3, 5], [False, False], [(0, 1), (1, 2)]),
        ([3, None], [False, True], [(0, 1), (1, 2)]),
        ([3, None], [False, False], [(0, 2)]),  # it goes on in the same line
        ([None, 3], [False, False], [(0, 2)]),
        ([None, 3], [False, True], [(0, 1), (1, 2)]),
        ([None, None], [False, True], [(0, 2)]),
        ([3, None, 3], [False, True, True], [(0, 1), (1, 2), (2, 3)]),
        ([3, None, 3], [False, False, True], [(0, 3)]),
        ([3, None, 5], [False, False, False], [(0, 2), (2, 3)]),
        ([None, 3, 3], [False, False, False], [(0, 3)]),
        ([None, None, 3], [False, True, True], [(0, 2), (2, 3)]),
    ],
)
def test_lanes_for_the_same_expert_are_one(
    experts: list[int | None], is_next: list[bool], expected: list[Span]
) -> None:
    lanes = [(i, i + 1) for i in range(len(experts))]
    assert joined(lanes, experts, is_next) == expected


def test_the_beginning_of_a_lane_says_whether_it_goes_on() -> None:
    """Not that of its number: lanes have several parts."""
    lanes, is_next = [(0, 2), (2, 3)], [False, True, False]
    assert joined(lanes, [1, None], is_next) == [(0, 3)]
    assert joined(lanes, [1, None], [False, False, True]) == lanes


@given(data=st.data(), num=st.integers(1, 7))
def test_joined_lanes_cover_the_message(data: st.DataObject, num: int) -> None:
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=num, max_size=num))
    bounds = [0, *itertools.accumulate(sizes)]
    lanes = list(itertools.pairwise(bounds))
    expert = st.one_of(st.none(), st.integers(0, 2))
    experts = data.draw(st.lists(expert, min_size=num, max_size=num))
    is_next = data.draw(st.lists(st.booleans(), min_size=bounds[-1], max_size=bounds[-1]))
    found = joined(lanes, experts, is_next)
    assert found[0][0] == 0 and found[-1][1] == bounds[-1]
    assert all(one[1] == other[0] for one, other in itertools.pairwise(found))


def test_a_cut_costs_less_where_the_form_suggests_it() -> None:
    item, line, inside = (
        cost_of_cut(is_next=is_next, is_item=is_item)
        for is_next, is_item in ((True, True), (True, False), (False, False))
    )
    assert item < line < inside
