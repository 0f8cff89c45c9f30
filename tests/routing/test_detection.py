"""Detection: the score in the metric of ordinary text, certainty and evidence, by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from spectr_demo.config import RouterConfig
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.detection import Detector, Evidence, certainty, detector, standing
from spectr_demo.routing.spectr import Aligned, align, spectr_scores

NOISE = 0.07**2


def bank_of(*experts: Tensor, layers: int = 1, ids: list[int] | None = None) -> ExpertBank:
    """A bank of experts with these input directions (r, D_in) in each of its layers."""
    aligned = {
        e: [Aligned(A, torch.eye(8)[:, : len(A)])] * layers
        for e, A in zip(ids or range(len(experts)), experts, strict=True)
    }
    paths = [f"layers.0.{p}" for p in range(layers)]
    return ExpertBank.from_aligned(paths, aligned, device=torch.device("cpu"), dtype=torch.float32)


def random_bank(num_experts: int, *, seed: int = 0, D_in: int = 12) -> ExpertBank:
    generator = torch.Generator().manual_seed(seed)
    experts = [
        align(
            torch.randn(3, D_in, generator=generator), torch.randn(4, 3, generator=generator), 1.0
        )
        for _ in range(num_experts)
    ]
    return bank_of(*(expert.A for expert in experts))


def texts(num: int = 200, D_in: int = 12, seed: int = 0) -> Tensor:
    """Inputs that use some directions much more than others."""
    generator = torch.Generator().manual_seed(seed)
    return 1 + torch.randn(num, D_in, generator=generator) * torch.logspace(1, -1, D_in)


def lengths(found: Detector, x: Tensor) -> Tensor:
    """The scores before they are standardised."""
    return found.scores(x) * found.std + found.mean


def white(num_dimensions: int) -> Tensor:
    """Inputs of mean 3 whose covariance is the identity."""
    steps = torch.eye(num_dimensions) * num_dimensions**0.5
    return 3 + torch.cat([steps, -steps])


def test_where_all_directions_are_equally_common_it_is_spectrs_score() -> None:
    generator = torch.Generator().manual_seed(1)
    bank = random_bank(3)
    found = detector(bank, white(12))
    x = torch.randn(5, 12, generator=generator)
    own = spectr_scores(bank.project(x), bank.singular_values, RouterConfig(name="spectr"))
    # Shrunk half way, the identity is twice itself: lengths are those of SpectR by its root.
    assert_close(lengths(found, x + 3), own / 2**0.5, atol=1e-4, rtol=1e-4)


def test_by_hand() -> None:
    """Ordinary text is +-3 along the first axis and +-1 along the second."""
    inputs = torch.tensor([[3.0, 1.0], [3.0, -1.0], [-3.0, 1.0], [-3.0, -1.0]])
    size = 5.0  # mean of the variances, 9 and 1
    first, second = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    both = torch.tensor([[0.6, 0.8]])
    found = detector(bank_of(first, second, both), inputs)
    x = torch.tensor([[2.0, 2.0]])
    C = torch.diag(torch.tensor([9 + size, 1 + size]))
    expected = [
        float((A @ C.inverse() @ x.T).abs() / (A @ C.inverse() @ A.T).sqrt())
        for A in (first, second, both)
    ]
    assert expected[:2] == pytest.approx([2 / 14**0.5, 2 / 6**0.5])
    assert_close(lengths(found, x)[0, 0], torch.tensor(expected))
    # The mean score of ordinary tokens is 3 / sqrt(14) for the first expert, and all have it.
    assert float(found.mean[0, 0]) == pytest.approx(3 / 14**0.5)
    assert float(found.std[0, 0]) == 1


def test_a_direction_that_ordinary_text_uses_much_counts_less() -> None:
    inputs = texts()
    axes = torch.eye(12)
    found = detector(bank_of(axes[:1], axes[-1:]), inputs)
    x = inputs.mean(0) + axes[0] + axes[-1]
    common, rare = lengths(found, x)[0]
    assert common < rare / 2


def test_ordinary_text_has_mean_zero_and_deviation_one() -> None:
    inputs = texts()
    found = detector(random_bank(3), inputs)
    std, mean = torch.std_mean(found.scores(inputs), dim=0, correction=0)
    assert_close(mean, torch.zeros_like(mean), atol=1e-4, rtol=0)
    assert_close(std, torch.ones_like(std), atol=1e-4, rtol=0)


@given(seed=st.integers(0, 20), num_padding=st.integers(1, 3))
def test_a_padded_rank_changes_nothing(seed: int, num_padding: int) -> None:
    inputs = texts(seed=seed)
    bank = random_bank(1, seed=seed)
    A = bank.A
    padded = bank_of(torch.cat([A, torch.zeros(num_padding, 12)]))
    expected = detector(bank, inputs).scores(inputs[:5])
    assert_close(detector(padded, inputs).scores(inputs[:5]), expected, atol=1e-3, rtol=1e-3)


def test_only_the_subspace_counts() -> None:
    """Not which directions span it."""
    inputs = texts()
    A = random_bank(1).A
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))
    x = texts(5, seed=1)
    one, other = (detector(bank_of(each), inputs).scores(x) for each in (A, turn @ A))
    assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_an_expert_that_never_responds_scores_zero() -> None:
    bank = bank_of(torch.zeros(2, 12), torch.eye(12)[:2])
    scores = detector(bank, texts()).scores(texts(5, seed=1))
    assert (scores[..., 0] == 0).all()
    assert scores[..., 1].abs().min() > 0


@pytest.mark.parametrize("inputs", [torch.ones(1, 12), torch.zeros(4, 12)], ids=["one", "none"])
def test_ordinary_text_may_tell_nothing(inputs: Tensor) -> None:
    """A base of few words may write one token, and a layer's inputs may all be alike."""
    assert detector(random_bank(3), inputs).scores(texts(5)).isfinite().all()


@given(order=st.permutations(range(4)))
def test_permuting_experts_permutes_the_scores(order: list[int]) -> None:
    bank, inputs = random_bank(4), texts()
    parts = bank.A.view(4, 3, 12)
    x = texts(5, seed=1)
    expected = detector(bank_of(*parts), inputs).scores(x)[..., order]
    found = detector(bank_of(*(parts[e] for e in order)), inputs).scores(x)
    assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert_close(certainty(found), certainty(expected), atol=1e-3, rtol=1e-3)


def test_certainty_by_hand() -> None:
    scores = torch.tensor([[4.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    size = (2**2 + 1 + 1 + 3 * NOISE) ** 0.5
    assert_close(certainty(scores), torch.tensor([[2, -1, -1], [0, 0, 0]]) / size)
    # How strongly a layer responds says nothing, but below the noise.
    assert_close(certainty(100 * scores), certainty(1e4 * scores), atol=1e-4, rtol=0)
    assert float(certainty(0.01 * scores)[0, 0]) < 0.2


def test_one_expert_alone_is_compared_with_ordinary_text() -> None:
    found = certainty(torch.tensor([[3.0], [0.0], [-3.0]]))
    expected = 1.5 / (2 * 1.5**2 + 2 * NOISE) ** 0.5
    assert_close(found, torch.tensor([[expected], [0.0], [-expected]]))


@given(scores=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=9))
def test_certainty_is_a_cosine(scores: list[float]) -> None:
    found = certainty(torch.tensor(scores))
    assert found.isfinite().all()
    assert found.abs().max() <= 1 + 1e-6
    if len(scores) > 1:
        rounding = 1e-5 * max(map(abs, scores))
        assert abs(float(found.sum())) < 1e-3 + rounding
        assert found[max(range(len(scores)), key=scores.__getitem__)] == found.max()


def test_standing_is_in_each_experts_own_deviations_over_ordinary_prompts() -> None:
    ordinary = torch.tensor([[0.1, 0.5, 0.2], [0.3, -0.5, 0.2]])  # means 0.2, 0, 0.2
    found = standing(torch.tensor([[0.4, 0.4, 0.7]]), ordinary)
    assert_close(found, torch.tensor([[2.0, 0.8, 0.5]]))  # deviations 0.1, 0.5, none
    assert_close(standing(ordinary, ordinary).mean(0), torch.zeros(3))


def test_evidence_by_hand() -> None:
    """Two requests of two tokens and of one; expert 1 is in the first bank alone."""
    owners = torch.tensor([0, 0, 1])
    late, whole = torch.tensor([0.25, 0.75, 1.0]), torch.tensor([0.5, 0.5, 1.0])
    evidence = Evidence(owners, late, whole, torch.tensor([3.0, 1.0, 3.0]))
    first = bank_of(*torch.eye(12)[:3, None])
    second = bank_of(*torch.eye(12)[:2, None], layers=2, ids=[2, 0])
    of_first = torch.tensor([[4.0, 0.0, 0.0], [0.0, 2.0, 1.0], [1.0, 1.0, 4.0]])[:, None]
    of_second = torch.tensor([[[1.0, 2.0], [0.0, 5.0]], [[3.0, 2.0], [0.0, 1.0]], [[0.0, 0.0]] * 2])
    evidence.add(first, of_first)
    evidence.add(second, of_second)

    means = 0.25 * of_first[0, 0] + 0.75 * of_first[1, 0], of_first[2, 0]
    layers = [0.25 * of_second[0, p] + 0.75 * of_second[1, p] for p in (0, 1)]
    for request, mean in enumerate(means):
        assert_close(evidence.by_layer[first][request, 0], certainty(mean))
    assert_close(evidence.by_layer[second][0], certainty(torch.stack(layers)))
    assert evidence.by_layer[second].shape == (2, 2, 2)
    expected = certainty(means[0])
    expected[[2, 0]] += sum(map(certainty, layers))
    assert_close(evidence.certainty[0], expected / torch.tensor([3.0, 1, 3]))
    assert_close(evidence.certainty[1], certainty(means[1]) / torch.tensor([3.0, 1, 3]))

    explained = certainty(of_first[:2, 0]).mean(0)
    explained[[2, 0]] += certainty(of_second[:2]).sum(1).mean(0)
    assert_close(evidence.explained[0], explained / torch.tensor([3.0, 1, 3]))
    assert_close(evidence.explained[1], certainty(of_first[2, 0]) / torch.tensor([3.0, 1, 3]))
    assert (evidence.explained[0] - evidence.certainty[0]).abs().max() > 0.05


def test_two_experts_in_one_text_each_explain_less() -> None:
    """That is what a cut gains: the mean of certainties, not the certainty of the mean."""
    scores = torch.tensor([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0]])[:, None]
    bank = bank_of(*torch.eye(12)[:3, None])

    def best(owners: list[int]) -> Tensor:
        weights = 1 / torch.tensor(owners).bincount()[owners]
        evidence = Evidence(torch.tensor(owners), weights, weights, torch.ones(3))
        evidence.add(bank, scores)
        return evidence.explained.amax(-1)

    together, apart = best([0, 0]), best([0, 1])
    assert float(apart.min()) > 0.8 > 0.4 > float(together)
