"""Pooled evidence: causal, the same in prefill and in decoding, blind to padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.context import EvidencePool, of_lines


def bank(expert_ids: list[int], *paths: str) -> ExpertBank:
    nothing = torch.zeros(0)
    return ExpertBank(
        paths=paths,
        expert_ids=torch.tensor(expert_ids),
        A=nothing,
        B=(),
        singular_values=nothing,
    )


FIRST, SECOND = bank([0, 1, 2], "first"), bank([2, 0], "second")


def scores(num_rows: int, num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(num_rows, num_tokens, 3, generator=generator),
        torch.rand(num_rows, num_tokens, 2, generator=generator),
    )


def begin(pool: EvidencePool, values: torch.Tensor) -> None:
    """A pass over as many rows and tokens."""
    pool.begin_pass(*values.shape[:2])


def read(pool: EvidencePool, *parts: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    """The pooled scores of both layers over all parts, each part one pass."""
    passes = []
    for first, second in parts:
        begin(pool, first)
        passes.append((pool.add(FIRST, first[:, :, None]), pool.add(SECOND, second[:, :, None])))
    return [torch.cat(layer, dim=1)[:, :, 0] for layer in zip(*passes, strict=True)]


def winners(scores: torch.Tensor) -> torch.Tensor:
    """A token in a layer speaks for its best expert alone."""
    return torch.where(scores == scores.amax(-1, keepdim=True), scores, 0)


def test_it_is_the_decayed_mean_over_tokens_and_layers() -> None:
    first, second = scores(1, 3)
    pooled_first, pooled_second = read(EvidencePool(0.5, 3, None), (first, second))
    first, second = winners(first), winners(second)
    weights = torch.tensor([0.25, 0.5, 1])
    over_first = (weights[:, None] * first[0]).sum(0) / weights.sum()
    over_second = (weights[:, None] * second[0]).sum(0) / weights.sum()
    torch.testing.assert_close(pooled_first[0, 2], over_first)
    torch.testing.assert_close(pooled_second[0, 2], (over_first[[2, 0]] + over_second) / 2)


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(1, 699), decay=st.sampled_from([1.0, 0.97, 0.5]), seed=st.integers(0, 99))
def test_prefill_and_decoding_pool_alike(cut: int, decay: float, seed: int) -> None:
    first, second = scores(2, 700, seed)  # longer than the pool reads at once
    at_once = read(EvidencePool(decay, 3, None), (first, second))
    parts = [(first[:, :cut], second[:, :cut])]
    parts += [(first[:, t : t + 1], second[:, t : t + 1]) for t in range(cut, 700)]
    for one, other in zip(at_once, read(EvidencePool(decay, 3, None), *parts), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_it_is_causal() -> None:
    first, second = scores(1, 6)
    before = read(EvidencePool(0.9, 3, None), (first, second))
    first, second = first.clone(), second.clone()
    first[:, 4:], second[:, 4:] = 99, 99
    after = read(EvidencePool(0.9, 3, None), (first, second))
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one[:, :4], other[:, :4])


def test_padding_and_template_change_nothing() -> None:
    first, second = scores(1, 5)
    alone = read(EvidencePool(0.9, 3, None), (first, second))
    padded = [torch.cat([torch.full_like(part[:, :2], 7), part], dim=1) for part in (first, second)]
    is_evidence = torch.tensor([[False, False, True, True]])  # the prompt; the rest is decoded
    with_padding = read(EvidencePool(0.9, 3, is_evidence), (padded[0], padded[1]))
    for one, other in zip(alone, with_padding, strict=True):
        torch.testing.assert_close(one, other[:, 2:])
        assert (other[:, :2] == 0).all()


def test_rows_do_not_mix() -> None:
    first, second = scores(3, 4)
    together = read(EvidencePool(0.9, 3, None), (first, second))
    alone = read(EvidencePool(0.9, 3, None), (first[1:2], second[1:2]))
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one[1:2], other)


def test_a_layer_counts_by_the_root_of_its_depth() -> None:
    first, second = scores(1, 1)
    pool = EvidencePool(1.0, 3, None)
    begin(pool, first)
    pool.add(bank([0, 1, 2], "layers.0"), first[:, :, None])
    pooled = pool.add(bank([2, 0], "layers.8"), second[:, :, None])[:, :, 0]
    expected = (winners(first)[..., [2, 0]] + 3 * winners(second)) / 4
    torch.testing.assert_close(pooled, expected)


@pytest.mark.parametrize("expert_ids", [[0, 1, 2], [2, 0]])
def test_layers_of_one_bank_pool_as_if_they_had_one_each(expert_ids: list[int]) -> None:
    """Each knows the layers before it, those of its bank too, and not those after it."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(2, 6, 3, len(expert_ids), generator=generator)
    together = EvidencePool(0.9, 3, None)
    alone = EvidencePool(0.9, 3, None)
    shared = bank(expert_ids, "layers.1.a", "layers.1.b", "layers.3.a")
    single = [bank(expert_ids, path) for path in shared.paths]
    first = torch.rand(2, 6, 1, 3, generator=generator)
    for part in (slice(0, 4), slice(4, 5), slice(5, 6)):  # prefill, then two tokens
        for pool in (together, alone):
            begin(pool, first[:, part])
        together.add(FIRST, first[:, part])
        alone.add(FIRST, first[:, part])
        found = together.add(shared, values[:, part])
        for p, own in enumerate(single):
            expected = alone.add(own, values[:, part, p : p + 1])
            torch.testing.assert_close(found[:, :, p : p + 1], expected)
    torch.testing.assert_close(together.latest, alone.latest)


def test_what_does_not_respond_says_nothing() -> None:
    pool = EvidencePool(1.0, 3, None)
    pool.begin_pass(1, 1)
    assert pool.add(FIRST, torch.tensor([[[[-2.0, -9, -1]]]])).tolist() == [[[[0, 0, 0]]]]
    pool.begin_pass(1, 1)
    assert pool.add(FIRST, torch.tensor([[[[2.0, -9, 1]]]])).tolist() == [[[[1, 0, 0]]]]


def test_a_second_reading_starts_from_what_all_layers_know_and_that_fades() -> None:
    prompt, answer = scores(1, 3), scores(1, 2, seed=1)
    pool = EvidencePool(0.5, 3, torch.tensor([[False, True, True]]))
    read(pool, prompt)
    before = pool.latest
    known = torch.tensor([[False, False, False, True, True]])
    second_pool = EvidencePool(0.5, 3, known, pool.start())
    again = [torch.cat(parts, dim=1) for parts in zip(prompt, answer, strict=True)]
    first, second = read(second_pool, (again[0], again[1]))
    for token in range(3):  # the prompt: the same in every layer
        torch.testing.assert_close(first[0, token], before[0])
        torch.testing.assert_close(second[0, token], before[0, [2, 0]])
    # Two tokens of the prompt in two layers (one where expert 1 is not), faded by one token ...
    weight = 0.5 * 1.5 * torch.tensor([2.0, 1.0, 2.0])
    # ... and one token of the answer in one layer.
    expected = (weight * before[0] + winners(answer[0])[0, 0]) / (weight + 1)
    torch.testing.assert_close(first[0, 3], expected)


@pytest.mark.parametrize("cut", [1, 5, 6, 7])
def test_a_second_reading_is_the_same_in_prefill_and_in_decoding(cut: int) -> None:
    prompt, text = scores(2, 5), scores(2, 9, seed=1)
    known = (torch.arange(9) >= 5).expand(2, -1)

    def second_reading(*parts: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        pool = EvidencePool(0.8, 3, None)
        read(pool, prompt)
        told = known[:, : max(5, cut)]  # what comes later counts without being told
        return read(EvidencePool(0.8, 3, told, pool.start()), *parts)

    parts = [(text[0][:, :cut], text[1][:, :cut])]
    parts += [(text[0][:, t : t + 1], text[1][:, t : t + 1]) for t in range(cut, 9)]
    for one, other in zip(second_reading(text), second_reading(*parts), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("num_first", [2, 290])
def test_each_line_of_the_answer_starts_from_the_first_reading(num_first: int) -> None:
    """Read at once or token by token; what a line says is forgotten where it ends."""
    decay, length = 0.8, num_first + 12
    prompt, text = scores(2, 3), scores(2, length, seed=1)
    is_newline = torch.zeros(2, length, dtype=torch.bool)
    is_newline[0, [0, num_first + 1, num_first + 5]] = True
    is_newline[1, [num_first - 1, num_first + 5, num_first + 6]] = True

    def pool() -> EvidencePool:
        pool = EvidencePool(decay, 3, None)
        read(pool, prompt)
        is_evidence = torch.zeros(2, 1, dtype=torch.bool)  # its first token is the prompt
        return EvidencePool(decay, 3, is_evidence, pool.start())

    def read_parts(*cuts: int) -> list[torch.Tensor]:
        second, found = pool(), []
        for start, stop in zip((0, *cuts), (*cuts, length), strict=True):
            part = text[0][:, start:stop], text[1][:, start:stop]
            second.begin_pass(2, stop - start, is_newline=is_newline[:, start:stop])
            found.append(
                [
                    second.add(bank, p[:, :, None])[:, :, 0]
                    for bank, p in zip((FIRST, SECOND), part, strict=True)
                ]
            )
        return [torch.cat(layer, dim=1) for layer in zip(*found, strict=True)]

    at_once = read_parts()
    for one, other in zip(at_once, read_parts(*range(num_first, length)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    first = pool()
    before = read(first, (text[0][:, :1], text[1][:, :1]))  # counts nothing: the first reading
    for layer, whole in zip(at_once, before, strict=True):
        for row, token in is_newline.nonzero().tolist():
            torch.testing.assert_close(layer[row, token], whole[row, 0])
    # A line after a newline is read as if it were the first one.
    fresh = pool()
    start = num_first + 5
    is_known = [torch.cat([part[:, :1], part[:, start + 1 :]], dim=1) for part in text]
    again = read(fresh, (is_known[0], is_known[1]))
    for layer, whole in zip(at_once, again, strict=True):
        torch.testing.assert_close(layer[0, start + 1 :], whole[0, 1:], atol=1e-5, rtol=1e-4)


def test_a_newline_means_nothing_to_a_single_reading() -> None:
    text = scores(1, 5)
    plain = read(EvidencePool(0.9, 3, None), text)
    pool = EvidencePool(0.9, 3, None)
    pool.begin_pass(1, 5, is_newline=torch.ones(1, 5, dtype=torch.bool))
    for bank, part, expected in zip((FIRST, SECOND), text, plain, strict=True):
        assert torch.equal(pool.add(bank, part[:, :, None])[:, :, 0], expected)


def test_lines_have_the_same_say() -> None:
    strong, weak = torch.tensor([4.0, 1.0, 0.5]), torch.tensor([0.0, 0.5, 2.0])
    assert torch.equal(of_lines(strong[None], None), strong)
    both = of_lines(torch.stack([strong, weak]), None)
    assert both.tolist() == [3.0, 1.5, 3.0], "expert 1 is 1.5 behind the best of the second line"
    # The second line's lead is 2 - 2.5 / 3 = 1.17, the first one's 2.17.
    assert of_lines(torch.stack([strong, weak]), 1.2).tolist() == strong.tolist()
    assert of_lines(torch.stack([strong, weak]), 9.0).tolist() == weak.tolist(), "the whole prompt"


def test_lines_of_several_requests() -> None:
    prompts = scores(5, 4)
    pool = EvidencePool(0.9, 3, None)
    read(pool, prompts)
    lines = pool.latest
    start = pool.start(num_lines=[2, 3])
    text = scores(2, 1)
    first, _ = read(EvidencePool(0.9, 3, torch.zeros(2, 1, dtype=torch.bool), start), text)
    expected = torch.stack([of_lines(lines[:2], None), of_lines(lines[2:], None)])
    torch.testing.assert_close(first[:, 0], expected)


def test_a_pass_must_have_begun() -> None:
    with pytest.raises(ValueError, match="no pass has begun"):
        EvidencePool(0.9, 3).add(FIRST, torch.zeros(1, 1, 1, 3))
