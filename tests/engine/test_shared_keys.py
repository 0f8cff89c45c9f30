"""Gemma 4's upper layers read the keys of lower ones, and of a prompt only its last token."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma4TextConfig, PreTrainedTokenizerFast

from spectr_demo.engine.model import SpectrModel
from spectr_demo.experts.library import load_experts
from tests.conftest import EXPERT_NAMES, IN_CONTEXT, loaded_base

COLUMNS = ["base", "single:red", "spectr", "spectr-paper", "lag", IN_CONTEXT]


def test_a_trace_has_all_tokens_and_a_run_without_one_the_same_text(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = Gemma4TextConfig(
        vocab_size=len(tokenizer),
        vocab_size_per_layer_input=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=16,
        hidden_size_per_layer_input=16,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    base = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name in EXPERT_NAMES:
        adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(deepcopy(base), adapter).save_pretrained(tmp_path / name)
    folders = [str(tmp_path / name) for name in EXPERT_NAMES]
    model = SpectrModel(loaded_base(base, tokenizer), load_experts(folders, base))
    widths = []
    layer = base.model.layers[3].mlp.gate_proj
    layer.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    recorded = model.compare("Count to two.", COLUMNS, max_new_tokens=6)
    num_prompt = max(widths)
    assert recorded.trace is not None and num_prompt > 1
    for column in recorded.trace.columns:
        assert np.isfinite(column.logprob[1:]).all()
    is_routed = recorded.trace.column("spectr").experts[:-1, ..., 0] >= 0
    num_layers = sum(len(bank.paths) for bank in model.library.banks)
    assert (is_routed.sum(axis=(1, 2)) == num_layers).all()
    assert recorded.trace.num_layers == 4
    widths.clear()
    plain = model.compare("Count to two.", COLUMNS[:-1], max_new_tokens=6, record=False)
    assert widths == [1] * 6, "transformers leaves the prompt's other tokens out"
    for one, other in zip(recorded.columns, plain.columns, strict=False):
        assert one.text == other.text
