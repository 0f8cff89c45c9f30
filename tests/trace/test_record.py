"""The trace: what it accepts, its statistics by hand and by property, and its file format."""

import json
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectr_demo.trace.record import NOT_ROUTED, ColumnTrace, RoutingTrace
from tests.trace_samples import sample_trace

NONE = NOT_ROUTED


def make_column(
    experts: Any, weights: Any, /, *, label: str = "spectr", **changes: Any
) -> ColumnTrace:
    """A column around (T, L, P, K) experts and weights; scores are ten times the weights."""
    experts = np.asarray(experts, np.int16)
    weights = np.asarray(weights, np.float32)
    T = len(experts)
    undefined = np.full(T, np.nan, np.float32)
    fields: dict[str, Any] = {
        "label": label,
        "router": {"name": "spectr"},
        "token_ids": np.arange(T, dtype=np.int32),
        "tokens": tuple("abcdefghij"[t % 10] for t in range(T)),
        "spans": np.stack([np.arange(T), np.arange(T) + 1], axis=1).astype(np.int32),
        "num_prompt": min(1, T),
        "experts": experts,
        "weights": weights,
        "scores": np.where(experts == NONE, np.nan, 10 * weights).astype(np.float32),
        "logprob": undefined,
        "entropy": undefined,
        "kl": undefined,
    }
    return ColumnTrace(**fields | changes)


def make_trace(*columns: ColumnTrace, num_experts: int = 3, **changes: Any) -> RoutingTrace:
    L, P = columns[0].experts.shape[1:3] if columns else (1, 1)
    fields: dict[str, Any] = {
        "expert_names": tuple(f"expert-{e}" for e in range(num_experts)),
        "projections": tuple(f"proj-{p}" for p in range(P)),
        "num_layers": L,
        "columns": columns,
    }
    return RoutingTrace(**fields | changes)


# Two tokens are routed, the third was never read. Layer 1 has no expert on projection 1.
#        token 0: layer 0, layer 1             token 1: layer 0, layer 1
EXPERTS = [
    [[[0, 1], [0, 2]], [[1, 0], [NONE, NONE]]],
    [[[2, 0], [2, 1]], [[2, 1], [NONE, NONE]]],
    [[[NONE, NONE]] * 2] * 2,
]
WEIGHTS = [
    [[[0.75, 0.25], [0.5, 0.5]], [[0.5, 0.5], [0, 0]]],
    [[[1.0, 0.0], [0.5, 0.5]], [[0.75, 0.25], [0, 0]]],
    [[[0.0, 0.0]] * 2] * 2,
]


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
    with pytest.raises(ValueError, match=r"'proj-9' is not in the trace, which has proj-0, proj-1"):
        tiny.dominant_cells("spectr", "proj-9")


def test_dominant_cells_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = sample_trace(30)
    whole = trace.dominant_cells("spectr")
    monkeypatch.setattr("spectr_demo.trace.record._CELLS_PER_CHUNK", 1)
    pieces = trace.dominant_cells("spectr")
    np.testing.assert_array_equal(whole.expert, pieces.expert)
    np.testing.assert_array_equal(whole.weight, pieces.weight)


def test_smoothed_share_is_a_moving_average_of_the_routed_tokens() -> None:
    experts = np.array([0, 1, 1, NONE, 0]).reshape(5, 1, 1, 1)
    trace = make_trace(make_column(experts, experts != NONE), num_experts=2)
    smooth = trace.smoothed_share("spectr", 3)
    np.testing.assert_allclose(smooth[:, 0], [1 / 2, 1 / 3, 0, 1 / 2, 1], atol=1e-7)
    np.testing.assert_allclose(smooth.sum(axis=1), 1)
    np.testing.assert_array_equal(trace.smoothed_share("spectr", 1), trace.token_share("spectr"))
    # An even window looks one token further back than ahead.
    np.testing.assert_allclose(trace.smoothed_share("spectr", 2)[:, 0], [1, 1 / 2, 0, 0, 1])
    with pytest.raises(ValueError, match="window is 0"):
        trace.smoothed_share("spectr", 0)


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


def test_statistics_are_fast() -> None:
    trace = sample_trace(300, top_k=4)
    for method in (trace.token_share, trace.layer_share, trace.dominant_cells):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            method("spectr")
            times.append(time.perf_counter() - start)
        # About 10 ms on two cores; a Python loop over tokens and layers takes seconds.
        assert min(times) < 0.25, method.__name__


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
        "all": (trace.share("spectr")[None], is_routed.any()[None]),
    }
    for name, (share, expected) in shares.items():
        assert (share >= 0).all(), name
        np.testing.assert_allclose(share.sum(axis=-1), expected, atol=1e-5, err_msg=name)
    smooth = trace.smoothed_share("spectr", 3)
    assert (smooth >= 0).all()
    assert (smooth.sum(axis=-1) <= 1 + 1e-5).all()


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


def assert_same_trace(got: RoutingTrace, expected: RoutingTrace) -> None:
    """Equal in every field, NaN equal to NaN."""
    assert got.expert_names == expected.expert_names
    assert got.projections == expected.projections
    assert got.num_layers == expected.num_layers
    assert got.meta == expected.meta
    assert got.labels == expected.labels
    for new, old in zip(got.columns, expected.columns, strict=True):
        for name, value in vars(old).items():
            if isinstance(value, np.ndarray):
                assert getattr(new, name).dtype == value.dtype, name
                np.testing.assert_array_equal(getattr(new, name), value, err_msg=name)
            else:
                assert getattr(new, name) == value, name


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    trace = sample_trace(120)
    path = tmp_path / "run.trace"
    trace.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["run.trace"]
    assert_same_trace(RoutingTrace.load(path), trace)


def test_constant_routers_stay_small_in_the_file_and_after_loading(tmp_path: Path) -> None:
    trace = sample_trace(50)
    trace.save(tmp_path / "run.npz")
    with np.load(tmp_path / "run.npz", allow_pickle=False) as file:
        assert file[f"{trace.labels.index('uniform')}.experts"].shape == (1, 1, 1, 4)
        assert all(file[name].dtype != object for name in file.files)
    loaded = RoutingTrace.load(tmp_path / "run.npz").column("uniform")
    assert loaded.experts.strides[:3] == (0, 0, 0)


def test_load_refuses_what_is_not_a_trace(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(ValueError, match=r"notes\.txt: not a routing trace"):
        RoutingTrace.load(text)
    other = tmp_path / "other.npz"
    np.savez(other, weights=np.ones(3))
    with pytest.raises(ValueError, match=r"other\.npz: not a routing trace"):
        RoutingTrace.load(other)
    with pytest.raises(FileNotFoundError):
        RoutingTrace.load(tmp_path / "missing.npz")


def test_load_reports_truncated_and_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    sample_trace(20).save(path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        member = max(archive.infolist(), key=lambda info: info.compress_size)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        RoutingTrace.load(path)
    # Bytes changed inside the largest array, the file's directory left intact.
    at = member.header_offset + 200
    path.write_bytes(whole[:at] + bytes(50) + whole[at + 50 :])
    with pytest.raises(ValueError, match="damaged"):
        RoutingTrace.load(path)


def _rewrite(path: Path, change: Any) -> None:
    """Save the trace at `path` again with `change(header, arrays)` applied."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    header = json.loads(arrays.pop("header").tobytes())
    change(header, arrays)
    np.savez(path, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)


def test_load_refuses_a_newer_format(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    sample_trace(20).save(path)
    _rewrite(path, lambda header, arrays: header.update(version=2))
    with pytest.raises(ValueError, match="version 2, this program reads version 1; update"):
        RoutingTrace.load(path)


def test_load_refuses_a_trace_with_parts_missing(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    sample_trace(20).save(path)
    _rewrite(path, lambda header, arrays: arrays.pop("3.kl"))
    with pytest.raises(ValueError, match=r"inconsistent \('3\.kl' is missing\)"):
        RoutingTrace.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl": np.zeros(2, np.float32)}, r"kl has shape \(2,\), needed \(3,\)"),
        ({"kl": np.zeros(3)}, "kl has dtype float64, needed float32"),
        ({"kl": [0.0] * 3}, "kl is a list, needed a numpy array"),
        ({"spans": np.zeros((3, 3), np.int32)}, r"spans has shape \(3, 3\), needed \(3, 2\)"),
        ({"spans": np.full((3, 2), 9, np.int32)}, "spans leave the text"),
        ({"num_prompt": 4}, "num_prompt is 4, needed 0 to 3"),
        ({"experts": np.zeros((3, 2), np.int16)}, r"needed \(T, L, P, K\)"),
        ({"weights": np.zeros((3, 2, 2, 1), np.float32)}, r"needed \(3, 2, 2, 2\)"),
        ({"weights": np.full((3, 2, 2, 2), -1, np.float32)}, "negative or non-finite"),
        ({"weights": np.ones((3, 2, 2, 2), np.float32)}, "not 0 where experts is NOT_ROUTED"),
        ({"experts": np.full((3, 2, 2, 2), -2, np.int16)}, "experts has -2"),
        ({"router": {"name": object()}}, "router has values that are not JSON"),
        ({"label": ""}, "label is empty"),
    ],
)
def test_a_column_refuses_wrong_arrays(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_column(EXPERTS, WEIGHTS, **changes)


def test_a_column_names_all_that_is_wrong_at_once() -> None:
    short = np.zeros(1, np.float32)
    with pytest.raises(ValueError, match=r"column 'spectr': logprob .*; entropy .*; kl "):
        make_column(EXPERTS, WEIGHTS, logprob=short, entropy=short, kl=short)


def test_a_trace_refuses_columns_that_do_not_fit() -> None:
    column = make_column(EXPERTS, WEIGHTS)
    with pytest.raises(ValueError, match=r"'spectr' has \(L, P\) = \(2, 2\), needed \(5, 2\)"):
        make_trace(column, num_layers=5)
    with pytest.raises(ValueError, match="uses expert 2, the trace names 2"):
        make_trace(column, num_experts=2)
    with pytest.raises(ValueError, match="columns repeat spectr"):
        make_trace(column, column)
    with pytest.raises(ValueError, match="expert_names repeats a"):
        make_trace(column, expert_names=("a", "a", "b"))
    with pytest.raises(ValueError, match="meta has values that are not JSON"):
        make_trace(column, meta={"seed": float("nan")})


def test_an_unknown_column_names_the_known_and_the_nearest() -> None:
    trace = sample_trace(5)
    assert trace.column("uniform").label == "uniform"
    with pytest.raises(ValueError, match=r"has base, single:sql, uniform, spectr; did you mean 's"):
        trace.column("spectre")
    with pytest.raises(ValueError, match="part is 'middle', needed one of prompt, answer, all"):
        trace.share("spectr", "middle")  # type: ignore[arg-type]
