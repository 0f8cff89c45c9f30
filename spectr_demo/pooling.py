"""Evidence pooled over the text so far: what one token in one layer cannot tell, its context can.

Axes: R rows, T tokens of this pass, P projections of a bank, E experts.
"""

import torch
from torch import Tensor

from spectr_demo.bank import ExpertBank

_TOKENS_AT_ONCE = 256  # of a long prompt: the matrix that decays them is this number squared


class EvidencePool:
    """Scores averaged over the tokens up to now and the linear layers up to here.

    A token in a layer speaks for one expert: the one with the best score there, by that score, if
    it is positive. A token that is n tokens back counts `decay ** n`, and a layer by the square
    root of its depth, since later ones know more of the text. The state is a sum for each row,
    layer and expert, so a text read at once and the same tokens read one by one give the same
    evidence.

    A prompt may be read twice: the first reading gives what all layers know of it, from which the
    second one starts (`read_again`). There is then no layer that knows little.
    """

    def __init__(self, decay: float, num_experts: int, is_evidence: Tensor | None) -> None:
        """num_experts: of the library. is_evidence: (R, T) bool, False where a token says nothing
        (padding, the opening of the chat template); all tokens after these T count."""
        self._decay = decay
        self._num_experts = num_experts
        self._weights: dict[ExpertBank, Tensor] = {}
        self._first: tuple[Tensor, Tensor] | None = None  # sums (R, 1, E) and their weights
        self._restart(is_evidence)

    def _restart(self, is_evidence: Tensor | None) -> None:
        self._is_evidence = is_evidence
        self._num_read = 0  # tokens of the passes that have ended
        self._first_bank: ExpertBank | None = None
        self._sums: dict[ExpertBank, Tensor] = {}  # (R, 1, P, E) up to the last token read
        self._token_weight: Tensor | None = None  # (R, T, 1) decayed number of tokens that count
        self._num_counted: Tensor | None = None  # (R, T, 1) tokens that counted, up to each
        self._total = self._layer_weight = torch.empty(0)  # (R, T, E) and (E,), of this pass
        self._first_weight: Tensor | None = None  # (R, T, E) of the first reading, by now

    def read_again(self, is_evidence: Tensor) -> None:
        """Begin the second reading of what was read, with the evidence of all layers so far.

        is_evidence: as above; False for the tokens already read, which count no second time. The
        first reading fades as tokens come that count.
        """
        if self._token_weight is not None:
            weight = self._token_weight[:, -1:] * self._layer_weight
            self._first = self._total[:, -1:].clone(), weight
        self._restart(is_evidence)

    @property
    def latest(self) -> Tensor:
        """(R, E): the evidence at the last token read, from all layers."""
        assert self._token_weight is not None
        weights = self._token_weight[:, -1] * self._layer_weight
        return self._total[:, -1] / weights.clamp(min=1e-12)

    def add(self, bank: ExpertBank, scores: Tensor) -> Tensor:
        """Add the scores (R, T, P, E) of a bank's layers; return the pooled ones, same shape; 0 for
        an expert that nothing speaks for."""
        if self._first_bank is None or bank is self._first_bank:
            self._first_bank = bank
            self._start_pass(scores)
        is_best = scores == scores.amax(-1, keepdim=True)
        scores = torch.where(is_best, scores, 0).clamp(min=0)
        if self._counts is not None:
            scores = scores * self._counts[..., None]
        sums = self._over_tokens(scores, self._sums.get(bank))
        self._sums[bank] = sums[:, -1:].clone()  # not a view that keeps all tokens' sums
        weights = self._depth_weights(bank)
        # A layer knows what the layers before it know, those of its own bank included.
        sums = (weights[:, None] * sums).cumsum(2)
        layers = weights.cumsum(0)[:, None]
        ids: Tensor | slice = slice(None)
        if len(bank.expert_ids) < self._num_experts:
            ids = bank.expert_ids.to(scores.device)
        sums = sums + self._total[..., None, ids]
        layers = layers + self._layer_weight[ids]
        self._total[..., ids], self._layer_weight[ids] = sums[:, :, -1], layers[-1]
        assert self._token_weight is not None
        num = self._token_weight[..., None] * layers
        if self._first_weight is not None:
            num = num + self._first_weight[..., None, ids]
        return sums / num.clamp(min=1e-12)

    def _depth_weights(self, bank: ExpertBank) -> Tensor:
        """(P,) of the bank's layers in the average over layers."""
        if bank not in self._weights:
            depth = torch.tensor(bank.layers, device=bank.A.device) + 1
            self._weights[bank] = depth.sqrt()
        return self._weights[bank]

    def _start_pass(self, scores: Tensor) -> None:
        R, T, *_ = scores.shape
        start, self._num_read = self._num_read, self._num_read + T
        self._counts = None
        if self._is_evidence is not None and start < self._is_evidence.shape[1]:
            self._counts = scores.new_ones(R, T, 1)
            known = self._is_evidence[:, start : start + T, None]
            self._counts[:, : known.shape[1]] = known.to(scores)
        counts = scores.new_ones(R, T, 1) if self._counts is None else self._counts
        before = None if self._token_weight is None else self._token_weight[:, -1:]
        self._token_weight = self._over_tokens(counts, before)
        self._layer_weight = scores.new_zeros(self._num_experts)
        if self._first is None:
            self._total = scores.new_zeros(R, T, self._num_experts)
            return
        num_counted = counts.cumsum(1)
        if self._num_counted is not None:
            num_counted = num_counted + self._num_counted[:, -1:]
        self._num_counted = num_counted
        total, weight = self._first
        faded = self._decay**num_counted
        self._total, self._first_weight = faded * total, faded * weight

    def _over_tokens(self, values: Tensor, before: Tensor | None) -> Tensor:
        """Decayed running sums over tokens, (R, T, ...); `before` (R, 1, ...) is the sum so far."""
        T = values.shape[1]
        if T == 1:
            return values if before is None else values + self._decay * before
        parts, shape = [], values.shape
        values = values.flatten(2)
        before = None if before is None else before.flatten(2)
        for start in range(0, T, _TOKENS_AT_ONCE):
            part = values[:, start : start + _TOKENS_AT_ONCE]
            steps = torch.arange(part.shape[1], device=values.device)
            age = steps[:, None] - steps
            decay = torch.where(age >= 0, self._decay ** age.clamp(min=0), 0).to(values)
            sums = decay @ part
            if before is not None:
                sums = sums + (self._decay ** (steps + 1)).to(values)[:, None] * before
            parts.append(sums)
            before = sums[:, -1:]
        return torch.cat(parts, dim=1).view(shape)
