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
request is for, and how much of the text each expert accounts for. The first is compared with that
of ordinary prompts (`standing`).

Axes: N tokens, R requests, P projections of a bank, E experts, r rank, k directions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spectr_demo.routing.bank import ExpertBank

_MOST_TOKENS = 2048  # for a covariance, whose cost is their number
_MOST_DIRECTIONS, _TURNS = 64, 4
_NOISE = 0.07  # standard deviations by which experts differ in ordinary text


@dataclass(frozen=True, kw_only=True)
class Metric:
    """`C^-1` of ordinary inputs (D_in,), as `scale * (I - directions diag(damping) directions^T)`.

    directions: (D_in, k) float32, orthonormal: the ones that ordinary text uses most. damping: (k,)
    float32, from 0 to 1. scale: () float32.
    """

    mean: Tensor
    directions: Tensor
    damping: Tensor
    scale: Tensor

    @classmethod
    def none(cls, D_in: int, device: torch.device) -> "Metric":
        """All directions are equally common."""
        return cls(
            mean=torch.zeros(D_in, device=device),
            directions=torch.zeros(D_in, 0, device=device),
            damping=torch.zeros(0, device=device),
            scale=torch.ones((), device=device),
        )

    @classmethod
    def of(cls, inputs: Tensor) -> "Metric":
        """From inputs (N, D_in) of ordinary text.

        Beside its k main directions the covariance counts as equal in all others (probabilistic
        PCA, Tipping & Bishop 1999). It is shrunk half way to the identity of its own size: N is not
        much larger than D_in, and what the base rarely says must not count for everything.
        """
        inputs = inputs[:: -(-len(inputs) // _MOST_TOKENS)].float()  # evenly, if they are more
        mean = inputs.mean(0)
        centred = inputs - mean
        directions, variances = _main_directions(centred)
        D_in, k = directions.shape
        total = centred.square().sum() / len(inputs)
        rest = (total - variances.sum()).clamp_min(0) / max(1, D_in - k)
        # Inputs that are all alike tell nothing: then all directions are equally common.
        size = torch.where(total > 0, total / D_in, 1.0)
        damping = 1 - (rest + size) / (variances + size)
        return cls(
            mean=mean, directions=directions, damping=damping.clamp_min(0), scale=1 / (rest + size)
        )

    def to(self, device: torch.device) -> "Metric":
        """The same there. One that was kept on a disk is on the CPU."""
        if self.mean.device == device:
            return self
        return Metric(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def __call__(self, x: Tensor) -> Tensor:
        """`C^-1 x` of rows (..., D_in) float32."""
        return self.scale * (x - (x @ self.directions * self.damping) @ self.directions.T)


def _main_directions(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Those in which centred inputs (N, D_in) vary most, (D_in, k), and their variances (k,), by
    block power iteration, which begins at inputs taken evenly."""
    k = min(_MOST_DIRECTIONS, *centred.shape)
    start = torch.linspace(0, len(centred) - 1, k, device=centred.device).long()
    basis = torch.linalg.qr(centred[start].T).Q
    for _ in range(_TURNS):
        basis = torch.linalg.qr(centred.T @ (centred @ basis)).Q
    _, sizes, turn = torch.linalg.svd(centred @ basis, full_matrices=False)
    return basis @ turn.T, sizes.square() / len(centred)


@dataclass(frozen=True, kw_only=True)
class Detector:
    """What scores inputs at one bank.

    whitening: (P, E, r, r) float32, each expert's `L^-1`. mean, std: (P, E) float32 of the scores
    of ordinary tokens.
    """

    bank: ExpertBank
    metric: Metric
    whitening: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def of(
        cls,
        bank: ExpertBank,
        metric: Metric,
        mean: Tensor,
        std: Tensor,
        *,
        whitening: Tensor | None = None,
    ) -> "Detector":
        """One of whose scores mean and deviation (P, E) over ordinary text are known. whitening:
        where it is known too; None makes it of the bank's factors."""
        if whitening is None:
            P, E, r = bank.singular_values.shape
            A = bank.A.float()
            whitening = _whitening(metric(A).view(P, E, r, -1) @ A.view(P, E, r, -1).mT)
        return cls(bank=bank, metric=metric, whitening=whitening, mean=mean, std=std)

    @classmethod
    def standardised(cls, bank: ExpertBank, metric: Metric, inputs: Tensor) -> "Detector":
        """One whose scores have mean 0 and deviation 1 over inputs (N, D_in)."""
        zeros = torch.zeros(bank.singular_values.shape[:2], device=bank.A.device)
        plain = cls.of(bank, metric, zeros, zeros + 1)
        std, mean = torch.std_mean(plain.scores(inputs), dim=0, correction=0)
        # An expert that never responds has no deviation, and its scores stay 0.
        return replace(plain, mean=mean, std=torch.where(std <= 1e-6 * mean + 1e-12, 1.0, std))

    def scores(self, x: Tensor) -> Tensor:
        """(..., P, E) float32 from inputs (..., D_in): 0 for the mean of ordinary tokens, in their
        standard deviations."""
        z = self.bank.project(self.metric(x.float() - self.metric.mean)).float()
        lengths = torch.linalg.vector_norm(
            torch.einsum("peij,...pej->...pei", self.whitening, z), dim=-1
        )
        return (lengths - self.mean) / self.std


def detector(bank: ExpertBank, inputs: Tensor) -> Detector:
    """The detector of a bank, from inputs (N, D_in) of ordinary text at its layers."""
    return Detector.standardised(bank, Metric.of(inputs), inputs)


def _whitening(gram: Tensor) -> Tensor:
    """`L^-1` with `L L^T = gram` (..., r, r); a direction that an expert does not have stays 0."""
    values, vectors = torch.linalg.eigh(gram.double())
    is_direction = values > 1e-6 * values[..., -1:].clamp_min(1e-30)
    scale = torch.where(is_direction, values.clamp_min(1e-30).rsqrt(), 0)
    return (scale[..., None] * vectors.mT).float()


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


def standing(certainty: Tensor, ordinary: Tensor) -> Tensor:
    """How far each expert's certainty of a request is above that of ordinary prompts, in its own
    standard deviations over them: (..., E) from (..., E) and (R, E) of R ordinary prompts.

    What an expert answers to in any text is so left out. And one on a few layers is no more often
    chosen, though the mean over them differs more from prompt to prompt.
    """
    std, mean = torch.std_mean(ordinary, dim=0, correction=0)
    return (certainty - mean) / torch.where(std > 1e-6, std, 1.0)


def mean_certainty(
    by_layer: Mapping[ExpertBank, Tensor], num_requests: int, expert_layers: Tensor
) -> Tensor:
    """(R, E), the mean over each expert's layers, from the certainty (R, P, E) at each bank.

    expert_layers: (E,) number of linear layers that each expert has.
    """
    total = torch.zeros(num_requests, len(expert_layers))
    for bank, of_layers in by_layer.items():
        total[:, bank.expert_ids] += of_layers.sum(1)
    return total / expert_layers


def mean_of_tokens(values: Tensor, weights: Tensor, owners: Tensor, num_requests: int) -> Tensor:
    """(R, ...) from values (N, ...) of the tokens, with weights (N,) that sum to 1 over a request.
    owners: (N,) int64, the request of each."""
    weights = weights.to(values).view(-1, *[1] * (values.dim() - 1))
    total = values.new_zeros(num_requests, *values.shape[1:])
    return total.index_add_(0, owners.to(values.device), values * weights)


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
        self.by_layer[bank] = certainty(self.late_means(scores)).cpu()
        explained = self._mean(certainty(scores).sum(1), self._whole)
        self._explained[:, bank.expert_ids] += explained.cpu()

    def late_means(self, scores: Tensor) -> Tensor:
        """(R, P, E) of each request's tokens, late ones first, from scores (N, P, E)."""
        return self._mean(scores, self._late)

    def _mean(self, values: Tensor, weights: Tensor) -> Tensor:
        return mean_of_tokens(values, weights, self._owners, self._num_requests)

    @property
    def certainty(self) -> Tensor:
        """(R, E): how sure the layers are, in the mean, that a request is for each expert. Of the
        mean scores of the tokens, late ones first: at its end a request is known best."""
        return mean_certainty(self.by_layer, self._num_requests, self._expert_layers)

    @property
    def explained(self) -> Tensor:
        """(R, E): how much of the text each expert accounts for: the mean certainty of its tokens,
        each by itself. Requests of two experts in one text have less than each has alone."""
        return self._explained / self._expert_layers
