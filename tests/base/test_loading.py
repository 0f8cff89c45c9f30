"""Loading a base: a folder, the embedded default, and each way a base is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, PreTrainedTokenizerFast, T5Config

from spectr_demo.base.loading import load_base
from tests.base.conftest import count

CPU = torch.device("cpu")


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
def test_dtype_can_be_chosen(folder: Path) -> None:
    base = load_base(str(folder), device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}
    assert "expanded to bfloat16" in base.quantization


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


def test_a_base_on_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, the hub client reads its own cache: the layout is the Hub's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--someone--their-base"
    snapshot = repo / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.parent.mkdir(parents=True)
    (folder / "generation_config.json").write_text('{"eos_token_id": 3, "temperature": 0.5}')
    shutil.copytree(folder, snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(snapshot.name)
    base = load_base("someone/their-base", device="cpu")
    assert (base.source, base.name) == ("someone/their-base", "their-base")
    assert base.fingerprint == f"hub-commit:{snapshot.name}"
    assert base.model.generation_config.eos_token_id == 3
    assert "temperature=0.5" in base.notices[0]


def _remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _make_t5(folder: Path) -> None:
    T5Config(d_model=64, num_layers=1).save_pretrained(folder)


def _make_bert(folder: Path) -> None:
    BertConfig(hidden_size=64, num_hidden_layers=1).save_pretrained(folder)


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


def _lose(*names: str) -> Callable[[Path], None]:
    """Weights of these names."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        state = {name: tensor for name, tensor in load_file(path).items() if name not in names}
        save_file(state, path, metadata={"format": "pt"})

    return damage


def _break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove_config, r"no config\.json"),
        (_make_t5, r"it is a 't5' model, a causal language model was needed"),
        (_make_bert, r"an encoder .a 'bert' model with is_decoder=False.*; a decoder was needed"),
        (_declare_gptq, r"weights are quantized \(gptq\)"),
        (_break_config, r"its config could not be read"),
        (_cut_weights, r"its weights or tokenizer could not be read"),
        (_pickle_weights, r"weights must be safetensors"),
        (_lose("model.norm.weight"), r"lack 1 weights of a LlamaForCausalLM \(model\.norm\.weight"),
        (
            _lose("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"),
            r"lack 2 weights of a LlamaForCausalLM \(model\.layers\.0\.mlp\.down_proj\.weight, \.",
        ),
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
