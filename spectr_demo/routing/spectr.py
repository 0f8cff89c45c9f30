"""SpectR on plain tensors: the whole method. Faster paths are tested against it.

SpectR (Fleshman & Van Durme, COLM 2025, arXiv 2504.03454) routes each token, in each linear layer
`y = W x`, to LoRA experts by their own weights. Nothing is trained and no data is read.

Once, for each expert e (`align`):

    U S V^T = scaling_e B_e A_e        A*_e = V^T (r, D_in)        B*_e = U S (D_out, r)

Then, for each token x (`delta`):

    z_e     = A*_e x                                              project
    s_e     = ||z_e||_2                                           score   (`spectr_scores`)
    w_e     = 1/K for the K largest s_e, 0 for the others         select  (`select`)
    delta   = (sum_e w_e B*_e) (sum_e w_e A*_e) x                 compose (`compose`)
    y       = W x + delta

Other routers differ in the score (`arrow_scores`, `lag_scores`, `norm_scores`), in the weights
(softmax instead of 1/K), or in the composition (`sum_e w_e B*_e A*_e x`, without cross terms). They
are the rows of `routing/routers.py`.

Axes: E experts, K selected ones, r rank. Leading axes `...` are tokens, of any number.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from spectr_demo.config import Composition, RouterConfig

# From z (..., E, r), the singular values (E, r) and the router's settings to scores (..., E).
Score = Callable[[Tensor, Tensor, RouterConfig], Tensor]


class Aligned(NamedTuple):
    """One expert's factors at one layer (or a stack of layers), in the basis of its own SVD.

    A: (..., r, D_in) float32. Its rows are orthonormal, by falling singular value, and none has a
        negative sum. Rows past the rank are zero.
    B: (..., D_out, r) float32. Its columns are U_i * s_i, so `B @ A` is the whole weight update.
    """

    A: Tensor
    B: Tensor

    @property
    def singular_values(self) -> Tensor:
        """(..., r) float32, falling, zero past the rank."""
        return torch.linalg.vector_norm(self.B, dim=-2)


def align(lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Aligned:
    """Rewrite `scaling * B A` as `B* A*` with `A*` the right singular vectors (SpectR, sec. 3.1).

    lora_A: (..., r, D_in), lora_B: (..., D_out, r), any float dtype; leading axes are a batch.
    scaling: a number, or (...) one per item of the batch.

    The D_out x D_in product is never formed. `A = L Q` with `L L^T = A A^T`; then the eigenvectors
    V of `(B L)^T (B L)` give `A* = V^T L^-1 A` and `B* = B L V`. The r x r matrices are float64:
    even squared, their rounding is below that of float32.

    The adapter leaves two things open. A direction whose singular value is zero to float32
    precision is not determined: it becomes a zero row, so that padding a rank changes nothing. The
    sign of a direction is not determined either, yet merged factors of several experts depend on
    it: each row of `A*` has a sum of at least 0 here.
    """
    A, B = lora_A.double(), lora_B.double()
    if isinstance(scaling, Tensor):
        scaling = scaling.double()[..., None, None]
    L = _lower_triangle(A @ A.mT)
    core = scaling * L
    squares, V = torch.linalg.eigh(core.mT @ (B.mT @ B) @ core)  # rising
    S, V = squares.clamp_min(0).sqrt().flip(-1), V.flip(-1)
    sizes = *A.shape[-2:], B.shape[-2]
    precision = torch.finfo(torch.float32).eps * max(sizes)
    is_direction = precision * S[..., :1] < S
    is_direction[..., min(sizes) :] = False
    V = V * is_direction.unsqueeze(-2)
    rows = torch.linalg.solve_triangular(L.mT, V, upper=True).mT
    signs = A.new_ones(()).copysign(rows @ A.sum(-1, keepdim=True))  # (..., r, 1)
    # A product whose rows are long takes a quarter of the time of its transpose.
    A_star = (signs * rows) @ A
    B_star = (signs * (core @ V).mT) @ B.mT
    return Aligned(A_star.float(), B_star.float().mT)


def _lower_triangle(gram: Tensor) -> Tensor:
    """Cholesky's factor of Gram matrices (..., r, r) of any rank, of rows of any lengths.

    Where rows depend on each other, Cholesky would take the root of a rounding error below zero.
    The matrix of cosines therefore gets a little more than that error on its diagonal. Such a row
    keeps 1e-7 of its length or so, which is zero to float32 precision.
    """
    tiny = 1e-150  # rows of zeros; its square is still a number
    lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt().clamp_min(tiny).unsqueeze(-1)
    cosines = gram / (lengths * lengths.mT)
    rank = gram.shape[-1]
    cosines.diagonal(dim1=-2, dim2=-1).add_(1e-14 * rank)
    return lengths * torch.linalg.cholesky(cosines)


def spectr_scores(z: Tensor, singular_values: Tensor, config: RouterConfig) -> Tensor:
    """`||A*_e x||_2`: length of the token's projection on each expert's input subspace.

    z: (..., E, r). Returns (..., E) float32, in the units of x. Scores compare experts for one
    token, not tokens with each other (SpectR, eq. 5).
    """
    return torch.linalg.vector_norm(z, dim=-1, dtype=torch.float32)


def arrow_scores(z: Tensor, singular_values: Tensor, config: RouterConfig) -> Tensor:
    """`|a*_e . x|`: length along each expert's first singular direction, whose sign is arbitrary.

    z: (..., E, r). Returns (..., E) float32 (Arrow, Ostapenko et al. 2024, arXiv 2405.11157).
    """
    return z[..., 0].float().abs()


def lag_scores(z: Tensor, singular_values: Tensor, config: RouterConfig) -> Tensor:
    """SpectR's score for the `prefilter` experts with the best arrow score, -inf for the others.

    z: (..., E, r). Returns (..., E) float32 (LAG, arXiv 2507.05346).
    """
    num_kept = min(config.prefilter, z.shape[-2])
    scores = spectr_scores(z, singular_values, config)
    if num_kept == z.shape[-2]:
        return scores
    kept = arrow_scores(z, singular_values, config).topk(num_kept, dim=-1).indices
    return torch.full_like(scores, -torch.inf).scatter(-1, kept, scores.gather(-1, kept))


def norm_scores(z: Tensor, singular_values: Tensor, config: RouterConfig) -> Tensor:
    """`||B_e A_e x||_2 = ||S A*_e x||_2`, since U is orthonormal: length of each expert's output.

    z: (..., E, r), singular_values: (E, r). Returns (..., E) float32 (SEQR, arXiv 2509.18093).
    """
    return torch.linalg.vector_norm(z.float() * singular_values, dim=-1)


def no_scores(z: Tensor, singular_values: Tensor, config: RouterConfig) -> Tensor:
    """NaN (..., E), of a router that compares no experts at a token. z: (..., E, r)."""
    return z.new_full(z.shape[:-1], torch.nan, dtype=torch.float32)


def select(
    scores: Tensor, config: RouterConfig, least: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The K experts with the best scores, and their weights.

    scores: (..., E) float32. Returns experts (..., K) int64, weights (..., K) float32, and the K
    scores. K is `top_k`, or E where a layer has fewer experts. Weights are 1/K (SpectR), or the
    softmax of the K scores over `temperature` (Arrow). They are >= 0 and sum to 1. Where even the
    best score is not above `least` they are 0, and the base answers alone.
    """
    assert config.top_k is not None
    top, indices = scores.topk(min(config.top_k, scores.shape[-1]), dim=-1)
    if config.weighting == "softmax":
        # The lead is divided, not the score, whose rounding a low temperature would magnify.
        weights = torch.softmax((top - top[..., :1]) / config.temperature, dim=-1)
    else:
        weights = torch.full_like(top, 1 / top.shape[-1])
    if least is not None:
        weights = weights * (top[..., :1] > least)
    return indices, weights, top


def compose(weights: Tensor, z: Tensor, composition: Composition) -> Tensor:
    """What the stacked `B*` is multiplied by: (..., E, r) from weights (..., E) and z (..., E, r).

    `outputs` is `w_e z_e`, for `sum_e w_e B*_e A*_e x`. `parameters` is `w_e sum_j w_j z_j`, for
    SpectR's `(sum_e w_e B*_e)(sum_j w_j A*_j) x`. Both are then one product, so they cost the same.
    """
    if composition == "parameters":
        z = weights.unsqueeze(-2) @ z  # (..., 1, r)
    return weights.unsqueeze(-1) * z


def delta(x: Tensor, A: Tensor, B: Tensor, score: Score, config: RouterConfig) -> Tensor:
    """What the experts add to a layer's output: all of the method for one layer.

    x: (..., D_in). A: (E, r, D_in), B: (E, D_out, r), the experts' aligned factors.
    Returns (..., D_out).
    """
    z = torch.einsum("erd,...d->...er", A, x)
    experts, top_weights, _ = select(score(z, Aligned(A, B).singular_values, config), config)
    weights = z.new_zeros(z.shape[:-1]).scatter(-1, experts, top_weights.to(z.dtype))
    return torch.einsum("eor,...er->...o", B, compose(weights, z, config.composition))


def subspace_overlap(A_1: Tensor, A_2: Tensor) -> float:
    """Share of one expert's input subspace that lies in another's, between 0 and 1.

    A_1: (r_1, D_in), A_2: (r_2, D_in), rows orthonormal or zero. Mean squared cosine of the
    principal angles, `||A_1 A_2^T||_F^2 / min(rank_1, rank_2)`: 1 for the same subspace (the two
    experts cannot be told apart by SpectR's score), 0 for orthogonal ones, and about
    `max(rank) / D_in` for random ones. 0 where either is empty.
    """
    ranks = [int((A.abs().amax(-1) > 0).sum()) for A in (A_1, A_2)]
    if min(ranks) == 0:
        return 0.0
    return float((A_1 @ A_2.mT).square().sum() / min(ranks))
