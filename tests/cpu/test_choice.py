"""What compiled code chooses for one token, against `routing.spectr.select`."""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from spectr_demo.config import RouterConfig
from spectr_demo.cpu.choice import LENGTH, Choices, Chosen, Rule, choose
from spectr_demo.routing.spectr import select


def rule(num_experts: int, **changes: float) -> Rule:
    """SpectR's score, as it is."""
    plain = Rule(
        measure=LENGTH,
        num_kept=num_experts,
        mean=np.zeros((2, num_experts), np.float32),
        std=np.ones((2, num_experts), np.float32),
        temperature=0.0,
    )
    return plain._replace(**changes)


def one_choice(*shape: int) -> Chosen:
    """Memory for one token's."""
    places, weights, scores, _ = Choices.empty(1, *shape)
    return Chosen(places[0], weights[0], scores[0])


@settings(deadline=None)
@given(
    scores=st.lists(
        st.floats(-50, 50, width=32), min_size=1, max_size=9, unique_by=lambda s: round(s, 3)
    ),
    top_k=st.integers(1, 9),
    temperature=st.sampled_from([None, 0.02, 1.0]),
)
@example(scores=[1.0, 2.0, -50.0], top_k=3, temperature=0.02)
@example(scores=[10.875, 10.867477416992188], top_k=2, temperature=0.02)
def test_choose_is_select(scores: list[float], top_k: int, temperature: float | None) -> None:
    config = RouterConfig(name="spectr", top_k=top_k)
    if temperature is not None:
        config = replace(config, weighting="softmax", temperature=temperature)
    tensor = torch.tensor(scores)[None, None]
    expected = select(tensor, config)
    asked = rule(len(scores), temperature=temperature or 0.0)
    chosen = one_choice(1, 1, min(top_k, len(scores)))
    rows = torch.full((3, 1, len(scores)), torch.nan)
    choose(chosen, rows.numpy(), np.array([1]), tensor.numpy(), asked)
    for found, of_torch in zip(chosen, expected, strict=True):
        assert_close(torch.from_numpy(found), of_torch, atol=1e-6, rtol=1e-5)
    indices, kept, _ = expected
    assert_close(rows[1:2], torch.zeros_like(tensor).scatter(-1, indices, kept))
    assert rows[::2].isnan().all(), "other rows are not this router's"


def test_what_is_not_a_number_chooses_experts_of_the_bank() -> None:
    """A diverging model must not become a read of other memory."""
    nan = np.full((1, 2, 4), np.nan, np.float32)
    chosen = one_choice(1, 2, 3)
    choose(chosen, np.empty_like(nan), np.array([0]), nan, rule(4))
    assert set(chosen.places.flatten().tolist()) <= {0, 1, 2, 3}
