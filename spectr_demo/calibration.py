"""Calibration: each expert's scores at each layer, brought to one scale by text of no domain.

An expert whose weights respond to everything wins too often, and layers differ in size. Scores are
standardised by their mean and standard deviation over ordinary chat (the idea is SEQR's, arXiv
2509.18093; the text is in `assets/generic_text.json`). No domain data is seen, nothing is trained.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectr_demo.config import ASSETS, RouterConfig, cache_dir
from spectr_demo.experts import Adapter, ExpertLibrary, LayerBank
from spectr_demo.layers import routed
from spectr_demo.loading import LoadedBase
from spectr_demo.prompts import encode_answered, shared_length, template_opening
from spectr_demo.routing import STANDARDISED, Calibration, RoutingPlan

GENERIC_TEXT = ASSETS / "generic_text.json"
_VERSION = 2  # part of the cache key: raise it when the statistics change their meaning
_ROWS_AT_ONCE = 8
MIN_SPREAD = 0.25  # so that no single layer decides alone


def calibrate(base: LoadedBase, library: ExpertLibrary) -> Calibration:
    """The statistics of every expert on this base: from the cache, or from one reading.

    An expert's statistics depend on no other expert, so each is cached for itself. An unusable
    cache costs time, not the run.
    """
    text = GENERIC_TEXT.read_bytes()
    files = [_cache_file(base, adapter, text) for adapter in library.adapters]
    known = [_read(file, a) for file, a in zip(files, library.adapters, strict=True)]
    statistics = [expert for expert in known if expert is not None]
    if len(statistics) < len(known):
        statistics = _measure(base, library, json.loads(text)["calibration"])
        for file, expert in zip(files, statistics, strict=True):
            _write(file, expert)
    return Calibration(
        {
            path: torch.stack([statistics[e][path] for e in bank.expert_ids.tolist()], dim=-1).to(
                bank.A.device
            )
            for path, bank in library.banks.items()
        }
    )


class _Statistics(RoutingPlan):
    """A plan that adds nothing to the base and sums the scores of the tokens that count."""

    def __init__(self, is_evidence: Tensor, totals: dict[str, Tensor]) -> None:
        super().__init__([], [])
        self.is_base_only = False
        self._is_evidence = is_evidence
        self._totals = totals

    def delta(self, bank: LayerBank, x: Tensor) -> Tensor:
        z = bank.project(x)
        config = RouterConfig(name="spectr")
        scores = torch.stack([f(z, bank.singular_values, config) for f in STANDARDISED])
        scores = torch.where(self._is_evidence[..., None], scores, 0).double()  # (S, R, T, E)
        of_text = scores.sum(2)
        length = self._is_evidence.sum(1)[:, None]
        sums = (of_text.sum(1), scores.square().sum((1, 2)), (of_text.square() / length).sum(1))
        self._totals[bank.path] = self._totals.get(bank.path, 0) + torch.stack(sums, dim=1)
        return x.new_zeros(())


def _measure(
    base: LoadedBase, library: ExpertLibrary, exchanges: list[dict[str, str]]
) -> list[dict[str, Tensor]]:
    """Read the exchanges as the bare base does. For each expert, by layer path: (S, 3) float32."""
    tokenizer, totals = base.tokenizer, dict[str, Tensor]()
    opening = template_opening(tokenizer)
    texts = [encode_answered(tokenizer, e["prompt"], e["answer"]) for e in exchanges]
    texts.sort(key=len)
    decoder, device = base.model.get_decoder(), base.model.device
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
    experts: list[dict[str, Tensor]] = [{} for _ in library.adapters]
    for path, sums in totals.items():
        mean, of_squares, of_texts = (sums / num_tokens).unbind(1)
        variance = (of_squares - mean.square()).clamp(min=0)
        # An expert that never responds has no spread, and its scores stay 0.
        is_flat = variance <= (1e-6 * mean).square() + 1e-24
        std = torch.where(is_flat, 1.0, variance.sqrt())
        between = (of_texts - mean.square()).clamp(min=0) * (num_tokens / len(texts))
        spread = torch.where(is_flat, 1.0, between / std.square()).clamp(min=MIN_SPREAD)
        statistics = torch.stack([mean, std, spread], dim=1).float().cpu()  # (S, 3, E)
        for place, e in enumerate(library.banks[path].expert_ids.tolist()):
            experts[e][path] = statistics[..., place].contiguous()
    return experts


def _cache_file(base: LoadedBase, adapter: Adapter, text: bytes) -> Path:
    parts = [base.fingerprint, base.quantization, str(base.compute_dtype), adapter.sha256]
    key = hashlib.sha256("\n".join([*parts, f"v{_VERSION}"]).encode() + text).hexdigest()
    return cache_dir() / "calibration" / f"{key[:32]}.safetensors"


def _read(file: Path, adapter: Adapter) -> dict[str, Tensor] | None:
    try:
        statistics = load_file(file)
    except (OSError, SafetensorError):
        return None  # never written, or cut short: measure again
    return statistics if statistics.keys() == adapter.factors.keys() else None


def _write(file: Path, statistics: Mapping[str, Tensor]) -> None:
    unfinished = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(statistics), unfinished)
        unfinished.replace(file)  # atomic: another process sees the whole file or none
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            unfinished.unlink()
        warnings.warn(
            f"the calibration could not be cached in {file.parent} ({error}); it is measured at "
            "each start. Set SPECTR_CACHE to a writable folder",
            stacklevel=2,
        )
