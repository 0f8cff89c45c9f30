"""Evidence pooled over the text so far: what one token in one layer cannot tell, its context can.

Each token votes in each layer for one expert: the one with the best score there. It votes with that
score, if the score is positive. The evidence for an expert is the weighted mean of its votes, over
the tokens up to now and the layers up to here. A vote that is n tokens old weighs `decay ** n`. A
vote in a layer weighs the square root of the layer's depth, since later layers know more of the
text.

Axes: R rows, T tokens of this pass, P projections of a bank, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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

    The best experts of all lines are equally good. Their evidence is the mean of what these lines
    give their best. Any other expert is as far behind as in the line that it is nearest in. A line
    in which no expert leads by more than `least` has no say, unless this is so in all of them. One
    line keeps its evidence.
    """
    if least is not None:
        names_one = lead(evidence).amax(-1) > least
        evidence = evidence[names_one] if names_one.any() else evidence[-1:]
    best = evidence.amax(-1, keepdim=True)
    return (evidence + (best.mean() - best)).amax(0)


@dataclass(frozen=True)
class Start:
    """What a first reading of a text gave, from which a second one starts: votes, already weighted,
    and their weights, (R, 1, E) float32 each."""

    votes: Tensor
    weights: Tensor


@dataclass
class Pass:
    """What the tokens of one forward pass count, the same in every layer.

    counts: (R, T, 1), 1 for a token that votes and 0 for one that does not; None is 1 for all.
    is_newline: (R, T) bool, tokens at which a line ends; None is none. token_weight: (R, T, 1)
    decayed number of the tokens that voted. num_counted: (R, T, 1) how many of them there are in
    this line; first_weight: (R, T, E) what the first reading still weighs; both None without one.
    total: (R, T, E) weighted votes of the first reading and of the layers so far.
    """

    counts: Tensor | None
    is_newline: Tensor | None
    token_weight: Tensor
    num_counted: Tensor | None
    first_weight: Tensor | None
    total: Tensor


class EvidencePool:
    """The votes of a batch of texts, read in one pass or in several.

    The state is a sum for each row, layer and expert. A text read at once and the same tokens read
    one by one therefore give the same evidence.

    A prompt may be read twice. What all layers know at the end of a first pool (`start`) is then
    where every layer of a second one starts from, so no layer is left that knows little. It fades
    as tokens come that vote. At the end of a line it counts in full again, and what was read since
    is forgotten: the next line may answer another request.
    """

    def __init__(
        self,
        decay: float,
        num_experts: int,
        is_evidence: Tensor | None = None,
        start: Start | None = None,
    ) -> None:
        """num_experts: of the library. is_evidence: (R, T) bool, False for the first T tokens that
        do not vote (padding, the opening of the chat template, what was read before); all later
        ones do. start: of a first reading."""
        self.decay = decay
        self._num_experts = num_experts
        self._is_evidence = is_evidence
        self._start = start
        self._num_read = 0  # tokens of the passes that have begun
        self._pass: Pass | None = None
        self._sums: dict[ExpertBank, Tensor] = {}  # (R, 1, P, E) votes up to the last token read
        self._depths: dict[ExpertBank, tuple[Tensor, Tensor]] = {}  # see `depth_weights`
        self._depth_weight = torch.zeros(num_experts, dtype=torch.float32)  # (E,) of layers seen

    def begin_pass(
        self,
        num_rows: int,
        num_tokens: int,
        *,
        is_newline: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        """The layers read the next tokens of all rows. is_newline: (R, T) bool, the tokens at which
        a line ends; without a first reading there is nothing to return to, and it has no meaning.
        device: where the first layers are; the evidence stays there."""
        before, is_newline = self._pass, None if self._start is None else is_newline
        counts = self._counts(num_rows, num_tokens, is_newline, device)
        float32: dict[str, Any] = {"dtype": torch.float32, "device": device}
        ones = torch.ones(num_rows, num_tokens, 1, **float32) if counts is None else counts
        token_weight = running_sums(
            ones, None if before is None else before.token_weight[:, -1:], self.decay, is_newline
        )
        num_counted = first_weight = None
        if self._start is None:
            total = torch.zeros(num_rows, num_tokens, self._num_experts, **float32)
        else:
            known = None if before is None else before.num_counted
            known = None if known is None else known[:, -1:]
            num_counted = running_sums(ones, known, 1.0, is_newline)
            faded = self.decay**num_counted
            total, first_weight = faded * self._start.votes, faded * self._start.weights
        self._num_read += num_tokens
        self._pass = Pass(
            counts=counts,
            is_newline=is_newline,
            token_weight=token_weight.clamp(min=_LEAST_WEIGHT),
            num_counted=num_counted,
            first_weight=first_weight,
            total=total,
        )

    def _counts(
        self,
        num_rows: int,
        num_tokens: int,
        is_newline: Tensor | None,
        device: torch.device | None,
    ) -> Tensor | None:
        counts = None
        if self._is_evidence is not None and self._num_read < self._is_evidence.shape[1]:
            counts = torch.ones(num_rows, num_tokens, 1, dtype=torch.float32, device=device)
            known = self._is_evidence[:, self._num_read : self._num_read + num_tokens, None]
            counts[:, : known.shape[1]] = known.to(counts)
        if is_newline is None:
            return counts
        inside = (~is_newline[..., None]).float()  # a newline speaks for no line
        return inside if counts is None else counts * inside

    @property
    def current(self) -> Pass:
        """Of the pass that has begun last."""
        if self._pass is None:
            raise ValueError("no pass has begun; call `begin_pass` before the layers read")
        return self._pass

    @property
    def latest(self) -> Tensor:
        """(R, E): the evidence at the last token read, from all layers."""
        return self.current.total[:, -1] / self._latest_weights().clamp(min=_LEAST_WEIGHT)

    def _latest_weights(self) -> Tensor:
        weight = self.current.token_weight[:, -1]
        return weight * self._depth_weight.to(weight.device)

    def start(self, num_lines: Sequence[int] | None = None, least: float | None = None) -> Start:
        """What a second reading starts from. num_lines: of each text, how many of this pool's rows
        are its lines, which become one row (see `of_lines`); None is one each."""
        num_lines = list(num_lines or [1] * len(self.latest))
        lines = self.latest.split(num_lines)
        evidence = torch.stack([of_lines(each, least) for each in lines])[:, None]
        weights = self._latest_weights().split(num_lines)
        weight = torch.stack([each[-1] for each in weights])[:, None]
        return Start(evidence * weight, weight)

    def add(self, bank: ExpertBank, scores: Tensor) -> Tensor:
        """Add the votes of a bank's layers in this pass, from their scores (R, T, P, E).

        Returns the evidence there, same shape; 0 for an expert that nothing speaks for.
        """
        now = self.current
        # On a base that is spread over devices, the evidence stays where the first layers are.
        here, scores = scores.device, scores.to(now.total.device)
        best = scores.amax(-1, keepdim=True)
        votes = (scores == best) * best.clamp(min=0)
        if now.counts is not None:
            votes = votes * now.counts[..., None]
        sums = running_sums(votes, self._sums.get(bank), self.decay, now.is_newline)
        # Of a longer pass a copy: a view would keep all tokens' sums.
        self._sums[bank] = sums if sums.shape[1] == 1 else sums[:, -1:].clone()
        weights, layers = self.depth_weights(bank)
        # A layer knows what the layers before it know, those of its own bank included.
        sums = (weights * sums).cumsum(2)
        first_weight = now.first_weight
        if bank.num_experts == self._num_experts:
            sums = sums.add_(now.total[..., None, :])
            now.total = sums[:, :, -1]
        else:
            ids = bank.expert_ids.to(scores.device)
            sums = sums.add_(now.total[..., None, ids])
            first_weight = None if first_weight is None else first_weight[..., ids]
            now.total[..., ids] = sums[:, :, -1]
        num = now.token_weight[..., None] * layers
        if first_weight is not None:
            num = num.add_(first_weight[..., None, :])
        return (sums / num).to(here)

    def token_sums(self, bank: ExpertBank) -> Tensor:
        """(R, 1, P, E) votes at a bank up to the last token read, for code that adds a token to
        them in place; zeros, kept, where there was none yet."""
        if bank not in self._sums:
            _, layers = self.depth_weights(bank)
            num_rows = len(self.current.total)
            self._sums[bank] = torch.zeros(num_rows, 1, *layers.shape, dtype=torch.float32)
        return self._sums[bank]

    def depth_weights(self, bank: ExpertBank) -> tuple[Tensor, Tensor]:
        """What a vote weighs in each of the bank's layers, (P, 1). And (P, E): for each expert, the
        sum of these weights from the first layer up to each of them."""
        if bank not in self._depths:
            device = self.current.total.device
            weights = (torch.tensor(bank.layers, device=device) + 1).sqrt()[:, None]
            before = self._depth_weight.to(device)[bank.expert_ids.to(device)]
            layers = weights.cumsum(0) + before
            self._depth_weight[bank.expert_ids] = layers[-1].cpu()
            self._depths[bank] = weights, layers
        return self._depths[bank]


def running_sums(
    values: Tensor, before: Tensor | None, decay: float, is_newline: Tensor | None
) -> Tensor:
    """Decayed running sums over the tokens of a line: (R, T, ...), from values (R, T, ...).

    before: (R, 1, ...), the sum so far. is_newline: (R, T) bool, where a sum starts anew.
    """
    if values.shape[1] == 1:
        if before is None or is_newline is None:
            return values if before is None else values.add(before, alpha=decay)
        before = before.masked_fill(is_newline.view(-1, *[1] * (before.dim() - 1)), 0)
        return values.add(before, alpha=decay)
    shape, parts = values.shape, []
    values = values.flatten(2)
    before = None if before is None else before.flatten(2)
    line = None if is_newline is None else is_newline.cumsum(1)
    line_before = torch.tensor(0) if line is None else torch.zeros_like(line[:, :1])
    for start in range(0, shape[1], _TOKENS_AT_ONCE):
        part = values[:, start : start + _TOKENS_AT_ONCE]
        steps = torch.arange(part.shape[1], device=values.device)
        age = steps[:, None] - steps
        weights = torch.where(age >= 0, decay ** age.clamp(min=0), 0).to(values)
        weights_before = (decay ** (steps + 1)).to(values)[:, None]
        if line is not None:
            lines = line[:, start : start + _TOKENS_AT_ONCE]
            weights = weights * (lines[:, :, None] == lines[:, None])
            weights_before = weights_before * lines.eq(line_before)[..., None]
            line_before = lines[:, -1:]
        sums = weights @ part
        if before is not None:
            sums = sums + weights_before * before
        parts.append(sums)
        before = sums[:, -1:]
    return torch.cat(parts, dim=1).view(shape)
