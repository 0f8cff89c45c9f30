"""Spectral alignment of LoRA factors: pure functions, tensors in, tensors out."""

from typing import NamedTuple

import torch
from torch import Tensor


class Aligned(NamedTuple):
    """One expert's factors at one layer (or a stack of layers), in the basis of its own SVD.

    A: (..., r, D_in) float32, orthonormal rows by falling singular value; zero rows past the rank.
    B: (..., D_out, r) float32, columns U_i * s_i, so `B @ A` is the expert's whole weight update.
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
    The D_out x D_in product is never formed: thin QR of both factors, then the SVD of the r x r
    core. Directions whose singular value is zero to float32 precision are not determined by the
    adapter; they become zero rows, so that padding an adapter's rank changes nothing.
    """
    A, B = lora_A.float(), lora_B.float()
    if isinstance(scaling, Tensor):
        scaling = scaling.float()[..., None, None]
    rank = A.shape[-2]
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(scaling * R_B @ R_A.mT, full_matrices=False)
    precision = torch.finfo(S.dtype).eps * max(A.shape[-1], B.shape[-2])
    S = torch.where(precision * S[..., :1] < S, S, torch.zeros_like(S))
    # Scaled and masked are the small factors, not the large products; and a product whose rows are
    # long takes a quarter of the time of its transpose.
    A_star = (Vh * (S > 0).unsqueeze(-1)) @ Q_A.mT
    B_star = ((U * S.unsqueeze(-2)).mT @ Q_B.mT).mT
    missing = rank - S.shape[-1]  # only where r exceeds D_in or D_out
    if missing > 0:
        A_star = torch.nn.functional.pad(A_star, (0, 0, 0, missing))
        B_star = torch.nn.functional.pad(B_star, (0, missing))
    return Aligned(A_star, B_star)


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
