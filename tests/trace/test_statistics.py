"""The statistics of a trace, by hand and by property."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectr_demo.trace import NOT_ROUTED, Reading, RoutingTrace, mean_logprob
from tests.trace_samples import EXPERTS, WEIGHTS, make_column, make_trace, sample_trace

NONE = NOT_ROUTED


@pytest.fixture
def tiny() -> RoutingTrace:
    return make_trace(make_column(EXPERTS, WEIGHTS))


def test_token_share_is_the_mean_over_routed_layers_and_projections(tiny: RoutingTrace) -> None:
    # Three cells are routed: token 0 gives expert 0 (0.75 + 0.5 + 0.5) / 3.
    expected = [[1.75 / 3, 0.75 / 3, 0.5 / 3], [0, 0.75 / 3, 2.25 / 3], [0, 0, 0]]
    np.testing.assert_allclose(tiny.token_share("spectr"), expected, rtol=1e-6)


def test_layer_share_is_the_mean_over_routed_tokens_and_projections(tiny: RoutingTrace) -> None:
    expected = [[1.25 / 4, 0.75 / 4, 2.0 / 4], [0.5 / 2, 0.75 / 2, 0.75 / 2]]
    np.testing.assert_allclose(tiny.layer_share("spectr"), expected, rtol=1e-6)
    np.testing.assert_allclose(
        tiny.layer_share("spectr", "prompt"), [[1.25 / 2, 0.25 / 2, 0.5 / 2], [0.5, 0.5, 0]]
    )


def test_share_of_the_parts_leaves_out_tokens_that_were_not_read(tiny: RoutingTrace) -> None:
    np.testing.assert_allclose(tiny.share("spectr", "prompt"), [1.75 / 3, 0.75 / 3, 0.5 / 3])
    np.testing.assert_allclose(tiny.share("spectr", "answer"), [0, 0.25, 0.75], rtol=1e-6)
    np.testing.assert_allclose(tiny.share("spectr"), [1.75 / 6, 1.5 / 6, 2.75 / 6], rtol=1e-6)


def test_share_of_an_empty_answer_is_zero() -> None:
    trace = make_trace(make_column(EXPERTS, WEIGHTS, num_prompt=3))
    assert trace.share("spectr", "answer").tolist() == [0, 0, 0]
    assert trace.layer_share("spectr", "answer").tolist() == [[0, 0, 0], [0, 0, 0]]


def test_dominant_tokens_and_margins(tiny: RoutingTrace) -> None:
    expert, margin = tiny.dominant_tokens("spectr")
    assert expert.tolist() == [0, 2, NONE]
    np.testing.assert_allclose(margin, [1.0 / 3, 1.5 / 3, 0], rtol=1e-6)


def test_dominant_cells_over_all_projections(tiny: RoutingTrace) -> None:
    cells = tiny.dominant_cells("spectr")
    assert cells.expert.tolist() == [[0, 0], [2, 2], [NONE, NONE]]
    np.testing.assert_allclose(cells.weight, [[0.625, 0.5], [0.75, 0.75], [0, 0]])
    # The score is the mean over the projections that selected the expert: (7.5 + 5) / 2.
    np.testing.assert_allclose(cells.score, [[6.25, 5], [7.5, 7.5], [np.nan, np.nan]])
    assert cells.is_tied.tolist() == [[False, True], [False, False], [False, False]]


def test_dominant_cells_of_one_projection(tiny: RoutingTrace) -> None:
    cells = tiny.dominant_cells("spectr", "proj-1")
    assert cells.expert.tolist() == [[0, NONE], [1, NONE], [NONE, NONE]]
    assert cells.is_tied.tolist() == [[True, False], [True, False], [False, False]]
    with pytest.raises(
        ValueError, match="unknown projection 'proj-9'; there is 'proj-0', 'proj-1'"
    ):
        tiny.dominant_cells("spectr", "proj-9")


def test_dominant_cells_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = sample_trace(30)
    whole = trace.dominant_cells("spectr")
    monkeypatch.setattr("spectr_demo.trace.statistics._CELLS_PER_CHUNK", 1)
    pieces = trace.dominant_cells("spectr")
    np.testing.assert_array_equal(whole.expert, pieces.expert)
    np.testing.assert_array_equal(whole.weight, pieces.weight)


def test_mean_logprob_is_that_of_the_answer() -> None:
    logprob = np.array([np.nan, -1.0, -4.0], np.float32)
    trace = make_trace(make_column(EXPERTS, WEIGHTS, num_prompt=1, logprob=logprob))
    assert mean_logprob(trace, "spectr") == -2.5


def test_what_the_base_answers_counts_in_every_share() -> None:
    # Two lanes, the second left to the base; a blank between them is nobody's.
    experts = np.array([1, NONE, NONE, 1, NONE, NONE, NONE]).reshape(7, 1, 1, 1)
    reading = Reading(
        lanes=np.array([0, -1, 1, 0, 1, 1, 1], np.int16),
        standing=np.array([[0, 5, 1], [2, 1, 0]], np.float32),
        certainty=np.array([[[0.1, 0.7, 0.2]], [[np.nan, 0.1, 0.05]]], np.float32),
    )
    column = make_column(experts, experts != NONE, num_prompt=3, reading=reading)
    trace = make_trace(column)
    np.testing.assert_allclose(trace.share("spectr", "answer"), [0, 1 / 4, 0])
    np.testing.assert_allclose(trace.share("spectr", "prompt"), [0, 1 / 2, 0])
    assert trace.is_token_read("spectr").tolist() == [True, False, *[True] * 5]
    np.testing.assert_array_equal(
        trace.token_scores("spectr")[[0, 1, 6]], [[0, 5, 1], [np.nan] * 3, [2, 1, 0]]
    )
    best = trace.best_scores("spectr")
    assert best is not None
    assert best.expert[:, 0].tolist() == [1, NONE, 1, 1, 1, 1, 1]
    np.testing.assert_allclose(best.lead[:3, 0], [0.5, 0, 0.05], atol=1e-6)


def test_experts_of_equal_weight_are_ranked_by_score() -> None:
    experts = np.array([[[[0, 2]]], [[[2, 1]]]])
    scores = np.array([[[[1.0, 3.0]]], [[[5.0, 4.0]]]], np.float32)
    trace = make_trace(make_column(experts, np.full(experts.shape, 0.5), scores=scores))
    cells = trace.dominant_cells("spectr")
    assert cells.expert[:, 0].tolist() == [2, 2]
    assert not cells.is_tied.any()
    assert trace.dominant_tokens("spectr")[0].tolist() == [2, 2]
    assert (trace.dominant_tokens("spectr")[1] == 0).all()
    equal = make_trace(make_column(experts, np.full(experts.shape, 0.5), scores=scores * 0))
    assert equal.dominant_cells("spectr").is_tied.all()


def test_best_scores_are_the_projections_votes(tiny: RoutingTrace) -> None:
    best = tiny.best_scores("spectr")
    assert best is not None
    # Token 0: expert 0 is first on both projections of layer 0 (on the second one a tie, whose
    # first slot it has); layer 1 has one projection. The last token was not read.
    assert best.expert.tolist() == [[0, 1], [2, 2], [NONE, NONE]]
    np.testing.assert_allclose(best.lead, [[1, 1], [1, 1], [0, 0]])
    experts = np.array([0, 1, 1, 2, 2]).reshape(1, 1, 5, 1)
    scores = np.array([9, 1, 1, 2, 3], np.float32).reshape(experts.shape)
    votes = make_trace(make_column(experts, experts >= 0, scores=scores)).best_scores("spectr")
    assert votes is not None
    assert votes.expert.tolist() == [[2]]  # as many votes as expert 1, of higher scores
    assert votes.lead.tolist() == [[0]]
    assert sample_trace(20).best_scores("uniform") is None


def test_a_base_column_has_no_share() -> None:
    trace = sample_trace(20)
    column = trace.column("base")
    assert not column.is_routed
    assert trace.column("spectr").is_routed
    assert not trace.token_share("base").any()
    assert not trace.share("base").any()
    assert (trace.dominant_tokens("base")[0] == NONE).all()
    assert (trace.dominant_cells("base").expert == NONE).all()


def test_broadcast_views_have_the_statistics_of_full_arrays() -> None:
    views = sample_trace(25)
    full = make_trace(
        *(
            make_column(
                np.ascontiguousarray(c.experts),
                np.ascontiguousarray(c.weights),
                label=c.label,
                num_prompt=c.num_prompt,
            )
            for c in views.columns
        ),
        expert_names=views.expert_names,
        projections=views.projections,
    )
    for label in views.labels:
        np.testing.assert_allclose(views.token_share(label), full.token_share(label), atol=1e-6)
        np.testing.assert_allclose(views.layer_share(label), full.layer_share(label), atol=1e-6)
        np.testing.assert_array_equal(
            views.dominant_cells(label).expert, full.dominant_cells(label).expert
        )


def test_a_constant_router_over_a_thousand_experts_is_not_expanded() -> None:
    # 1000 * 30 * 7 * 1000 slots: expanded, the three arrays would take 2 GB.
    shape = (1000, 30, 7, 1000)
    column = make_column(
        np.zeros((1000, 1, 1, 1)),
        np.ones((1000, 1, 1, 1)),
        experts=np.broadcast_to(np.arange(1000, dtype=np.int16), shape),
        weights=np.broadcast_to(np.float32(1e-3), shape),
        scores=np.broadcast_to(np.float32(np.nan), shape),
    )
    trace = make_trace(column, num_experts=1000)
    np.testing.assert_allclose(trace.share("spectr"), 1e-3, rtol=1e-5)
    np.testing.assert_allclose(trace.layer_share("spectr"), 1e-3, rtol=1e-5)
    assert trace.dominant_cells("spectr").is_tied.all()


def lines_run(function: Callable[[], object]) -> int:
    """How many lines of Python a call runs in the package; numpy's loops are not among them."""
    num_lines = 0

    def count(frame: FrameType, event: str, _: object) -> Any:
        nonlocal num_lines
        is_ours = frame.f_globals.get("__name__", "").startswith("spectr_demo.")
        num_lines += is_ours and event == "line"
        return count if is_ours else None

    before = sys.gettrace()
    sys.settrace(count)
    try:
        function()
    finally:
        sys.settrace(before)
    return num_lines


@pytest.mark.parametrize("name", ["token_share", "layer_share", "dominant_cells", "best_scores"])
def test_no_statistic_loops_over_tokens_or_layers_in_python(name: str) -> None:
    small, more_tokens, more_layers = (
        getattr(sample_trace(num_tokens, num_layers=num_layers, top_k=4), name)
        for num_tokens, num_layers in ((30, 3), (300, 3), (30, 30))
    )
    work = lines_run(lambda: small("spectr"))
    assert 0 < work < 200
    assert lines_run(lambda: more_tokens("spectr")) == work
    assert lines_run(lambda: more_layers("spectr")) == work


@st.composite
def routings(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """(T, L, P, K) experts without repeats in a cell, weights that sum to 1 or 0, and E."""
    T, L, P = (draw(st.integers(1, 4)) for _ in range(3))
    E = draw(st.integers(1, 6))
    K = draw(st.integers(1, E))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    experts = rng.random((T, L, P, E)).argsort(axis=-1)[..., :K]
    weights = rng.dirichlet(np.ones(K), (T, L, P))
    is_routed = rng.random((T, L, P, 1)) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return np.where(is_routed, experts, NONE), np.where(is_routed, weights, 0.0), E


@given(routings())
def test_shares_are_a_distribution_wherever_something_was_routed(
    routing: tuple[np.ndarray, np.ndarray, int],
) -> None:
    experts, weights, E = routing
    trace = make_trace(make_column(experts, weights), num_experts=E)
    is_routed = (experts != NONE).any(axis=-1)
    shares = {
        "token": (trace.token_share("spectr"), is_routed.any(axis=(1, 2))),
        "layer": (trace.layer_share("spectr"), is_routed.any(axis=(0, 2))),
        "all": (
            trace.share("spectr")[None],
            # All tokens were read but the last one, where it alone has no expert.
            trace.is_token_routed("spectr").sum(keepdims=True)
            / max(1, trace.is_token_read("spectr").sum()),
        ),
    }
    for name, (share, expected) in shares.items():
        assert (share >= 0).all(), name
        np.testing.assert_allclose(share.sum(axis=-1), expected, atol=1e-5, err_msg=name)


@given(routings(), st.randoms(use_true_random=False))
def test_permuting_experts_permutes_shares(
    routing: tuple[np.ndarray, np.ndarray, int], random: Any
) -> None:
    experts, weights, E = routing
    new_ids = np.array(random.sample(range(E), E))
    moved = np.where(experts == NONE, NONE, new_ids[experts])
    before = make_trace(make_column(experts, weights), num_experts=E)
    after = make_trace(make_column(moved, weights), num_experts=E)
    for share in (RoutingTrace.token_share, RoutingTrace.layer_share, RoutingTrace.share):
        np.testing.assert_allclose(
            share(after, "spectr")[..., new_ids], share(before, "spectr"), atol=1e-6
        )
