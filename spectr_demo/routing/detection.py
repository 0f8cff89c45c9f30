"""Which expert a request is for: SpectR's score, measured against ordinary text.

SpectR's score is the length of a token's projection on an expert's input subspace. It is a matched
subspace detector (Scharf & Friedlander 1994), and it is right where all directions are equally
common. In a language model they are not: a few directions carry most of every token. So inputs are
measured in the metric of ordinary text, which makes all directions equally common:

    score_e(x) = || L_e^-1 A_e C^-1 (x - m) ||        L_e L_e^T = A_e C^-1 A_e^T        (`detector`)

with the mean m and the covariance C of ordinary inputs of that layer. What remains is what the
expert responds to and ordinary text does not have. Each score is then standardised: 0 is the mean
of ordinary tokens, 1 their deviation.

At one token and layer, `certainty` says how far each expert stands out from the others. A request
has many tokens, read in many layers. Two means are made of them (`Evidence`): which expert the
request is for, and how much of the text each expert accounts for.

Axes: N tokens, R requests, P projections of a bank, E experts, r rank.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spectr_demo.routing.bank import ExpertBank

_MOST_TOKENS = 2048  # for a covariance, whose cost is their number
_NOISE = 0.07  # standard deviations by which experts differ in ordinary text


@dataclass(frozen=True, kw_only=True)
class Detector:
    """What scores inputs at one bank.

    input_mean: (D_in,) float32 of ordinary text. factors: (P * E * r, D_in) float32, each expert's
    `L^-1 A C^-1`. mean, std: (P, E) float32 of the scores of ordinary tokens.
    """

    input_mean: Tensor
    factors: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def standardised(
        cls, bank: ExpertBank, input_mean: Tensor, factors: Tensor, inputs: Tensor
    ) -> "Detector":
        """One whose scores have mean 0 and deviation 1 over inputs (N, D_in)."""
        P, E, _ = bank.singular_values.shape
        zeros = input_mean.new_zeros(P, E)
        plain = cls(input_mean=input_mean, factors=factors, mean=zeros, std=zeros + 1)
        std, mean = torch.std_mean(plain.scores(inputs), dim=0, correction=0)
        # An expert that never responds has no deviation, and its scores stay 0.
        return replace(plain, mean=mean, std=torch.where(std <= 1e-6 * mean + 1e-12, 1.0, std))

    def scores(self, x: Tensor) -> Tensor:
        """(..., P, E) float32 from inputs (..., D_in): 0 for the mean of ordinary tokens, in their
        standard deviations."""
        return (self._lengths(x) - self.mean) / self.std

    def _lengths(self, x: Tensor) -> Tensor:
        P, E = self.mean.shape
        z = (x.float() - self.input_mean) @ self.factors.T
        return torch.linalg.vector_norm(z.view(*x.shape[:-1], P, E, -1), dim=-1)


def detector(bank: ExpertBank, inputs: Tensor) -> Detector:
    """The detector of a bank, from inputs (N, D_in) of ordinary text at its layers.

    Their covariance is shrunk half way to the identity of its own size: N is not much larger than
    D_in, and what the base rarely says must not count for everything.
    """
    inputs = inputs[:: -(-len(inputs) // _MOST_TOKENS)].float()  # evenly, if they are more
    mean = inputs.mean(0)
    centred = inputs - mean
    covariance = centred.T @ centred / len(inputs)
    size = covariance.diagonal().mean()
    # Inputs that are all alike tell nothing: then all directions are equally common.
    covariance.diagonal().add_(torch.where(size > 0, size, 1.0))
    P, E, r = bank.singular_values.shape
    A = bank.A.float()
    matched = torch.cholesky_solve(A.T, torch.linalg.cholesky(covariance)).T  # A C^-1
    gram = matched.view(P, E, r, -1) @ A.view(P, E, r, -1).mT
    factors = _whitened(gram, matched.view(P, E, r, -1)).flatten(0, 2)
    return Detector.standardised(bank, mean, factors, inputs)


def _whitened(gram: Tensor, matched: Tensor) -> Tensor:
    """`L^-1 matched` with `L L^T = gram`; a direction that an expert does not have stays 0.

    gram: (..., r, r), matched: (..., r, D_in).
    """
    values, vectors = torch.linalg.eigh(gram.double())
    is_direction = values > 1e-6 * values[..., -1:].clamp_min(1e-30)
    scale = torch.where(is_direction, values.clamp_min(1e-30).rsqrt(), 0)
    return (scale[..., None] * vectors.mT).to(matched) @ matched


def certainty(scores: Tensor) -> Tensor:
    """How far each expert stands out from the mean of all, between -1 and 1: (..., E) from scores
    (..., E).

    It is the cosine between what the experts differ in and each of them, so one layer that responds
    strongly counts no more than another. Differences below `_NOISE` count less. One expert alone
    is compared with ordinary text, whose score is 0.
    """
    if scores.shape[-1] == 1:
        return certainty(torch.cat([scores, torch.zeros_like(scores)], -1))[..., :1]
    centred = scores - scores.mean(-1, keepdim=True)
    size = centred.square().sum(-1, keepdim=True) + scores.shape[-1] * _NOISE**2
    return centred / size.sqrt()


class Evidence:
    """What R requests tell, collected while a base reads them with a library of E experts."""

    def __init__(self, owners: Tensor, late: Tensor, whole: Tensor, expert_layers: Tensor) -> None:
        """owners: (N,) int64, the request that each token belongs to. late, whole: (N,) float32
        weights of the tokens in their request's two means; each sums to 1 over a request.
        expert_layers: (E,) number of linear layers that each expert has."""
        self._owners = owners
        self._late = late
        self._whole = whole
        self._num_requests = int(owners.max()) + 1
        self._expert_layers = expert_layers
        self._explained = torch.zeros(self._num_requests, len(expert_layers))
        self.by_layer: dict[ExpertBank, Tensor] = {}

    def add(self, bank: ExpertBank, scores: Tensor) -> None:
        """scores: (N, P, E) of the bank's detector."""
        self.by_layer[bank] = certainty(self._mean(scores, self._late)).cpu()
        explained = self._mean(certainty(scores).sum(1), self._whole)
        self._explained[:, bank.expert_ids] += explained.cpu()

    def _mean(self, values: Tensor, weights: Tensor) -> Tensor:
        """(R, ...) from values (N, ...) of the tokens."""
        weights = weights.to(values).view(-1, *[1] * (values.dim() - 1))
        total = values.new_zeros(self._num_requests, *values.shape[1:])
        return total.index_add_(0, self._owners.to(values.device), values * weights)

    @property
    def certainty(self) -> Tensor:
        """(R, E): how sure the layers are, in the mean, that a request is for each expert. Of the
        mean scores of the tokens, late ones first: at its end a request is known best."""
        total = torch.zeros_like(self._explained)
        for bank, of_layers in self.by_layer.items():
            total[:, bank.expert_ids] += of_layers.sum(1)
        return total / self._expert_layers

    @property
    def explained(self) -> Tensor:
        """(R, E): how much of the text each expert accounts for: the mean certainty of its tokens,
        each by itself. Requests of two experts in one text have less than each has alone."""
        return self._explained / self._expert_layers
