"""Choices come as tensors of many tokens and as arrays of one, and are kept in their order."""

import numpy as np
import pytest
import torch
from torch import Tensor

from spectr_demo.cpu.token import Choices
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.recorder import Choice, Recorder
from spectr_demo.evaluation.reading import _Choices
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.trace import NOT_ROUTED

ROWS, P, K = (1, 3), 2, 2


@pytest.fixture
def bank(routed_model: SpectrModel) -> ExpertBank:
    return routed_model.library.banks[0]


def write(memory: Choices, *parts: Tensor) -> None:
    """What compiled code does with one token."""
    for to, part in zip(memory[:3], parts, strict=True):
        to[memory.num[0]] = part
    memory.num[0] += 1


def test_tokens_are_kept_in_the_order_of_reading(bank: ExpertBank) -> None:
    """A prompt, two tokens, a look at them, a third one, another look, two, more of a prompt."""
    generator = torch.Generator().manual_seed(0)
    chosen = [
        (
            torch.randint(3, (len(ROWS), T, P, K), generator=generator),
            torch.rand(len(ROWS), T, P, K, generator=generator),
            torch.randn(len(ROWS), T, P, K, generator=generator),
        )
        for T in (5, 1, 1, 1, 1, 1, 4)
    ]
    recorder = Recorder()
    memory = Choices.empty(2, len(ROWS), P, K)
    for place, of_pass in enumerate(chosen):
        if of_pass[0].shape[1] == 1:
            if place == 1 or memory.is_full:
                memory = Choices.empty(2, len(ROWS), P, K)
                recorder.add_tokens(bank, ROWS, memory)
            write(memory, *(part[:, 0] for part in of_pass))
        else:
            for i, row in enumerate(ROWS):
                recorder.add_choice(bank, row, *(part[i] for part in of_pass))
        if place in (2, 3):
            num = 5 + place
            assert [len(part) for part in recorder.choices(bank, ROWS[0])] == [num, num, num]
    for i, row in enumerate(ROWS):
        kept: Choice = recorder.choices(bank, row)
        for part, parts in zip(kept, zip(*chosen, strict=True), strict=True):
            assert torch.equal(part, torch.cat([of_pass[i] for of_pass in parts]))


def test_rows_of_another_router_are_apart(bank: ExpertBank) -> None:
    recorder = Recorder()
    for rows in ((0, 2), (1,)):
        memory = Choices.empty(3, len(rows), P, 1)
        recorder.add_tokens(bank, rows, memory)
        write(memory, torch.tensor(rows)[:, None, None], torch.ones(()), torch.ones(()))
    assert [recorder.choices(bank, row)[0].unique().item() for row in (0, 1, 2)] == [0, 1, 2]


def test_an_evaluation_keeps_tokens_as_it_keeps_texts(routed_model: SpectrModel) -> None:
    """A prompt of one token is all that is read of a text with one more."""
    library = routed_model.library
    read, expected = (_Choices(library, (2, 1), K) for _ in range(2))
    for bank in library.banks:
        num_layers = len(bank.paths)
        experts = torch.arange(2 * num_layers * K).view(2, num_layers, K) % bank.num_experts
        weights = torch.full(experts.shape, 0.5)
        weights[0, :, 1] = 0
        memory = Choices.empty(4, 2, num_layers, K)
        read.add_tokens(bank, [0, 1], memory)
        write(memory, experts, weights, weights)
        for row in (0, 1):
            of_row = (part[row, None] for part in (experts, weights, weights))
            expected.add_choice(bank, row, *of_row)
    assert (expected.experts() >= 0).any()
    assert (expected.experts()[0, ..., 1] == NOT_ROUTED).all()
    np.testing.assert_array_equal(read.experts(), expected.experts())
