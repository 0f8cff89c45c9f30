"""The adapters of the compatibility table: what PEFT saves for a LoRA, and what others make of it.

Each is made on a base by PEFT itself, with random weights. What stands here is how it is made, and
what must happen with it.
"""

import copy
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import (
    BdLoraConfig,
    EvaConfig,
    KasaConfig,
    LoraConfig,
    MontecloraConfig,
    PeftConfig,
    PeftModel,
    VeloraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The bases that they are tried on: with linear layers, with GPT-2's transposed ones, and with some
# that keep a state.
KINDS = ("llama", "gpt2", "qwen3_5_text")
PREFIX, LAYER = "base_model.model.", "model.layers.0.mlp.down_proj"
PLAIN = "which is not supported; train a plain LoRA adapter on linear layers"
Settings = dict[str, Any]
Edit = Callable[[Path], None]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A kind of adapter.

    name: for people. settings: of PEFT's `LoraConfig`, beside rank and target modules; or a
    function that gives a configuration, from the names of the base's linear layers. edit: what
    others do to the saved folder. is_renamed: PEFT cannot read what they make of it, and is asked
    about the folder as it was before. error: the one line in which loading it ends, "..." standing
    for what depends on the base; empty where the adapter equals PEFT. kinds: of the bases for which
    PEFT makes such an adapter. is_plain_here: whether PEFT makes a plain adapter of it on these
    bases, though not on others.
    """

    name: str
    settings: Settings | Callable[[Sequence[str]], Settings] = field(default_factory=dict)
    edit: Edit | None = None
    is_renamed: bool = False
    error: str = ""
    kinds: Sequence[str] = KINDS
    is_plain_here: bool = False

    def config(self, names: Sequence[str]) -> PeftConfig:
        """names: of the base's linear layers, such as `q_proj`, in the order of its modules."""
        usual = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        return LoraConfig(**usual | self.own_settings(names))

    def own_settings(self, names: Sequence[str]) -> Settings:
        return self.settings(names) if callable(self.settings) else self.settings


def save_adapter(
    base: PreTrainedModel, config: PeftConfig, folder: Path, seed: int = 0
) -> PeftModel:
    """Save an adapter with random weights in a folder. The base stays as it is."""
    model = get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(folder))
    return model.eval()


def write(**values: Any) -> Edit:
    """Writes values into the configuration."""

    def edit(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def _rewrite(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Edit:
    """Changes the tensors, or their names."""

    def edit(folder: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)

    return edit


def _rename(change: Callable[[str], str]) -> Edit:
    """Changes the layers' names, in both files."""

    def edit(folder: Path) -> None:
        targets = json.loads((folder / CONFIG).read_text())["target_modules"]
        write(target_modules=[change(name) for name in targets])(folder)
        _rewrite(
            lambda state: {
                PREFIX + change(name.removeprefix(PREFIX)): tensor for name, tensor in state.items()
            }
        )(folder)

    return edit


def _cast(dtype: torch.dtype) -> Edit:
    return _rewrite(lambda state: {name: tensor.to(dtype) for name, tensor in state.items()})


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def _uses(what: str) -> str:
    return f"it uses {what}, {PLAIN}"


def _initialised(value: str, *, edit: Edit | None = None, **facts: Any) -> Variant:
    """Refused for how it was initialised. edit: where PEFT cannot do that here."""
    return Variant(
        name=f"`init_lora_weights` {value!r}",
        settings={} if edit else {"init_lora_weights": value},
        edit=edit,
        error=_uses(
            f"an initialisation that changes the base's own weights (init_lora_weights={value!r})"
        ),
        **facts,
    )


EQUAL = [
    Variant(name="rank 4 on all linear layers"),
    Variant(name="rank 1", settings={"r": 1}),
    Variant(name="a rank above the layers' width", settings={"r": 160}),
    Variant(name="rsLoRA (`use_rslora`)", settings={"use_rslora": True, "lora_alpha": 3}),
    Variant(name="`lora_alpha` 0, which adds nothing", settings={"lora_alpha": 0}),
    Variant(
        name="`rank_pattern` and `alpha_pattern` by name",
        settings=lambda names: {"rank_pattern": {names[0]: 2}, "alpha_pattern": {names[1]: 32}},
    ),
    Variant(
        name="`rank_pattern` and `alpha_pattern` by expression, with rsLoRA",
        settings={
            "use_rslora": True,
            "rank_pattern": {r".*\.1\..*": 6},
            "alpha_pattern": {r".*\.0\..*": 1},
        },
    ),
    Variant(name="dropout", settings={"lora_dropout": 0.5}),
    Variant(name="one projection", settings=lambda names: {"target_modules": [names[0]]}),
    Variant(
        name="a regular expression (`target_modules`)",
        settings=lambda names: {"target_modules": rf".*\.1\..*\.({'|'.join(names)})"},
    ),
    Variant(
        name="some layers (`layers_to_transform`)",
        settings=lambda names: {"target_modules": list(names), "layers_to_transform": [1]},
    ),
    Variant(
        name="all but some (`exclude_modules`)",
        settings=lambda names: {"exclude_modules": [names[0]]},
    ),
    *(
        Variant(name=f"`init_lora_weights` {value!r}", settings={"init_lora_weights": value})
        for value in (False, "gaussian", "orthogonal", "mica")
    ),
    Variant(
        name="`init_lora_weights` 'eva'",
        settings={"init_lora_weights": "eva", "eva_config": EvaConfig()},
    ),
    Variant(name="VeLoRA", settings={"velora_config": VeloraConfig(num_groups=8)}),
    Variant(
        name="MonteCLoRA",
        settings={"monteclora_config": MontecloraConfig(num_samples=2, buffer_size=2)},
    ),
    Variant(
        name="biases to be trained (`bias`), where no layer has one",
        settings={"bias": "all"},
        kinds=("llama", "qwen3_5_text"),
    ),
    Variant(name="weights in float16", edit=_cast(torch.float16)),
    Variant(name="weights in bfloat16", edit=_cast(torch.bfloat16)),
    *(
        Variant(name=f"weights in {str(dtype).removeprefix('torch.')}", edit=_cast(dtype))
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    ),
    Variant(name="no name of a base", edit=write(base_model_name_or_path=None)),
    Variant(
        name="saved from a compiled model (`_orig_mod`)",
        edit=_rename(lambda name: f"_orig_mod.{name}"),
        is_renamed=True,
    ),
    Variant(
        name="the adapter's name in the tensors' names (`lora_A.default.weight`)",
        edit=_rename(lambda name: name.replace(".weight", ".default.weight")),
        is_renamed=True,
    ),
    Variant(
        name="trained on the class with other towers (`model.language_model.layers`)",
        edit=_rename(lambda name: re.sub(r"^(model|transformer)", r"model.language_model", name)),
        is_renamed=True,
    ),
]

REFUSED = [
    Variant(name="DoRA", settings={"use_dora": True}, error=_uses("DoRA (use_dora=True)")),
    Variant(
        name="aLoRA",
        settings={"alora_invocation_tokens": [5, 6]},
        error=_uses("aLoRA, which is off until its tokens come (alora_invocation_tokens=[5, 6])"),
    ),
    Variant(
        name="`modules_to_save`",
        settings=lambda names: {"target_modules": [names[0]], "modules_to_save": ["lm_head"]},
        error=_uses("modules that are trained whole (modules_to_save=['lm_head'])"),
    ),
    Variant(
        name="`lora_bias`",
        settings={"lora_bias": True},
        error=_uses("biases of lora_B (lora_bias=True)"),
    ),
    Variant(
        name="`trainable_token_indices`",
        settings={"trainable_token_indices": [5, 17]},
        error=_uses("trained embeddings of tokens (trainable_token_indices=[5, 17])"),
    ),
    Variant(
        name="`layer_replication`",
        settings={"layer_replication": [[0, 2], [1, 2]]},
        kinds=("llama",),
        error=_uses("a base with repeated layers (layer_replication=[[0, 2], [1, 2]])"),
    ),
    Variant(
        name="`target_parameters`",
        edit=write(target_parameters=["mlp.experts.down_proj"]),
        error=_uses(
            "LoRA of parameters, as of a mixture's experts "
            "(target_parameters=['mlp.experts.down_proj'])"
        ),
    ),
    _initialised("pissa"),
    _initialised("pissa_niter_16"),
    _initialised("olora", kinds=("llama", "qwen3_5_text")),
    _initialised("lora_ga", is_plain_here=True),  # without gradients
    _initialised("corda", edit=write(init_lora_weights="corda")),
    _initialised("loftq", edit=write(init_lora_weights="loftq")),
    Variant(
        name="KaSA",
        settings={"kasa_config": KasaConfig()},
        error=_uses("KaSA, which changes the base's own weights (kasa_config={...})"),
        kinds=("llama",),
    ),
    Variant(
        name="BD-LoRA",
        settings=lambda names: {
            "use_bdlora": BdLoraConfig(
                target_modules_bd_a=[names[0]], nblocks=2, match_strict=False
            )
        },
        error=_uses("BD-LoRA, whose factors are block-diagonal (use_bdlora={...)"),
        kinds=("llama", "qwen3_5_text"),
    ),
    Variant(
        name="QALoRA",
        settings={"use_qalora": True},
        is_plain_here=True,
        error=_uses("QALoRA, which pools the inputs of a GPTQ base (use_qalora=True)"),
    ),
    Variant(
        name="Arrow's own configuration",
        edit=write(arrow_config={"top_k": 3}),
        error=_uses(
            "PEFT's Arrow router, which is no adapter of its own (arrow_config={'top_k': 3})"
        ),
    ),
    Variant(
        name="Megatron",
        edit=write(megatron_config={"hidden_size": 64}),
        error=_uses("Megatron's parallel layers (megatron_config={'hidden_size': 64})"),
    ),
    Variant(
        name="a setting of a later PEFT",
        edit=write(use_newest_lora=True),
        error=_uses("a setting that is not known here (use_newest_lora=True)"),
    ),
    Variant(
        name="trained biases (`bias`)",
        edit=_rewrite(lambda state: state | {f"{PREFIX}{LAYER}.bias": torch.ones(64)}),
        error=f"1 tensors are no LoRA factors of a linear layer ({PREFIX}{LAYER}.bias, ...); "
        "trained biases or other parts than linear layers are not supported",
    ),
    Variant(
        name="the output embedding",
        settings={"target_modules": ["lm_head"]},
        error="it targets lm_head (the output embedding) (1 of its 1 layers); only linear layers "
        "inside the decoder can be routed",
    ),
    Variant(
        name="the embedding of tokens",
        settings={"target_modules": ["embed_tokens", "wte"]},
        error="... tensors are no LoRA factors of a linear layer (...); embedding layers or other "
        "parts than linear layers are not supported",
    ),
    Variant(
        name="another method of PEFT",
        edit=write(peft_type="LOHA"),
        error="its peft_type is 'LOHA'; only 'LORA' can be routed",
    ),
    Variant(
        name="pickled weights",
        edit=_pickled,
        error="... has only pickled weights (adapter_model.bin); adapter_model.safetensors is "
        "needed (loading a pickle can run any code): save the adapter again with safetensors",
    ),
    Variant(
        name="empty tensors of DeepSpeed ZeRO-3",
        edit=_rewrite(lambda state: {name: torch.zeros(0) for name in state}),
        error="... has shape (0,) (as ... tensors do); DeepSpeed ZeRO-3 and FSDP keep parts of a "
        "matrix, which were not gathered when it was saved: save it again gathered",
    ),
    Variant(
        name="NaN",
        edit=_rewrite(lambda state: {n: torch.full_like(t, torch.nan) for n, t in state.items()}),
        error="... holds NaN or infinite values (as ... tensors do); train it again",
    ),
    Variant(
        name="whole numbers",
        edit=_cast(torch.int8),
        error="... holds int8 (as ... tensors do); floating point was needed: save it in bfloat16",
    ),
    Variant(
        name="two numbers in a byte (float4)",
        edit=_rewrite(
            lambda state: {
                name: torch.zeros(*tensor.shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
                for name, tensor in state.items()
            }
        ),
        error="torch cannot read its numbers (...); save it in bfloat16",
    ),
    Variant(
        name="a rank that its configuration does not say",
        edit=write(r=8, lora_alpha=8),
        error="... has lora_A (4, ...) and lora_B (..., 4), but adapter_config.json says rank 8 "
        "(as ... layers do); the two files do not belong together",
    ),
    Variant(
        name="half of the factors",
        edit=_rewrite(lambda state: {n: t for n, t in state.items() if "lora_A" in n}),
        error="... has only lora_A (as ... layers do); it needs both",
    ),
    Variant(
        name="another base",
        edit=_rename(lambda name: name.replace(".0.", ".9.")),
        error="...9... is not in the base, whose ... has no '9' (... of its ... layers); it was "
        "trained on another base model (...), or on another class of it",
    ),
]
