"""A folder with a tiny dense base, and a CPU without the fused 4-bit kernel, or without memory."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from spectr_demo.base import quantization
from tests.conftest import tiny_llama


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a tiny dense base."""
    path = tmp_path / "tiny-base"
    tiny_llama(len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def no_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "has_avx512bf16", lambda: False)


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "available_memory", lambda: 1000)


def quantized(
    folder: Path, dtype: torch.dtype = torch.float32, **config: object
) -> PreTrainedModel:
    """dtype: of what is not quantized."""
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **config}
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, **settings),
        device_map={"": "cpu"},
    )


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(type(module) is kind for module in model.modules())
