"""Evidence pooled over the text so far: what one token in one layer cannot tell, its context can.

Axes: R rows, T tokens of this pass, E experts of a layer.
"""

import torch
from torch import Tensor

from spectr_demo.experts import LayerBank

_TOKENS_AT_ONCE = 256  # of a long prompt: the matrix that decays them is this number squared


class EvidencePool:
    """Scores averaged over the tokens up to now and the linear layers up to here.

    Evidence is never negative: what an expert responds to speaks for it, what it does not respond
    to says nothing. A token that is n tokens back counts `decay ** n`. The state is a sum for each
    row, layer and expert, so a prompt read at once and the same tokens read one by one give the
    same evidence.
    """

    def __init__(self, decay: float, num_experts: int, is_evidence: Tensor | None) -> None:
        """num_experts: of the library. is_evidence: (R, T) bool, False where a token of the prompt
        says nothing (padding, the opening of the chat template); all tokens after it count."""
        self._decay = decay
        self._num_experts = num_experts
        self._is_evidence = is_evidence
        self._num_read = 0  # tokens of the passes that have ended
        self._first_bank: LayerBank | None = None
        self._layer_sums: dict[LayerBank, Tensor] = {}  # (R, 1, E) up to the last token read
        self._token_weight: Tensor | None = None  # (R, T, 1) decayed number of tokens that count
        self._total = self._layer_weight = torch.empty(0)  # (R, T, E) and (E,), of this pass

    def add(self, bank: LayerBank, scores: Tensor, weight: float = 1.0) -> Tensor:
        """Add a layer's scores (R, T, E) of this pass; return the pooled ones, same shape.

        weight: of the layer in the average over layers. 0 for an expert that nothing speaks for.
        """
        if self._first_bank is None or bank is self._first_bank:
            self._first_bank = bank
            self._start_pass(scores)
        scores = scores.clamp(min=0)
        if self._counts is not None:
            scores = scores * self._counts
        sums = self._over_tokens(scores, self._layer_sums.get(bank))
        self._layer_sums[bank] = sums[:, -1:].clone()  # not a view that keeps all tokens' sums
        assert self._token_weight is not None
        if len(bank.expert_ids) == self._num_experts:
            self._total += weight * sums
            self._layer_weight += weight
            total, weights = self._total, self._layer_weight
        else:
            ids = bank.expert_ids.to(scores.device)
            self._total[..., ids] += weight * sums
            self._layer_weight[ids] += weight
            total, weights = self._total[..., ids], self._layer_weight[ids]
        return total / (self._token_weight.clamp(min=1e-12) * weights)

    def _start_pass(self, scores: Tensor) -> None:
        R, T, _ = scores.shape
        start, self._num_read = self._num_read, self._num_read + T
        self._counts = None
        if self._is_evidence is not None and start < self._is_evidence.shape[1]:
            self._counts = scores.new_ones(R, T, 1)
            known = self._is_evidence[:, start : start + T, None]
            self._counts[:, : known.shape[1]] = known.to(scores)
        counts = scores.new_ones(R, T, 1) if self._counts is None else self._counts
        before = None if self._token_weight is None else self._token_weight[:, -1:]
        self._token_weight = self._over_tokens(counts, before)
        self._total = scores.new_zeros(R, T, self._num_experts)
        self._layer_weight = scores.new_zeros(self._num_experts)

    def _over_tokens(self, values: Tensor, before: Tensor | None) -> Tensor:
        """Decayed running sums over tokens, (R, T, E); `before` (R, 1, E) is the sum so far."""
        T = values.shape[1]
        if T == 1:
            return values if before is None else values + self._decay * before
        parts = []
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
        return torch.cat(parts, dim=1)
