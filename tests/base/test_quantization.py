"""Four bits: the dtype, 4-bit layers, expanded ones, gradients through them."""

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from spectr_demo import cpu
from spectr_demo.base import quantization
from spectr_demo.base.loading import load_base
from spectr_demo.base.quantization import choose_compute_dtype, expand_4bit_
from tests.base.conftest import count, quantized
from tests.conftest import tiny_llama

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "capability", "has_fused_kernel", "dtype"),
    [
        (CUDA, (7, 5), True, torch.float16),
        (CUDA, (8, 0), False, torch.bfloat16),
        (CUDA, (8, 6), False, torch.bfloat16),
        (CUDA, (12, 0), False, torch.bfloat16),
        (CPU, None, True, torch.bfloat16),
        (CPU, None, False, torch.float32),
    ],
)
def test_compute_dtype(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    capability: tuple[int, int] | None,
    has_fused_kernel: bool,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(quantization, "has_avx512bf16", lambda: has_fused_kernel)
    assert choose_compute_dtype(device) == dtype


@pytest.mark.usefixtures("no_fused_kernel")
def test_the_values_are_those_of_nf4_and_the_head_is_not_quantized(folder: Path) -> None:
    base = load_base(str(folder), device="cpu").model
    dense = AutoModelForCausalLM.from_pretrained(folder)
    layer, original = base.model.layers[1].mlp.up_proj, dense.model.layers[1].mlp.up_proj
    levels = (layer.weight.reshape(-1, 64) / layer.weight.reshape(-1, 64).abs().amax(1, True)).T
    assert all(column.unique().numel() <= 16 for column in levels.T)
    assert not torch.equal(layer.weight, original.weight)
    assert_close(layer.weight, original.weight, atol=0.15, rtol=0)
    assert torch.equal(base.lm_head.weight, dense.lm_head.weight)
    assert torch.equal(base.model.embed_tokens.weight, dense.model.embed_tokens.weight)


@pytest.mark.usefixtures("no_fused_kernel")
@pytest.mark.parametrize("bias", [False, True])
def test_expanding_changes_no_output(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, bias: bool
) -> None:
    dense = tiny_llama(len(tokenizer))
    if bias:
        dense.config.attention_bias = True
        dense = type(dense)(dense.config)
        nn.init.normal_(dense.model.layers[0].self_attn.q_proj.bias)
    dense.save_pretrained(tmp_path)
    packed, expanded = quantized(tmp_path).eval(), quantized(tmp_path).eval()
    for module in packed.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # the fused kernel rounds to bfloat16
    expand_4bit_(expanded, torch.float32)
    assert count(packed, bnb.nn.Linear4bit) == count(expanded, nn.Linear) - 1 == 14
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert_close(expanded(tokens).logits, packed(tokens).logits, atol=1e-4, rtol=1e-4)


def test_an_expanded_model_is_an_ordinary_one_to_peft_and_to_torch(folder: Path) -> None:
    model = load_base(str(folder), device="cpu", dtype=torch.float32).model
    model.to("cpu").to(torch.float32)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer).__module__ == "peft.tuners.lora.layer"
    assert isinstance(layer.base_layer, nn.Linear)
    assert not isinstance(layer.base_layer, bnb.nn.Linear4bit)
    tokens = torch.tensor([[3, 4, 5]])
    assert tuned.generate(tokens, max_new_tokens=2, do_sample=False).shape[1] <= 5


@pytest.mark.usefixtures("no_fused_kernel", "no_memory")
def test_without_memory_the_weights_stay_packed(folder: Path) -> None:
    base = load_base(str(folder), device="cpu")
    assert count(base.model, bnb.nn.Linear4bit) == 14
    assert "expanded again at every step" in base.quantization


@pytest.mark.usefixtures("no_memory", "no_fused_kernel")
def test_a_4bit_checkpoint_is_taken_as_it_is(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    # FP4 without double quantization, which this project never makes itself.
    stored = quantized(folder, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False)
    stored.save_pretrained(tmp_path / "fp4")
    tokenizer.save_pretrained(tmp_path / "fp4")
    base = load_base(str(tmp_path / "fp4"), device="cpu", dtype=torch.float32)
    assert base.quantization.startswith("FP4, expanded")
    layer = base.model.model.layers[0].mlp.up_proj
    assert layer.weight.quant_type == "fp4"
    assert layer.compute_dtype == torch.float32


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_gradients_through_a_base_in_float32(
    share: float, base_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expanded once or at every step; also after an evaluation, at which CPUs with AVX512-BF16
    would reorder packed weights."""
    monkeypatch.setattr(quantization, "EXPANSION_SHARE", share)
    base = load_base(base_folder, device="cpu", dtype=torch.float32)
    layer = base.model.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(layer, bnb.nn.Linear4bit) == (share == 0)
    with torch.no_grad():
        transposed = layer(torch.eye(layer.in_features))
    x = torch.randn(3, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert_close(x.grad, transposed.sum(-1).expand(3, -1))


@pytest.fixture
def sped_up(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes that `cpu.speed_up_` was called with, in order."""
    calls: list[torch.dtype] = []

    def speed_up_(model: PreTrainedModel, dtype: torch.dtype) -> None:
        calls.append(dtype)

    monkeypatch.setattr(cpu, "speed_up_", speed_up_)
    return calls


@pytest.mark.usefixtures("no_fused_kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_on_a_cpu_is_sped_up_once(
    folder: Path, sped_up: list[torch.dtype], dtype: torch.dtype
) -> None:
    load_base(str(folder), device="cpu", dtype=dtype)
    assert sped_up == [dtype]


@pytest.mark.usefixtures("no_fused_kernel", "no_memory")
def test_a_model_that_is_expanded_at_every_step_is_not_sped_up(
    folder: Path, sped_up: list[torch.dtype]
) -> None:
    load_base(str(folder), device="cpu")
    assert sped_up == []


def test_a_model_that_is_spread_is_not_sped_up(folder: Path, sped_up: list[torch.dtype]) -> None:
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    load_base(str(folder), device_map=places)
    assert sped_up == []
