"""Calibration: each expert's scores at each layer, brought to one scale by text of no domain.

An expert whose weights respond to everything wins too often, and layers differ in size. Scores are
standardised by their mean and standard deviation over ordinary chat (the idea is SEQR's, arXiv
2509.18093; the text is in `assets/generic_text.json`). No domain data is seen, nothing is trained.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectr_demo.config import ASSETS, RouterConfig, cache_dir
from spectr_demo.experts import ExpertLibrary, LayerBank
from spectr_demo.layers import routed
from spectr_demo.loading import LoadedBase
from spectr_demo.routing import CALIBRATED_SCORES

GENERIC_TEXT = ASSETS / "generic_text.json"
_VERSION = 1  # part of the cache key: raise it when the statistics change their meaning
_ROWS_AT_ONCE = 8


class Calibration:
    """Mean and standard deviation of each score, for every layer and expert.

    statistics: by layer path, (S, 2, E) float32: S scores in the order of `CALIBRATED_SCORES`, mean
    and standard deviation, the experts of the layer.
    """

    def __init__(self, statistics: Mapping[str, Tensor]) -> None:
        self._statistics = statistics

    def standardise(self, bank: LayerBank, score: str, values: Tensor) -> Tensor:
        """(values - mean) / std, in standard deviations; values: (R, T, E) of the bank."""
        mean, std = self._statistics[bank.path][list(CALIBRATED_SCORES).index(score)]
        return (values - mean) / std
