"""The part of a base that reads tokens, without the head that predicts them."""

from typing import cast

from torch import nn
from transformers import PreTrainedModel


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """What makes hidden states of token ids in a causal language model.

    transformers' `get_decoder` is the whole model of some classes (Llama 4, Mllama), and the head
    of another (ModernBERT).
    """
    decoder = cast(nn.Module, model.get_decoder())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    inside = set(decoder.modules())
    if head is not None and (head in inside or embedding not in inside):
        parts = (part for part in model.children() if embedding in set(part.modules()))
        decoder = next(parts, decoder)
    return cast(PreTrainedModel, decoder)
