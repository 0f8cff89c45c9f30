"""Each equation against a case computed by hand, selection, weights, and the specs people type."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from spectr_demo.config import RouterConfig
from spectr_demo.routing.routers import ROUTERS, parse_router
from spectr_demo.routing.spectr import arrow_scores, lag_scores, norm_scores, select, spectr_scores

# One token, three experts of rank 2: z = A* x.
Z = torch.tensor([[[[3.0, 4.0], [-4.0, 0.0], [1.0, 8.0]]]])
S = torch.tensor([[2.0, 1.0], [3.0, 3.0], [1.0, 0.5]])
CONFIG = RouterConfig(name="spectr", top_k=1)
NAMES = ("sql", "cron", "kjv")


def test_spectr_is_the_length_of_the_projection() -> None:
    assert_close(spectr_scores(Z, S, CONFIG), torch.tensor([[[5.0, 4.0, 65**0.5]]]))


def test_arrow_is_the_first_direction_without_its_sign() -> None:
    assert_close(arrow_scores(Z, S, CONFIG), torch.tensor([[[3.0, 4.0, 1.0]]]))


def test_norm_is_the_length_of_the_output() -> None:
    expected = torch.tensor([[[(36 + 16) ** 0.5, 12.0, (1 + 16) ** 0.5]]])
    assert_close(norm_scores(Z, S, CONFIG), expected)


@pytest.mark.parametrize(
    ("prefilter", "winner"),
    [(1, 1), (2, 0), (3, 2)],
    ids=["F = 1 is arrow", "F = 2 drops the third", "F = E is SpectR"],
)
def test_lag_ranks_what_the_arrow_filter_keeps(prefilter: int, winner: int) -> None:
    config = RouterConfig(name="lag", top_k=1, prefilter=prefilter)
    scores = lag_scores(Z, S, config)
    assert scores.argmax() == winner
    assert int(scores.isfinite().sum()) == prefilter


def test_scores_are_float32_from_half_precision() -> None:
    for row in ROUTERS.values():
        if row.score:
            scores = row.score(Z.bfloat16(), S, RouterConfig(name=row.key, prefilter=2))
            assert scores.dtype == torch.float32


def test_weights_by_hand() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0])
    experts, weights, top = select(scores, RouterConfig(name="spectr", top_k=2))
    assert experts.tolist() == [1, 2]
    assert weights.tolist() == [0.5, 0.5]
    assert top.tolist() == [3, 2]
    softmax = RouterConfig(name="arrow", top_k=2, weighting="softmax", temperature=0.5)
    _, weights, _ = select(scores, softmax)
    assert_close(weights, torch.tensor([2.0, 0.0]).softmax(-1))


def test_no_expert_where_the_best_is_not_above_the_least() -> None:
    scores = torch.tensor([[1.0, 3.0], [5.0, 0.0]])
    _, weights, _ = select(scores, RouterConfig(name="spectr", top_k=1), 3.0)
    assert weights.tolist() == [[0.0], [1.0]]


@given(
    scores=st.lists(st.floats(0, 100, width=32), min_size=1, max_size=12),
    top_k=st.integers(1, 12),
    weighting=st.sampled_from(["equal", "softmax"]),
    temperature=st.floats(0.01, 10),
)
def test_weights_are_a_distribution_over_the_best(
    scores: list[float], top_k: int, weighting: str, temperature: float
) -> None:
    config = RouterConfig(
        name="spectr",
        top_k=top_k,
        weighting=weighting,
        temperature=temperature,  # type: ignore[arg-type]
    )
    experts, weights, top = select(torch.tensor(scores), config)
    k = min(top_k, len(scores))
    assert len(set(experts.tolist())) == k
    assert sorted(top.tolist(), reverse=True) == sorted(scores, reverse=True)[:k]
    assert (weights >= 0).all()
    assert float(weights.sum()) == pytest.approx(1, abs=1e-5)


def test_presets_are_the_papers() -> None:
    names = [f"e{i}" for i in range(9)]
    spectr = parse_router("spectr-paper", names)
    assert (spectr.top_k, spectr.weighting, spectr.composition) == (4, "equal", "parameters")
    arrow = parse_router("arrow", names)
    assert (arrow.top_k, arrow.weighting, arrow.temperature) == (3, "softmax", 1.0)
    assert arrow.composition == "outputs"
    lag = parse_router("lag", names)
    assert (lag.top_k, lag.prefilter) == (1, 20)
    assert parse_router("spectr", names).top_k == 1


def test_a_presets_k_shrinks_to_the_library_and_an_explicit_one_does_not() -> None:
    assert parse_router("spectr-paper", NAMES).top_k == 3
    assert parse_router("arrow", ["one"]).top_k == 1
    with pytest.raises(ValueError, match="top_k 4, but there are only 3 experts"):
        parse_router("spectr", NAMES, top_k=4)
    with pytest.raises(ValueError, match="its filter keeps only 2"):
        parse_router(RouterConfig(name="lag", top_k=3, prefilter=2), NAMES)


@pytest.mark.parametrize("name", ["spectr", "spectr-context"])
def test_overrides_reach_routers_that_choose_only(name: str) -> None:
    changed = parse_router(name, NAMES, top_k=2, weighting="softmax", composition="outputs")
    assert (changed.top_k, changed.weighting, changed.composition) == (2, "softmax", "outputs")
    assert parse_router("base", NAMES, top_k=2) == ROUTERS["base"].preset
    assert parse_router("uniform", NAMES, composition="parameters").composition == "parameters"
    assert parse_router("single:sql", NAMES, composition="parameters").composition == "outputs"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("spektr", "unknown router 'spektr'; .*Did you mean 'spectr'"),
        ("single:sqll", "unknown expert 'sqll'; .*Did you mean 'sql'"),
        ("single", "it must: write 'single:NAME'"),
        ("spectr:sql", "only 'single' names an expert"),
        ("", "unknown router ''"),
        (RouterConfig(name="arow"), "Did you mean 'arrow'"),
        (RouterConfig(name="lag", calibrated=True), "'lag' cannot be calibrated"),
        (RouterConfig(name="spectr-context", calibrated=True), "cannot be calibrated.*'spectr'"),
    ],
)
def test_unknown_names_say_what_exists(spec: str | RouterConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_router(spec, NAMES)


def test_no_experts_to_choose_from() -> None:
    for name in ("spectr", "spectr-context"):
        with pytest.raises(ValueError, match="no expert to choose from"):
            parse_router(name, [])
    assert parse_router("base", []).name == "base"


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_k": 0},
        {"top_k": 1.5},
        {"top_k": True},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"weighting": "loud"},
        {"composition": "both"},
        {"prefilter": 0},
        {"confidence": 1.1},
        {"confidence": -0.1},
        {"confidence": True},
    ],
)
def test_a_config_checks_itself(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"it must be|is|needs"):
        dataclasses.replace(CONFIG, **wrong)


def test_the_table_is_whole() -> None:
    for key, row in ROUTERS.items():
        assert row.key == key == row.preset.name
        assert row.display_name
        assert row.equation
        assert row.paper
        assert not (row.score and row.reads_request), "each token, or the request"
        assert row.chooses == (key not in ("base", "single", "uniform"))


def test_a_filtered_router_cannot_be_measured_by_its_output() -> None:
    """Compiled code would read the singular values of other experts."""
    with pytest.raises(ValueError, match="leave its measure out"):
        dataclasses.replace(ROUTERS["lag"], measure="output")
