"""Four bits: the dtype, 4-bit layers, expanded ones, gradients through them."""

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from spectr_demo import cpu
from spectr_demo.base import quantization
from spectr_demo.base.loading import load_base
from spectr_demo.base.quantization import cast_unquantized_, choose_compute_dtype, expand_4bit_
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
    expand_4bit_(expanded)
    assert count(packed, bnb.nn.Linear4bit) == count(expanded, nn.Linear) - 1 == 14
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert_close(expanded(tokens).logits, packed(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("path", ["mlp", "mlp.up_proj"])
def test_a_layer_with_two_names_is_expanded_once(folder: Path, path: str) -> None:
    """... whether it is reached by two, or what has it is."""
    model = quantized(folder).eval()
    shared = model.get_submodule(f"model.layers.0.{path}")
    model.set_submodule(f"model.layers.1.{path}", shared)
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False  # the fused kernel rounds to bfloat16
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(tokens).logits
    expand_4bit_(model)
    first, second = (model.model.layers[i].mlp.up_proj for i in (0, 1))
    assert first is second
    assert type(first) is nn.Linear
    assert count(model, bnb.nn.Linear4bit) == 0
    with torch.no_grad():
        assert_close(model(tokens).logits, expected, atol=1e-4, rtol=1e-4)


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


def reference(folder: Path) -> PreTrainedModel:
    """The same 4-bit values in float32, by bitsandbytes alone: what other ways are measured by."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu, layer.compute_dtype = False, torch.float32
            layer.compute_type_is_set = True
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and not isinstance(tensor, bnb.nn.Params4bit):
            tensor.data = tensor.data.float()
    return model.eval()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cpu_is", ["no_fused_kernel", "no_fused_kernel no_memory", ""])
def test_a_4bit_checkpoint_computes_in_the_dtype_asked_for(
    request: pytest.FixtureRequest,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    stored: torch.dtype,
    dtype: torch.dtype,
    cpu_is: str,
) -> None:
    """Whatever its other parts are stored in: layer norms with their biases, embeddings, biases."""
    for fixture in cpu_is.split():
        request.getfixturevalue(fixture)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = GPTNeoXConfig(**sizes, num_attention_heads=4, vocab_size=len(tokenizer))
    torch.manual_seed(0)
    dense = GPTNeoXForCausalLM(config)
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.2)
    dense.save_pretrained(tmp_path / "dense")
    folder = tmp_path / "4-bit"
    quantized(tmp_path / "dense", stored, bnb_4bit_compute_dtype=stored).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = load_base(str(folder), device="cpu", dtype=dtype).model
    others = [p.dtype for p in model.parameters() if not isinstance(p, bnb.nn.Params4bit)]
    assert set(others) == {dtype}
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        logits, expected = model(tokens).logits, reference(folder)(tokens).logits
    assert logits.dtype == dtype
    if dtype == torch.float32:
        assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    else:
        assert (logits - expected).norm() < 0.05 * expected.norm()


def test_what_transformers_keeps_in_float32_stays_so(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = DeepseekV3Config(
        hidden_size=64,
        num_hidden_layers=2,
        vocab_size=len(tokenizer),
        intermediate_size=128,
        moe_intermediate_size=64,
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        num_attention_heads=4,
        q_lora_rank=32,
        kv_lora_rank=32,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = quantized(tmp_path)
    cast_unquantized_(model, torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    corrections = [name for name in dtypes if "e_score_correction_bias" in name]
    assert corrections
    for name, dtype in dtypes.items():
        if dtype.is_floating_point and name.endswith(
            ("norm.weight", "_bias", "embed_tokens.weight")
        ):
            assert dtype == (torch.float32 if name in corrections else torch.bfloat16), name
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


needs_kernel = pytest.mark.skipif(
    not has_avx512bf16(), reason="this CPU has no product with packed 4-bit weights"
)


@needs_kernel
@pytest.mark.parametrize("sizes", [(64, 144), (96, 128), (96, 200)])
@pytest.mark.parametrize("has_memory", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_layers_that_the_kernel_does_not_fit_are_computed_without_it(
    request: pytest.FixtureRequest,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    sizes: tuple[int, int],
    has_memory: bool,
    kind: str,
) -> None:
    """Outputs that are no multiple of 32, or inputs that are no multiple of a block."""
    if not has_memory:
        request.getfixturevalue("no_memory")
    hidden, intermediate = sizes
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    quantized(tmp_path / "dense", torch.bfloat16, bnb_4bit_quant_type=kind).save_pretrained(
        folder := tmp_path / "4-bit"
    )
    tokenizer.save_pretrained(folder)
    base = load_base(str(folder), device="cpu")
    assert base.compute_dtype == torch.bfloat16
    # Of the 14 layers, those that read or write the side that does not fit.
    num_unfit = 6 if hidden % 64 == 0 else 14 if intermediate % 64 else 12
    how = "expanded" if has_memory else "expanded again at every step"
    assert f"; {num_unfit} of 14 layers {how} (no 4-bit kernel fits them)" in base.quantization
    for tokens in (torch.arange(5)[None], torch.arange(40)[None]):
        with torch.no_grad():
            logits, expected = base.model(tokens).logits, reference(folder)(tokens).logits
        assert (logits - expected).norm() < 0.05 * expected.norm()


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
