"""The LoRA that is trained: on which layers it sits, and how it is off on some tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from spectr_demo.training.recipe import Recipe


def inner_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """All linear layers by their path, but the one that gives the logits."""
    head = model.get_output_embeddings()
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def with_lora(model: PreTrainedModel, recipe: Recipe) -> Any:
    """The model with the recipe's LoRA, drawn with its seed; only the LoRA is trained."""
    # peft takes seconds to import, and nothing before this needs it.
    from peft import LoraConfig, get_peft_model

    set_seed(recipe.seed or 0)
    names = {path.rpartition(".")[2] for path in inner_linears(model)}
    return get_peft_model(
        model,
        LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            target_modules=sorted(names),
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        ),
    )


@contextmanager
def adapter_on(model: nn.Module, is_on: Tensor) -> Iterator[None]:
    """Within this, a PEFT model's LoRA adds nothing to a layer's output on tokens that are off.

    is_on: (R, T) bool, one for each token that the model is given.
    """
    # peft takes seconds to import.
    from peft.tuners.lora import LoraLayer

    def switched(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        weight = is_on.to(output.device, output.dtype)
        return output * weight.reshape(*output.shape[:-1], 1)

    handles = [
        lora_a.register_forward_hook(switched)
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        for lora_a in layer.lora_A.values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
