"""Calibration: each expert's scores at each layer, brought to one scale by text of no domain.

An expert whose weights respond to everything wins too often, and layers differ in size. Scores are
standardised by their mean and standard deviation over ordinary chat (the idea is SEQR's, arXiv
2509.18093; the text is in `assets/generic_text.json`). No domain data is seen, nothing is trained.
"""

import json

import torch
from torch import Tensor

from spectr_demo.bank import ExpertBank
from spectr_demo.config import ASSETS, RouterConfig
from spectr_demo.experts import ExpertLibrary
from spectr_demo.layers import routed
from spectr_demo.loading import LoadedBase
from spectr_demo.prompts import encode, shared_length, template_opening
from spectr_demo.routing import STANDARDISED, Calibration, Listening

GENERIC_TEXT = ASSETS / "generic_text.json"
_ROWS_AT_ONCE = 8


def generic_prompts() -> list[str]:
    """Ordinary chat that belongs to no expert's domain."""
    return list(json.loads(GENERIC_TEXT.read_bytes())["calibration"])


class _Statistics(Listening):
    """Sums the scores of the tokens that count."""

    def __init__(self, is_evidence: Tensor, totals: dict[ExpertBank, Tensor]) -> None:
        super().__init__()
        self._is_evidence = is_evidence
        self._totals = totals

    def listen(self, bank: ExpertBank, x: Tensor) -> None:
        z = bank.project(x)
        config = RouterConfig(name="spectr")
        scores = torch.stack([f(z, bank.singular_values, config) for f in STANDARDISED])
        is_evidence = self._is_evidence.to(z.device)[..., None, None]
        scores = torch.where(is_evidence, scores, 0).double()  # (S, R, T, P, E)
        sums = torch.stack([scores.sum((1, 2)), scores.square().sum((1, 2))], dim=1)
        self._totals[bank] = self._totals.get(bank, 0) + sums


def calibrate(base: LoadedBase, library: ExpertLibrary) -> Calibration:
    """Read the generic prompts as the bare base does, and listen to every expert at every layer."""
    tokenizer, totals = base.tokenizer, dict[ExpertBank, Tensor]()
    opening = template_opening(tokenizer)
    texts = [encode(tokenizer, prompt) for prompt in generic_prompts()]
    texts.sort(key=len)
    decoder, device = base.model.get_decoder(), base.device
    num_tokens = 0
    for start in range(0, len(texts), _ROWS_AT_ONCE):
        rows = texts[start : start + _ROWS_AT_ONCE]
        width = max(map(len, rows))
        # Padding on the right needs no mask of attention: nothing looks ahead.
        input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        is_evidence = torch.tensor(
            [[shared_length(opening, row) <= t < len(row) for t in range(width)] for row in rows]
        )
        num_tokens += int(is_evidence.sum())
        with torch.inference_mode(), routed(_Statistics(is_evidence.to(device), totals)):
            decoder(input_ids=input_ids.to(device), use_cache=False)
    statistics = {}
    for bank, sums in totals.items():
        mean, of_squares = (sums / num_tokens).unbind(1)
        variance = (of_squares - mean.square()).clamp(min=0)
        # An expert that never responds has no deviation, and its scores stay 0.
        is_flat = variance <= (1e-6 * mean).square() + 1e-24
        std = torch.where(is_flat, 1.0, variance.sqrt())
        statistics[bank] = torch.stack([mean, std], dim=1).float()  # (S, 2, P, E)
    return Calibration(statistics)
