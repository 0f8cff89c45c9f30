"""The trace: columns that fit together, and names that are known."""

import pytest

from tests.trace_samples import EXPERTS, WEIGHTS, make_column, make_trace, sample_trace


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
    message = r"'base', 'single:sql', 'uniform', 'spectr'\. Did you mean 'spectr'"
    with pytest.raises(ValueError, match=message):
        trace.column("spectre")
    with pytest.raises(ValueError, match="part is 'middle', needed one of prompt, answer, all"):
        trace.share("spectr", "middle")  # type: ignore[arg-type]
