"""Choices are kept in the order of reading, those that somebody still has to hand over too."""

import numpy as np
import pytest
import torch

from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.recorder import Choice, Recorder
from spectr_demo.evaluation.reading import _Choices
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.trace import NOT_ROUTED

P, K = 2, 2
CPU = torch.device("cpu")


@pytest.fixture
def bank(routed_model: SpectrModel) -> ExpertBank:
    return routed_model.library.banks[0]


def choice(num_tokens: int, seed: int) -> Choice:
    generator = torch.Generator().manual_seed(seed)
    shape = num_tokens, P, K
    return (
        torch.randint(3, shape, generator=generator),
        torch.rand(shape, generator=generator),
        torch.randn(shape, generator=generator),
    )


def test_choices_are_kept_in_the_order_of_reading(bank: ExpertBank) -> None:
    """A prompt, a token that is handed over late, a look, more of a prompt, another look."""
    parts = [choice(5, 0), choice(1, 1), choice(4, 2)]
    recorder, late = Recorder(), [parts[1]]

    class HandOver:
        def hand_over(self, asking: Recorder, asked: ExpertBank) -> None:
            assert asking is recorder and asked is bank
            while late:
                recorder.add_choice(bank, 3, late.pop())

    recorder.late[bank].append(HandOver())
    recorder.add_choice(bank, 3, parts[0])
    recorder.add_choice(bank, 1, choice(5, 9))  # another row
    assert [len(part) for part in recorder.choices(bank, 3)] == [6, 6, 6]
    recorder.add_choice(bank, 3, parts[2])
    for _ in range(2):  # reading changes nothing
        for kept, expected in zip(recorder.choices(bank, 3), zip(*parts, strict=True), strict=True):
            assert torch.equal(kept, torch.cat(expected))


def test_an_evaluation_asks_for_what_is_late_too(routed_model: SpectrModel) -> None:
    library = routed_model.library
    read, expected = (_Choices(library, (2, 1), K) for _ in range(2))
    choices = {}
    for bank in library.banks:
        num_layers = len(bank.paths)
        experts = torch.arange(2 * num_layers * K).view(2, 1, num_layers, K) % bank.num_experts
        weights = torch.full(experts.shape, 0.5)
        weights[0, ..., 1] = 0
        choices[bank] = [(experts[row], weights[row], weights[row]) for row in (0, 1)]
        for row in (0, 1):
            expected.add_choice(bank, row, choices[bank][row])

    class HandOver:
        def hand_over(self, recorder: Recorder, bank: ExpertBank) -> None:
            for row, late in enumerate(choices[bank]):
                recorder.add_choice(bank, row, late)

    for bank in library.banks:
        read.late[bank].append(HandOver())
    assert (expected.experts() >= 0).any()
    assert (expected.experts()[0, ..., 1] == NOT_ROUTED).all()
    np.testing.assert_array_equal(read.experts(), expected.experts())


def test_a_text_that_is_read_again_replaces_what_was_read(bank: ExpertBank) -> None:
    """As a base does that keeps no keys and values."""
    recorder, late = Recorder(), [choice(1, 1)]

    class HandOver:
        def hand_over(self, asking: Recorder, asked: ExpertBank) -> None:
            while late:
                recorder.add_choice(bank, 0, late.pop())

    def read(*widths: int) -> None:
        for width in widths:
            recorder.begin_pass(width, CPU)
            recorder.add_choice(bank, 0, choice(width, width))
            recorder.add_hidden(torch.full((1, width, 2), width))

    recorder.late[bank].append(HandOver())
    read(3, 4, 5)
    for kept, expected in zip(recorder.choices(bank, 0), choice(5, 5), strict=True):
        assert torch.equal(kept, expected)
    assert recorder.hidden()[0, :, 0].tolist() == [5] * 5
    assert not late, "what was late is of the texts before"
    read(1, 1)
    assert recorder.hidden()[0, :, 0].tolist() == [5] * 5 + [1, 1]


def test_what_reads_other_tokens_than_the_base_has_no_trace(routed_model: SpectrModel) -> None:
    recorder, library = Recorder(), routed_model.library
    recorder.begin_pass(4, CPU)
    for bank in library.banks:
        num_layers = len(bank.paths)
        experts = torch.zeros(3, num_layers, K, dtype=torch.long)
        recorder.add_choice(bank, 0, (experts, torch.ones(experts.shape), experts.float()))
    with pytest.raises(ValueError, match=r"q_proj read 3 tokens where the base was given 4"):
        recorder.routing(library, 0, 5, K)
    recorder.add_hidden(torch.zeros(1, 1, 2))
    with pytest.raises(ValueError, match="the decoder read 1 tokens where the base was given 4"):
        recorder.hidden()
