"""Choices come as tensors of many tokens and as arrays of one, and are kept in their order."""

import numpy as np
import pytest
import torch

from spectr_demo.bank import ExpertBank
from spectr_demo.engine import SpectrModel
from spectr_demo.recorder import Choice, Recorder

ROWS, P, K = (1, 3), 2, 2


@pytest.fixture
def bank(routed_model: SpectrModel) -> ExpertBank:
    return routed_model.library.banks[0]


def test_tokens_are_kept_in_the_order_of_reading(bank: ExpertBank) -> None:
    """A prompt, two tokens, a look at them, a token, and more of a prompt."""
    generator = torch.Generator().manual_seed(0)
    chosen = [
        (
            torch.randint(3, (len(ROWS), T, P, K), generator=generator),
            torch.rand(len(ROWS), T, P, K, generator=generator),
            torch.randn(len(ROWS), T, P, K, generator=generator),
        )
        for T in (5, 1, 1, 1, 4)
    ]
    recorder = Recorder()
    for place, of_pass in enumerate(chosen):
        if of_pass[0].shape[1] == 1:
            experts, weights, scores = (part[:, 0].numpy() for part in of_pass)
            recorder.add_token(bank, ROWS, (experts, weights, scores))
        else:
            for i, row in enumerate(ROWS):
                recorder.add_choice(bank, row, *(part[i] for part in of_pass))
        if place == 2:
            assert [len(part) for part in recorder.choices(bank, ROWS[0])] == [7, 7, 7]
    for i, row in enumerate(ROWS):
        kept: Choice = recorder.choices(bank, row)
        for part, parts in zip(kept, zip(*chosen, strict=True), strict=True):
            assert torch.equal(part, torch.cat([of_pass[i] for of_pass in parts]))


def test_rows_of_another_router_are_apart(bank: ExpertBank) -> None:
    recorder = Recorder()
    for rows in ((0, 2), (1,)):
        experts = np.array(rows)[:, None, None].repeat(P, 1)
        weights = np.ones(experts.shape, np.float32)
        recorder.add_token(bank, rows, (experts, weights, weights))
    assert [recorder.choices(bank, row)[0].unique().item() for row in (0, 1, 2)] == [0, 1, 2]
