"""Loading a base: the dtype, 4-bit layers, the cached default, and each way a base is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)

from spectr_demo.base import loading
from spectr_demo.base.loading import (
    EMBEDDED_ID,
    MANIFEST,
    available_memory,
    choose_compute_dtype,
    embedded_checkpoint,
    expand_4bit_,
    is_whole,
    load_base,
)
from tests.conftest import tiny_llama

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a tiny dense base."""
    path = tmp_path / "tiny-base"
    tiny_llama(len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def no_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "has_avx512bf16", lambda: False)


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "available_memory", lambda: 1000)


def quantized(folder: Path, **config: object) -> PreTrainedModel:
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **config}
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, **settings),
        device_map={"": "cpu"},
    )


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(type(module) is kind for module in model.modules())


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
    monkeypatch.setattr(loading, "has_avx512bf16", lambda: has_fused_kernel)
    assert choose_compute_dtype(device) == dtype


@pytest.mark.usefixtures("no_fused_kernel")
def test_a_folder_is_loaded_frozen_and_expanded(folder: Path) -> None:
    base = load_base(str(folder), device="cpu")
    assert (base.source, base.name, base.bits) == (str(folder), "tiny-base", 4)
    assert (base.device, base.compute_dtype) == (CPU, torch.float32)
    assert base.quantization == (
        "NF4 values, expanded to float32 (this CPU has no 4-bit kernel for float32)"
    )
    assert count(base.model, bnb.nn.Linear4bit) == 0
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


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


def test_available_memory_is_that_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"memory.max": "3000\n", "memory.current": "1000\n"}
    monkeypatch.setattr(Path, "read_text", lambda path: files[path.name])
    assert available_memory() == 2000
    files["memory.max"] = "max\n"
    assert available_memory() > 2000


@pytest.mark.usefixtures("no_fused_kernel")
def test_dtype_can_be_chosen(folder: Path) -> None:
    base = load_base(str(folder), device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}
    assert "expanded to bfloat16" in base.quantization


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


def test_the_environment_names_the_base(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTR_BASE_MODEL", str(folder))
    assert load_base(device="cpu").source == str(folder)


def test_a_missing_pad_token_becomes_eos(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"]
    path.write_text(json.dumps(config))
    assert load_base(str(folder), device="cpu").tokenizer.pad_token_id == tokenizer.eos_token_id


def test_the_fingerprint_tells_fine_tunes_apart(folder: Path, tmp_path: Path) -> None:
    first = load_base(str(folder), device="cpu")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert load_base(str(copy), device="cpu").fingerprint == first.fingerprint
    dense = AutoModelForCausalLM.from_pretrained(folder)
    nn.init.normal_(dense.model.layers[0].mlp.up_proj.weight)
    dense.save_pretrained(copy)
    assert load_base(str(copy), device="cpu").fingerprint != first.fingerprint


def _remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _make_t5(folder: Path) -> None:
    T5Config(d_model=64, num_layers=1).save_pretrained(folder)


def _declare_gptq(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


def _break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def _pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove_config, r"no config\.json"),
        (_make_t5, r"it is a 't5' model, a causal language model was needed"),
        (_declare_gptq, r"weights are quantized \(gptq\)"),
        (_break_config, r"its config could not be read"),
        (_cut_weights, r"its weights or tokenizer could not be read"),
        (_pickle_weights, r"weights must be safetensors"),
        (_break_tokenizer, r"its weights or tokenizer could not be read"),
    ],
)
def test_a_base_that_cannot_be_used(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_base(str(folder), device="cpu")
    assert str(caught.value).startswith(f"base {str(folder)!r}: ")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("./models/none", "no such folder, and it is not a Hub id"),
        ("a/b/c", "no such folder, and it is not a Hub id"),
        ("no-such-owner/model", "Check the id and the network"),
    ],
)
def test_a_base_that_is_not_there(base: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_base(base, device="cpu")


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda:0': torch finds no CUDA device"):
        load_base(device="cuda:0")
    with pytest.raises(ValueError, match="'cuda' or 'cpu' was needed"):
        load_base(device="mps")


class Converter:
    """Stands in for the conversion of the GGUF: a tiny checkpoint, and how often it was made."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.folder, self.tokenizer, self.num_made = folder, tokenizer, 0

    def __call__(self, target: Path, dtype: torch.dtype) -> None:
        self.num_made += 1
        shutil.rmtree(target, ignore_errors=True)
        quantized(self.folder).save_pretrained(target)
        self.tokenizer.save_pretrained(target)
        (target / MANIFEST).write_text(json.dumps(loading._digests(target)))


@pytest.fixture
def converter(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Converter:
    return Converter(folder, tokenizer)


def test_the_default_is_converted_once(converter: Converter, tmp_path: Path) -> None:
    bases = [
        load_base(device="cpu", dtype=torch.float32, make_checkpoint=converter) for _ in range(2)
    ]
    assert converter.num_made == 1
    assert bases[0].source == f"{EMBEDDED_ID} (embedded)"
    assert bases[0].model.config._name_or_path == EMBEDDED_ID
    assert bases[0].fingerprint.startswith("gguf-sha256:b179c9523d0e")
    for first, second in zip(*(base.model.parameters() for base in bases), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", MANIFEST])
@pytest.mark.parametrize("keep", [0, 100, None])
def test_a_damaged_checkpoint_of_the_default_is_made_again(
    converter: Converter, tmp_path: Path, name: str, keep: int | None
) -> None:
    checkpoint = embedded_checkpoint(tmp_path, torch.float32)
    converter(checkpoint, torch.float32)
    assert is_whole(checkpoint)
    path = checkpoint / name
    if keep is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:keep])
    assert not is_whole(checkpoint)


def test_a_damaged_default_is_converted_again(converter: Converter, tmp_path: Path) -> None:
    load_base(device="cpu", dtype=torch.float32, make_checkpoint=converter)
    (weights,) = tmp_path.glob("cache/base/*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    load_base(device="cpu", dtype=torch.float32, make_checkpoint=converter)
    assert converter.num_made == 2


def test_what_changes_the_checkpoint_changes_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {embedded_checkpoint(Path(), dtype) for dtype in (torch.float32, torch.bfloat16)}
    monkeypatch.setattr(bnb, "__version__", "99.0")
    names.add(embedded_checkpoint(Path(), torch.float32))
    monkeypatch.setattr(loading.transformers, "__version__", "99.1.2")
    names.add(embedded_checkpoint(Path(), torch.float32))
    assert len(names) == 4


@pytest.mark.slow
@pytest.mark.embedded
def test_the_embedded_default_answers() -> None:
    base = load_base(device="cpu")
    assert base.model.config.max_position_embeddings == base.tokenizer.model_max_length == 8192
    assert base.model.generation_config.eos_token_id == 2
    assert base.tokenizer.convert_tokens_to_ids("<|im_end|>") == base.tokenizer.pad_token_id == 2
    inputs = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = base.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in base.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_gradients_through_a_base_in_float32(
    share: float, base_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expanded once or at every step; also after an evaluation, at which CPUs with AVX512-BF16
    would reorder packed weights."""
    monkeypatch.setattr(loading, "EXPANSION_SHARE", share)
    base = load_base(base_folder, device="cpu", dtype=torch.float32)
    layer = base.model.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(layer, bnb.nn.Linear4bit) == (share == 0)
    with torch.no_grad():
        transposed = layer(torch.eye(layer.in_features))
    x = torch.randn(3, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert_close(x.grad, transposed.sum(-1).expand(3, -1))
