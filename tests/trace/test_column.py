"""One column: the arrays that it accepts, and what it says about the others."""

from typing import Any

import numpy as np
import pytest

from spectr_demo.trace import Reading
from tests.trace_samples import EXPERTS, WEIGHTS, make_column, make_trace


def reading(**changes: Any) -> Reading:
    """Of one lane, for three tokens, two layers and three experts."""
    arrays: dict[str, Any] = {
        "lanes": np.zeros(3, np.int16),
        "standing": np.zeros((1, 3), np.float32),
        "certainty": np.zeros((1, 2, 3), np.float32),
    }
    return Reading(**arrays | changes)


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
        ({"reading": reading(lanes=np.zeros(2, np.int16))}, r"lanes has shape \(2,\), needed \(3,"),
        ({"reading": reading(lanes=np.ones(3, np.int16))}, "lanes has 1 to 1, needed -1 to 0"),
        (
            {"reading": reading(certainty=np.zeros((1, 3, 3), np.float32))},
            r"certainty has shape \(1, 3, 3\), needed \(1, 2, 3\)",
        ),
        ({"reading": reading(standing=np.zeros(3, np.float32))}, r"needed \(0, 0\)"),
    ],
)
def test_a_column_refuses_wrong_arrays(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_column(EXPERTS, WEIGHTS, **changes)


def test_a_column_names_all_that_is_wrong_at_once() -> None:
    short = np.zeros(1, np.float32)
    with pytest.raises(ValueError, match=r"column 'spectr': logprob .*; entropy .*; kl "):
        make_column(EXPERTS, WEIGHTS, logprob=short, entropy=short, kl=short)


def test_a_trace_refuses_a_reading_of_other_experts() -> None:
    column = make_column(EXPERTS, WEIGHTS, reading=reading())
    assert make_trace(column).column("spectr").reading is column.reading
    with pytest.raises(ValueError, match="has read 3 experts, the trace names 4"):
        make_trace(column, num_experts=4)
