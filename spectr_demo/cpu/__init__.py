"""Speed on a CPU: compiled products and loops, attention, the KV cache, threads, memory pages.

Compiled loops take arrays and give arrays. `linear`, `attention` and `kv_cache` change layers of
transformers in place. Nothing here imports another room of this project.
"""

import torch
from transformers import PreTrainedModel

from spectr_demo.cpu.attention import pack_heads_
from spectr_demo.cpu.linear import make_prompt_linear_, make_token_linear_

__all__ = ["speed_up_"]


def speed_up_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Have a model that is wholly on one CPU compute the same in less time.

    dtype: in which its layers compute. Called once, when its 4-bit layers are packed or expanded.
    In float32 its linear layers get a compiled product for a few tokens, where that is faster. In
    bfloat16 heads that share keys attend together, and 4-bit layers use AMX where the CPU has it. A
    base that is spread over devices, or expanded again at every step, is left as it is.
    """
    if dtype == torch.float32:
        make_token_linear_(model)
    if dtype == torch.bfloat16:
        pack_heads_(model)
        make_prompt_linear_(model)
