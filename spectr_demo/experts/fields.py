"""What becomes of each field of an adapter's configuration: PEFT's `LoraConfig`, all of it.

A field is in one of three lists. One that is in none of them, as a later PEFT may write it, is
refused where it is set. So an adapter gives what PEFT gives with it, or is refused by name.
"""

from collections.abc import Callable, Mapping
from typing import Any

from spectr_demo.experts.messages import short, shown

# The value does not change what a saved adapter computes on a frozen base, without gradients.
CHANGES_NOTHING: Mapping[str, str] = {
    "auto_mapping": "names classes of PEFT",
    "base_model_name_or_path": "is said where an adapter does not fit",
    "bias": "trained biases are tensors of their own, and are refused where they are found",
    "corda_config": "of init_lora_weights",
    "ensure_weight_tying": "of embeddings, which are refused where their tensors are found",
    "eva_config": "of init_lora_weights",
    "fan_in_fan_out": "how the base's weight is stored; lora_A and lora_B are always the same",
    "inference_mode": "whether gradients are kept",
    "loftq_config": "of init_lora_weights",
    "lora_dropout": "is for training",
    "lora_ga_config": "of init_lora_weights",
    "megatron_core": "of megatron_config",
    "monteclora_config": "samples in training; its samplers' tensors are left out",
    "peft_version": "who wrote it",
    "qalora_group_size": "of use_qalora",
    "revision": "of the base",
    "runtime_config": "PEFT does not read it from a file",
    "task_type": "which class of PEFT wraps the base; a head that it adds is in modules_to_save",
    "velora_config": "changes the backward pass; its tensors are left out",
}

# Read when the weights are.
HONOURED: Mapping[str, str] = {
    "alpha_pattern": "scaling",
    "exclude_modules": "which layers",
    "layers_pattern": "which layers",
    "layers_to_transform": "which layers",
    "lora_alpha": "scaling",
    "peft_type": "LORA",
    "r": "rank",
    "rank_pattern": "rank",
    "target_modules": "which layers",
    "use_rslora": "scaling",
}

_INITIALISED = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def _is_set(value: Any) -> bool:
    return not (value is None or value is False or value in ("", [], {}))


def _changes_base(value: Any) -> bool:
    """Of `init_lora_weights`: whether the adapter belongs to base weights that it has changed.

    PEFT subtracts the initial adapter from them, or quantizes them. Converted on saving to an
    adapter of the plain base, it is saved as initialised with True.
    """
    return (value.lower() if isinstance(value, str) else value) not in _INITIALISED


# What it is, and when it is refused.
REFUSED: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "alora_invocation_tokens": ("aLoRA, which is off until its tokens come", _is_set),
    "arrow_config": ("PEFT's Arrow router, which is no adapter of its own", _is_set),
    "init_lora_weights": ("an initialisation that changes the base's own weights", _changes_base),
    "kasa_config": ("KaSA, which changes the base's own weights", _is_set),
    "layer_replication": ("a base with repeated layers", _is_set),
    "lora_bias": ("biases of lora_B", _is_set),
    "megatron_config": ("Megatron's parallel layers", _is_set),
    "modules_to_save": ("modules that are trained whole", _is_set),
    "target_parameters": ("LoRA of parameters, as of a mixture's experts", _is_set),
    "trainable_token_indices": ("trained embeddings of tokens", _is_set),
    "use_bdlora": ("BD-LoRA, whose factors are block-diagonal", _is_set),
    "use_dora": ("DoRA", _is_set),
    "use_qalora": ("QALoRA, which pools the inputs of a GPTQ base", _is_set),
}


def refusals(values: Mapping[str, Any]) -> list[str]:
    """What an adapter's configuration asks for that is not given here, one phrase for each field.

    values: of `adapter_config.json`.
    """
    found = []
    for field, value in values.items():
        if field in CHANGES_NOTHING or field in HONOURED:
            continue
        what, is_refused = REFUSED.get(field, ("a setting that is not known here", _is_set))
        if is_refused(value):
            found.append(f"{what} ({shown(field, 60)}={short(value)})")
    return found
