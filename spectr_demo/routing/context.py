"""Evidence pooled over the text so far: what one token in one layer cannot tell, its context can.

Axes: R rows, T tokens of this pass, P projections of a bank, E experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectr_demo.cpu.token import Pool
from spectr_demo.routing.bank import ExpertBank

_TOKENS_AT_ONCE = 256  # of a long prompt: the matrix that decays them is this number squared
_LEAST_WEIGHT = 1e-12  # of no token at all, so that nothing is divided by zero


def lead(evidence: Tensor) -> Tensor:
    """How far each expert stands out from the mean of all: (..., E), from evidence (..., E).

    What every expert responds to speaks for none of them. One expert alone keeps its evidence.
    """
    if evidence.shape[-1] == 1:
        return evidence
    return evidence - evidence.mean(-1, keepdim=True)


def of_lines(evidence: Tensor, least: float | None) -> Tensor:
    """What the lines of a request ask for together: (E,), from the evidence of each (L, E).

    The best experts of all lines are equally good, at the mean of what these lines give their best;
    any other is as far behind as in the line that it is nearest in. Lines in which no expert leads
    by more than `least` have no say, unless none does. One line keeps its evidence.
    """
    if least is not None:
        names_one = lead(evidence).amax(-1) > least
        evidence = evidence[names_one] if names_one.any() else evidence[-1:]
    best = evidence.amax(-1, keepdim=True)
    return (evidence + (best.mean() - best)).amax(0)


class EvidencePool:
    """Scores averaged over the tokens up to now and the linear layers up to here.

    A token in a layer speaks for one expert: the one with the best score there, by that score, if
    it is positive. A token that is n tokens back counts `decay ** n`, and a layer by the square
    root of its depth, since later ones know more of the text. The state is a sum for each row,
    layer and expert, so a text read at once and the same tokens read one by one give the same
    evidence.

    A prompt may be read twice: the first reading gives what all layers know of it, from which the
    second one starts (`read_again`), and each line of the answer anew (`begin_lines`). There is
    then no layer that knows little.
    """

    def __init__(self, decay: float, num_experts: int, is_evidence: Tensor | None) -> None:
        """num_experts: of the library. is_evidence: (R, T) bool, False where a token says nothing
        (padding, the opening of the chat template); all tokens after these T count."""
        self._decay = decay
        self._num_experts = num_experts
        self._layers: dict[ExpertBank, tuple[Tensor, Tensor]] = {}  # see `_weights_of`
        self._layer_weight = torch.zeros(num_experts)  # (E,) of all layers seen
        self._first: tuple[Tensor, Tensor] | None = None  # sums (R, 1, E) and their weights
        self._restart(is_evidence)

    def _restart(self, is_evidence: Tensor | None) -> None:
        self._is_evidence = is_evidence
        self._num_read = 0  # tokens of the passes that have ended
        self._first_bank: ExpertBank | None = None
        self._sums: dict[ExpertBank, Tensor] = {}  # (R, 1, P, E) up to the last token read
        # The same and the rest of the state as arrays, of this pass and of each bank.
        self._pass: tuple[Any, ...] = ()
        self._bank_state: dict[ExpertBank, tuple[Any, ...]] = {}
        self._token_weight: Tensor | None = None  # (R, T, 1) decayed number of tokens that count
        self._num_counted: Tensor | None = None  # (R, T, 1) those of the line that counted
        self._total = torch.empty(0)  # (R, T, E) of the layers so far in this pass
        self._is_newline: Tensor | None = None  # (R, T) bool
        self._first_weight: Tensor | None = None  # (R, T, E) of the first reading, by now

    def read_again(
        self,
        is_evidence: Tensor,
        num_lines: Sequence[int] | None = None,
        least: float | None = None,
    ) -> None:
        """Begin the second reading of what was read, with the evidence of all layers so far.

        is_evidence: as above; False for the tokens already read, which count no second time. The
        first reading fades as tokens come that count. num_lines: how many rows of the first reading
        are lines of one request, which is one row now (see `of_lines`); None is one each.
        """
        if self._token_weight is not None:
            num_lines = num_lines or [1] * len(self._total)
            weight = self._token_weight[:, -1] * self._layer_weight.to(self._total.device)
            parts = self.latest.split(list(num_lines)), weight.split(list(num_lines))
            lines = zip(*parts, strict=True)
            first = [(of_lines(evidence, least), weight[-1]) for evidence, weight in lines]
            evidence, weight = (torch.stack(part).unsqueeze(1) for part in zip(*first, strict=True))
            self._first = evidence * weight, weight
        self._restart(is_evidence)

    def begin_lines(self, is_newline: Tensor) -> None:
        """Of a second reading: is_newline (R, T) bool, the tokens of the next pass at which a line
        ends. What was read after the prompt is forgotten there, and the first reading counts in
        full: the next line may answer another request."""
        if self._first is not None:
            self._is_newline = is_newline

    @property
    def latest(self) -> Tensor:
        """(R, E): the evidence at the last token read, from all layers."""
        assert self._token_weight is not None
        weights = self._token_weight[:, -1] * self._layer_weight.to(self._total.device)
        return self._total[:, -1] / weights.clamp(min=_LEAST_WEIGHT)

    def add(self, bank: ExpertBank, scores: Tensor) -> Tensor:
        """Add the scores (R, T, P, E) of a bank's layers; return the pooled ones, same shape; 0 for
        an expert that nothing speaks for."""
        if self._begins_pass(bank):
            self._start_pass(scores)
        # On a base that is spread over devices, the evidence stays where the first layers are.
        here, scores = scores.device, scores.to(self._total.device)
        best = scores.amax(-1, keepdim=True)
        spoken = (scores == best) * best.clamp(min=0)
        if self._counts is not None:
            spoken = spoken * self._counts[..., None]
        sums = self._over_tokens(spoken, self._sums.get(bank))
        # Of a longer pass a copy: a view would keep all tokens' sums.
        self._bank_state.pop(bank, None)
        self._sums[bank] = sums if sums.shape[1] == 1 else sums[:, -1:].clone()
        weights, layers = self._weights_of(bank)
        # A layer knows what the layers before it know, those of its own bank included.
        sums = (weights * sums).cumsum(2)
        if bank.num_experts == self._num_experts:
            sums, first_weight = sums.add_(self._total[..., None, :]), self._first_weight
            self._total = sums[:, :, -1]
        else:
            ids = bank.expert_ids.to(scores.device)
            sums = sums.add_(self._total[..., None, ids])
            first_weight = None if self._first_weight is None else self._first_weight[..., ids]
            self._total[..., ids] = sums[:, :, -1]
        assert self._token_weight is not None
        num = self._token_weight[..., None] * layers
        if first_weight is not None:
            num = num.add_(first_weight[..., None, :])
        return (sums / num).to(here)

    def of_token(self, bank: ExpertBank, num_rows: int, *, is_lead: bool) -> Pool:
        """The state that compiled code needs to `add` the scores of one token on a CPU."""
        if self._begins_pass(bank):
            self._start_pass(torch.empty(num_rows, 1, 0))
            counts = torch.ones(num_rows, 1, 1) if self._counts is None else self._counts
            first = self._first_weight
            first = torch.zeros_like(self._total) if first is None else first
            assert self._token_weight is not None
            self._pass = (
                self._keeps(num_rows).numpy(),
                counts[:, 0, 0].numpy(),
                self._token_weight[:, 0, 0].numpy(),
                first[:, 0].numpy(),
                self._total[:, 0].numpy(),
            )
        if bank not in self._bank_state:
            weights, layers = self._weights_of(bank)
            if bank not in self._sums:
                self._sums[bank] = torch.zeros(num_rows, 1, *layers.shape)
            self._bank_state[bank] = (
                self._sums[bank][:, 0].numpy(),
                weights[:, 0].numpy(),
                layers.numpy(),
                bank.expert_ids.numpy(),
                is_lead,
            )
        return Pool(*self._pass, *self._bank_state[bank])

    def _weights_of(self, bank: ExpertBank) -> tuple[Tensor, Tensor]:
        """Weights (P, 1) of the bank's layers in the average over layers; and (P, E), for each
        expert, their sum from the first layer up to each of these."""
        if bank not in self._layers:
            device = self._total.device
            weights = (torch.tensor(bank.layers, device=device) + 1).sqrt()[:, None]
            before = self._layer_weight.to(device)[bank.expert_ids.to(device)]
            layers = weights.cumsum(0) + before
            self._layer_weight[bank.expert_ids] = layers[-1].cpu()
            self._layers[bank] = weights, layers
        return self._layers[bank]

    def _begins_pass(self, bank: ExpertBank) -> bool:
        if self._first_bank is None:
            self._first_bank = bank
        return bank is self._first_bank

    def _start_pass(self, scores: Tensor) -> None:
        R, T, *_ = scores.shape
        start, self._num_read = self._num_read, self._num_read + T
        self._counts = None
        if self._is_evidence is not None and start < self._is_evidence.shape[1]:
            self._counts = scores.new_ones(R, T, 1)
            known = self._is_evidence[:, start : start + T, None]
            self._counts[:, : known.shape[1]] = known.to(scores)
        if self._is_newline is not None:  # such a token speaks for no line
            inside = (~self._is_newline[..., None]).to(scores)
            self._counts = inside if self._counts is None else self._counts * inside
        counts = scores.new_ones(R, T, 1) if self._counts is None else self._counts
        before = None if self._token_weight is None else self._token_weight[:, -1:]
        self._token_weight = self._over_tokens(counts, before).clamp(min=_LEAST_WEIGHT)
        if self._first is None:
            self._total = scores.new_zeros(R, T, self._num_experts)
            return
        before = None if self._num_counted is None else self._num_counted[:, -1:]
        num_counted = self._num_counted = self._over_tokens(counts, before, decay=1.0)
        total, weight = self._first
        faded = self._decay**num_counted
        self._total, self._first_weight = faded * total, faded * weight

    def _keeps(self, num_rows: int) -> Tensor:
        """(R,) what the tokens before the one of this pass still count at it."""
        keeps = torch.full((num_rows,), self._decay)
        return keeps if self._is_newline is None else keeps.where(~self._is_newline[:, 0], 0)

    def _over_tokens(
        self, values: Tensor, before: Tensor | None, decay: float | None = None
    ) -> Tensor:
        """Decayed running sums over the tokens of a line, (R, T, ...); `before` (R, 1, ...) is the
        sum so far. decay: None is the pool's."""
        decay, shape, is_newline = decay or self._decay, values.shape, self._is_newline
        if shape[1] == 1:
            if before is None or is_newline is None:
                return values if before is None else values.add(before, alpha=decay)
            before = before.masked_fill(is_newline.view(-1, *[1] * (before.dim() - 1)), 0)
            return values.add(before, alpha=decay)
        line = None if is_newline is None else is_newline.cumsum(1)
        parts = []
        values = values.flatten(2)
        before = None if before is None else before.flatten(2)
        line_before = 0 if line is None else torch.zeros_like(line[:, :1])
        for start in range(0, shape[1], _TOKENS_AT_ONCE):
            part = values[:, start : start + _TOKENS_AT_ONCE]
            steps = torch.arange(part.shape[1], device=values.device)
            age = steps[:, None] - steps
            weights = torch.where(age >= 0, decay ** age.clamp(min=0), 0).to(values)
            weights_before = (decay ** (steps + 1)).to(values)[:, None]
            if line is not None:
                lines = line[:, start : start + _TOKENS_AT_ONCE]
                weights = weights * (lines[:, :, None] == lines[:, None])
                weights_before = weights_before * (lines == line_before)[..., None]
                line_before = lines[:, -1:]
            sums = weights @ part
            if before is not None:
                sums = sums + weights_before * before
            parts.append(sums)
            before = sums[:, -1:]
        return torch.cat(parts, dim=1).view(shape)
