"""Attention of one new token in bfloat16 on a CPU.

Query heads that share their keys and values (grouped-query attention) are handed to torch as so
many queries of one head: the same result, bit for bit. As heads of their own torch's kernel reads
and converts the same keys and values for each of them; with 170 tokens that takes four times as
long.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "sdpa_packed"


def pack_heads_(model: PreTrainedModel) -> None:
    """Have a model attend this way, if it attends by torch's `scaled_dot_product_attention`."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_NAME, packed_attention)
        AttentionMaskInterface.register(_NAME, sdpa_mask)
        model.set_attn_implementation(_NAME)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """(R, T, heads, D) from query (R, heads, T, D), key and value (R, key heads, tokens, D), as an
    attention function of transformers; its own `sdpa` for all but single tokens.

    attention_mask: (R, 1, 1, tokens), for all heads of a row; None is all tokens."""
    is_token = query.shape[2] == 1
    if not is_token or query.dtype != torch.bfloat16 or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    packed = query.view(len(query), key.shape[1], -1, query.shape[3])
    output = scaled_dot_product_attention(
        packed, key, value, attn_mask=attention_mask, scale=options.get("scaling")
    )
    return output.reshape(len(query), 1, query.shape[1], value.shape[3]), None
