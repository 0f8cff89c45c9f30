"""The bases of the compatibility table: every decoder that transformers knows, very small.

Which there are is asked of transformers. What stands here by hand is what a small one needs, and
what must happen where it is not the usual: that it loads, and equals PEFT with an adapter on all
linear layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Of every base whose configuration has such a field; the tests' tokenizer has 258 tokens.
SIZES = {
    "vocab_size": 258,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "sliding_window": 8,
    # Mixtures of experts
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64,
    "dense_intermediate_size": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # Latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_topk": 128,  # more than a text has: else a padded text is another one to transformers
    "index_head_dim": 16,
    "index_n_heads": 2,
    "o_lora_rank": 16,
    # Layers with a window of their own shape
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    # Layers that keep a state in place of keys and values
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
}


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DENSE = ("gate_proj", "up_proj", "down_proj")
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
INDEXER = ("wq_b", "wk", "weights_proj")
GATED_DELTA = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")

ALL_KEYS = {"num_key_value_heads": 4}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention"]}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}
SHARED_KEYS = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 258,
}

# What an adapter on all linear layers ends in.
NOT_IN_PEFT = "PEFT makes none on Mamba's `out_proj`"
PARAMETERS = "LoRA of parameters, as of a mixture's experts"
FLAT = "layers that flatten the batch"
OTHER_TOKENS = "for a trace each token must be read once"
# It expands what the cache keeps: at each token it reads those of all tokens before again.
FOUR_AXES = "kv_b_proj gets input of shape (2, 1, 3, 16)"
PADDING = "takes in what pads the shorter ones"


@dataclass(frozen=True, kw_only=True)
class Base:
    """What is known of a base.

    kind: its model type. sizes: beside `SIZES`. targets: of the adapters that equal PEFT on it, as
    PEFT's `target_modules`. Errors, parts of them, empty where there is none: all_linear, of an
    adapter on all linear layers; rows, of a run with texts of different lengths; refused, of
    loading the base. drift: how far a trace's log-probabilities may be from those of the whole
    text, in nats; more than usual where transformers itself computes a text token by token with
    another rounding.
    """

    kind: str
    sizes: dict[str, Any] = field(default_factory=dict)
    targets: Sequence[str] | str = "all-linear"
    all_linear: str = ""
    rows: str = ""
    drift: float = 1e-3
    refused: str = ""

    def config(self) -> PretrainedConfig:
        config = CONFIG_MAPPING[self.kind]
        names = {f.name for f in fields(config)}
        own = {n if n in names else config.attribute_map.get(n): size for n, size in SIZES.items()}
        return config(**{name: size for name, size in own.items() if name in names} | self.sizes)

    def model(self) -> PreTrainedModel:
        """With random weights, in float32."""
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(self.config()).eval().requires_grad_(False)


# Bases that need more than `SIZES`, or of which something else is known.
_KNOWN = [
    Base(kind="afmoe", targets=ATTENTION, all_linear=PARAMETERS),
    Base(kind="axk1", sizes=ALL_KEYS, targets=(*LATENT, *DENSE), all_linear=FOUR_AXES),
    Base(kind="axk2", sizes=ALL_KEYS, targets=(*LATENT, *INDEXER, *DENSE), all_linear=FOUR_AXES),
    Base(
        kind="bailing_hybrid",
        sizes={**HYBRID, **ALL_KEYS},
        targets=("q_proj", "k_proj", "v_proj", "f_proj", "b_proj", "g_proj", *DENSE),
        all_linear=FOUR_AXES,
    ),
    Base(kind="bamba", sizes={"attn_layer_indices": [1]}),
    Base(kind="beam", sizes=WINDOWS, targets=ATTENTION, all_linear=PARAMETERS),
    Base(kind="bert", refused="it is an encoder"),
    Base(kind="codegen", sizes={"rotary_dim": 8}),
    Base(kind="cohere2", sizes=WINDOWS),
    Base(kind="cohere2_moe", sizes=WINDOWS, targets=ATTENTION, all_linear=PARAMETERS),
    Base(kind="ctrl", sizes={"dff": 64}),
    Base(
        kind="cohere_compass_text",
        sizes={"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    ),
    *(
        Base(kind=kind, sizes=ALL_KEYS, targets=LATENT, all_linear=PARAMETERS)
        for kind in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")
    ),
    *(
        Base(kind=kind, sizes=ALL_KEYS, targets=(*LATENT, *INDEXER), all_linear=PARAMETERS)
        for kind in ("deepseek_v32", "glm_moe_dsa")
    ),
    Base(
        kind="deepseek_v4",
        targets=("q_a_proj", "q_b_proj", "kv_proj", "o_b_proj", *DENSE),
        all_linear="o_a_proj gets input of shape (2, 3, 8, 8)",
    ),
    Base(kind="dots1", targets=ATTENTION, all_linear=PARAMETERS),
    Base(kind="ernie4_5_moe", targets=ATTENTION, all_linear=PARAMETERS),
    Base(kind="doge", targets=(*ATTENTION, *DENSE), all_linear=OTHER_TOKENS),
    Base(
        kind="dots3_note_text",
        sizes=ALL_KEYS,
        targets=(*LATENT, "g_proj", *INDEXER, *DENSE),
        all_linear=FOUR_AXES,
    ),
    Base(kind="exaone_moe", targets=ATTENTION, all_linear=PARAMETERS),
    Base(
        kind="falcon_h1",
        sizes={"mamba_d_ssm": 128},
        targets=(*ATTENTION, *DENSE, "in_proj"),
        all_linear=NOT_IN_PEFT,
    ),
    Base(kind="falcon_mamba", targets=("in_proj", "x_proj", "dt_proj"), all_linear=NOT_IN_PEFT),
    Base(kind="flex_olmo", targets=ATTENTION, all_linear=PARAMETERS),
    Base(kind="gemma2", sizes=WINDOWS),
    Base(kind="gemma3_text", sizes=WINDOWS),
    Base(
        kind="gemma3n_text",
        sizes={
            **SHARED_KEYS,
            "laurel_rank": 8,
            "intermediate_size": [64] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    Base(kind="gemma4_text", sizes=SHARED_KEYS),
    Base(kind="glm4_moe", targets=ATTENTION, all_linear=PARAMETERS),
    Base(
        kind="gpt_neo",
        sizes={"attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    Base(kind="gptj", sizes={"rotary_dim": 8}),
    Base(kind="granitemoehybrid", sizes=HYBRID),
    Base(kind="hrm_text", sizes={"H_cycles": 1, "L_cycles": 2}),  # more amplify rounding
    Base(kind="hunyuan_v1_moe", targets=ATTENTION, all_linear=PARAMETERS),
    Base(kind="hy_v3", targets=ATTENTION, all_linear=FLAT),
    Base(kind="hy_v4", sizes=ALL_KEYS, targets=(*LATENT, *INDEXER, *DENSE), all_linear=FOUR_AXES),
    Base(
        kind="jamba",
        sizes={"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    ),
    Base(kind="jetmoe", targets=("kv_proj",), all_linear=FLAT),
    Base(
        kind="kimi_linear",
        sizes={**HYBRID, **ALL_KEYS, "linear_head_dim": 16, "linear_num_heads": 4},
        targets=(*ATTENTION, *LATENT, "f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj", *DENSE),
        all_linear=FOUR_AXES,
    ),
    Base(kind="laguna", targets=(*ATTENTION, "g_proj"), all_linear=FLAT),
    Base(kind="lfm2", sizes=CONVOLUTIONS),
    Base(
        kind="lfm2_moe",
        sizes={**CONVOLUTIONS, "num_dense_layers": 1},
    ),
    Base(kind="lfm3", sizes=CONVOLUTIONS),
    Base(
        kind="llama4_text",
        sizes={
            "attention_chunk_size": 8,
            "no_rope_layer_interval": 2,  # every other layer sees all of the text
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 64,
        },
        targets=(*ATTENTION, *(f"feed_forward.{name}" for name in DENSE)),
        all_linear=FLAT,
    ),
    Base(
        kind="longcat_flash",
        sizes={
            "num_layers": 1,
            "ffn_hidden_size": 64,
            "expert_ffn_hidden_size": 64,
            "moe_topk": 2,
            "zero_expert_num": 2,
            **ALL_KEYS,
            "head_dim": 8,
        },
        targets=LATENT,
        all_linear=PARAMETERS,
    ),
    Base(kind="mamba", targets=("in_proj", "x_proj"), all_linear=NOT_IN_PEFT),
    Base(
        kind="mamba2",
        sizes={"num_heads": 4, "head_dim": 32, "n_groups": 1, "state_size": 16},
        targets=("in_proj",),
        all_linear=NOT_IN_PEFT,
    ),
    Base(kind="mellum", targets=ATTENTION, all_linear=PARAMETERS),
    Base(kind="minicpm3", sizes=ALL_KEYS, targets=(*LATENT, *DENSE), all_linear=FOUR_AXES),
    Base(
        kind="minimax",
        targets=(*ATTENTION, "qkv_proj", "output_gate"),
        all_linear=PARAMETERS,
    ),
    Base(kind="minimax_m2", targets=ATTENTION, all_linear=PARAMETERS),
    Base(
        kind="minimax_m3_vl_text",
        targets=ATTENTION,
        all_linear=FLAT,
    ),
    Base(kind="mixtral", targets=ATTENTION, all_linear=PARAMETERS),
    Base(
        kind="modernbert-decoder",
        targets=("q_proj", "k_proj", "v_proj", "Wo", "Wi"),
        all_linear="it targets lm_head.dense (outside of the decoder)",
    ),
    Base(
        kind="nemotron_h",
        sizes={
            "layer_types": ["linear_attention", "full_attention", "mlp"],
            "num_hidden_layers": 3,
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "ssm_state_size": 16,
            "n_groups": 1,
        },
        targets=(*ATTENTION, "in_proj", "up_proj", "down_proj"),
        all_linear=NOT_IN_PEFT,
        drift=0.01,
    ),
    Base(kind="olmoe", targets=ATTENTION, all_linear=PARAMETERS),
    Base(
        kind="opt",
        sizes={"ffn_dim": 64},
        targets=("q_proj", "k_proj", "v_proj", "out_proj"),
        all_linear=FLAT,
    ),
    Base(kind="phimoe", targets=ATTENTION, all_linear=FLAT),
    Base(kind="qwen2_moe", targets=ATTENTION, all_linear=FLAT),
    Base(kind="qwen3_5_text", sizes=HYBRID),
    Base(
        kind="qwen3_5_moe_text",
        sizes=HYBRID,
        targets=(*GATED_DELTA, *ATTENTION),
        all_linear=FLAT,
    ),
    Base(kind="qwen3_moe", targets=ATTENTION, all_linear=PARAMETERS),
    Base(
        kind="qwen3_next",
        sizes=HYBRID,
        targets=("in_proj_qkvz", "in_proj_ba", "out_proj", *ATTENTION),
        all_linear=PARAMETERS,
    ),
    Base(kind="recurrent_gemma", sizes={"block_types": ["recurrent", "attention"]}, rows=PADDING),
    Base(kind="rwkv", rows="mixes up the rows of a batch"),
    Base(kind="solar_open", targets=ATTENTION, all_linear=PARAMETERS),
    Base(kind="youtu", sizes=ALL_KEYS, targets=(*LATENT, *DENSE), all_linear=FOUR_AXES),
    Base(kind="xglm", sizes={"ffn_dim": 64}),
    Base(kind="xlstm", sizes={"hidden_size": 128, "num_heads": 4}, rows=PADDING),
    Base(
        kind="zamba",
        sizes={
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "n_mamba_heads": 2,
            "attention_head_dim": 32,
            **ALL_KEYS,
        },
    ),
    Base(
        kind="zamba2",
        sizes={
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            **ALL_KEYS,
        },
        drift=0.05,
    ),
    Base(
        kind="zaya",
        sizes={"num_experts_per_tok": 1},
        targets=("q_proj", "k_proj", "v_proj_current", "o_proj", "fc1", "fc2"),
        all_linear="v_proj_delayed gets input of shape (2, 1, 64)",
    ),
]

_ROWS = {base.kind: base for base in _KNOWN}

# Kinds without a row, beside those that `left_out` tells from their configuration.
_LEFT_OUT = {
    "cpmant": "its tokens are not read one after another",
    "dbrx": "its configuration cannot be made in this version of transformers",
    "qwen4_exp_text": "its tables of word groups are not made small",
    "trocr": "a decoder of another model's encodings",
    "reformer": "an encoder, as bert",
    "xlm": "an encoder, as bert",
    "xlnet": "an encoder, as bert",
}


def left_out(kind: str) -> str:
    """Why a kind of model that transformers lists has no row; empty where it has one."""
    config = CONFIG_MAPPING[kind]
    names = {f.name: f for f in fields(config)}
    if kind in _ROWS:
        return ""
    if kind in _LEFT_OUT:
        return _LEFT_OUT[kind]
    if config.model_type != kind:
        return f"the same as {config.model_type}"
    if set(config.sub_configs) - {"attn_config"}:
        return "more than a text model"
    if names["is_encoder_decoder"].default:
        return "an encoder with a decoder"
    if names.keys() >= {"is_decoder", "add_cross_attention"}:
        return "an encoder, as bert"
    return ""


def bases() -> list[Base]:
    """The rows of the table, in transformers' order."""
    kinds = [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not left_out(kind)]
    assert _ROWS.keys() <= set(kinds)
    return [_ROWS.get(kind, Base(kind=kind)) for kind in kinds]
