"""Packed attention against transformers' own, and where it steps aside."""

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from spectr_demo.cpu import attention
from spectr_demo.cpu.attention import pack_heads_, packed_attention

HEADS, KEY_HEADS, D = 6, 2, 16


class Attention(nn.Module):
    num_key_value_groups = HEADS // KEY_HEADS
    is_causal = True


def inputs(rows: int, queries: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(HEADS, queries), (KEY_HEADS, 33), (KEY_HEADS, 33)]
    return [torch.randn(rows, *shape, D, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_token_is_attended_as_in_transformers(
    rows: int, is_padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = inputs(rows, 1)
    padding = torch.arange(rows)[:, None, None, None] * 7
    mask = torch.arange(33).expand(rows, 1, 1, -1) >= padding if is_padded else None
    expected, _ = sdpa_attention_forward(Attention(), query, key, value, mask, scaling=0.3)
    monkeypatch.setattr(attention, "sdpa_attention_forward", pytest.fail)
    output, _ = packed_attention(Attention(), query, key, value, mask, scaling=0.3)
    assert output.shape == expected.shape == (rows, 1, HEADS, D)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(
    ("queries", "dtype", "options"),
    [
        (5, torch.bfloat16, {}),
        (1, torch.float32, {}),
        (1, torch.bfloat16, {"position_bias": torch.randn(1, HEADS, 1, 33).bfloat16()}),
    ],
)
def test_all_else_is_left_to_transformers(
    queries: int, dtype: torch.dtype, options: dict[str, Tensor]
) -> None:
    options = {"attention_mask": None, **options}  # type: ignore[dict-item]
    query, key, value = inputs(2, queries, dtype)
    output, _ = packed_attention(Attention(), query, key, value, **options)  # type: ignore[arg-type]
    expected, _ = sdpa_attention_forward(Attention(), query, key, value, **options)
    assert torch.equal(output, expected)


def test_a_model_generates_the_same(llama: LlamaForCausalLM) -> None:
    llama.bfloat16()
    prompt = torch.arange(2, 12)[None].repeat(3, 1)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    expected = llama.generate(prompt, **options)
    pack_heads_(llama)
    assert llama.config._attn_implementation == "sdpa_packed"
    assert torch.equal(llama.generate(prompt, **options), expected)


def test_a_model_that_attends_otherwise_is_left_alone(llama: LlamaForCausalLM) -> None:
    llama.set_attn_implementation("eager")
    pack_heads_(llama)
    assert llama.config._attn_implementation == "eager"
