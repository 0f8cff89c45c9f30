"""Whether adapters fit a base: what fits gives PEFT's logits, what does not is one true line."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    MambaConfig,
    MiniCPM3Config,
    MixtralConfig,
    NemotronHConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from spectr_demo.engine.model import load
from spectr_demo.experts.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    AdapterError,
    read_adapter,
)
from spectr_demo.experts.fit import fit_adapters
from spectr_demo.experts.preflight import preflight
from spectr_demo.experts.skeleton import Skeleton

SMALL = {
    "vocab_size": 258,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
}
BASES: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(
        vocab_size=258, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
    ),
    "opt": OPTConfig(
        **SMALL | {"ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 64}
    ),
    "deepseek_v3": DeepseekV3Config(
        **SMALL
        | LATENT
        | {
            "moe_intermediate_size": 64,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
        }
    ),
    "minicpm3": MiniCPM3Config(**SMALL | LATENT),
    "falcon": FalconConfig(**SMALL, new_decoder_architecture=False, multi_query=True),
    "mamba": MambaConfig(
        vocab_size=258,
        hidden_size=64,
        num_hidden_layers=2,
        state_size=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    ),
}


@pytest.fixture(scope="module")
def bases(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A function that gives the folder of a tiny random base."""
    folder = tmp_path_factory.mktemp("bases")

    def make(name: str) -> Path:
        if not (folder / name).exists():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(BASES[name]).save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        return folder / name

    return make


def save_adapter(base: Path, folder: Path, **config: Any) -> str:
    model = AutoModelForCausalLM.from_pretrained(base)
    peft = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(0)
    for key, parameter in peft.named_parameters():
        if "lora_" in key:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    peft.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without a kernel for 4-bit products."""
    for room in ("experts.preflight", "base.loading"):
        name = f"spectr_demo.{room}.choose_compute_dtype"
        monkeypatch.setattr(name, lambda device: torch.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "target_modules", "needed"),
    [
        ("gpt2", "all-linear", None),
        ("opt", ["q_proj", "fc1"], r"layers.0.fc1 gets input of shape \(6, 64\) .*\(2 of its 4 "),
        ("deepseek_v3", ["q_a_proj", "o_proj"], None),
        ("deepseek_v3", ["kv_b_proj"], r"kv_b_proj gets input of shape \(2, 1, 3, 64\)"),
        ("deepseek_v3", "all-linear", r"it uses .* \(target_parameters="),
        (
            "minicpm3",
            "all-linear",
            r"kv_b_proj gets input of shape \(2, 1, 3, 64\) .*\(2 of its 16 ",
        ),
        ("falcon", "all-linear", None),
        ("mamba", ["in_proj", "x_proj", "dt_proj"], None),
    ],
)
def test_preflight_and_load_agree(
    name: str,
    target_modules: str | list[str],
    needed: str | None,
    bases: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    base = str(bases(name))
    adapter = save_adapter(bases(name), tmp_path / "expert", target_modules=target_modules)
    if needed is None:
        assert preflight(base, adapter).problems == ()
        step = load(base, adapter).compare("Hi", ["single:expert"], max_new_tokens=2)
        assert step.columns[0].num_tokens > 0
        return
    with pytest.raises(ValueError, match=needed) as caught:
        load(base, adapter)
    assert len(str(caught.value).splitlines()) == 1, "one misfit, one line"
    try:
        problems = preflight(base, adapter).problems
    except ValueError as error:
        problems = (str(error),)
    assert problems == (str(caught.value),)


IDS = torch.tensor([[5, 17, 42, 101, 7]])
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "image_size": 28}
SMALL_TEXT = {**SMALL, "head_dim": 16, "sliding_window": 64}
MULTIMODAL = Gemma3Config(
    text_config=SMALL_TEXT,
    vision_config={**VISION, "num_attention_heads": 4, "patch_size": 14},
    mm_tokens_per_image=4,
)
TEXT = Gemma3TextConfig(**SMALL_TEXT)


def new_base(config: PreTrainedConfig) -> PreTrainedModel:
    """The same random weights each time, and for both classes of one language model."""
    model = AutoModelForCausalLM.from_config(config)
    for path, parameter in model.named_parameters():
        seed = crc32(path.replace("language_model.", "").encode())
        generator = torch.Generator().manual_seed(seed)
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


def saved(
    folder: Path, config: PreTrainedConfig, target_modules: str | list[str], **settings: Any
) -> str:
    """An adapter's folder, and beside it the logits that PEFT has with it on its own base."""
    lora = LoraConfig(r=2, target_modules=target_modules, task_type="CAUSAL_LM", **settings)
    peft = get_peft_model(new_base(config), lora)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in peft.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    peft.save_pretrained(folder)
    with torch.no_grad():
        save_file({"logits": peft.eval()(input_ids=IDS).logits}, folder / "theirs.safetensors")
    return str(folder)


def renamed(folder: str, change: Callable[[str], str]) -> str:
    weights = Path(folder) / WEIGHTS_FILE
    save_file({change(key): tensor for key, tensor in load_file(weights).items()}, weights)
    return folder


@torch.no_grad()
def assert_as_in_peft(folder: str, config: PreTrainedConfig) -> Adapter:
    """With what was read of the adapter in its weights, the base gives the same logits."""
    (adapter,), problems = fit_adapters([read_adapter(folder)], config)
    assert problems == []
    base = new_base(config)
    without = base(input_ids=IDS).logits
    for path, factors in adapter.read().items():
        delta = factors.scaling * factors.lora_B @ factors.lora_A
        base.get_submodule(path).weight += delta
    theirs = load_file(Path(folder) / "theirs.safetensors")["logits"]
    scale = theirs.abs().max()
    assert (without - theirs).abs().max() > 0.01 * scale, "the adapter does something"
    assert_close(base(input_ids=IDS).logits, theirs, atol=1e-4 * float(scale), rtol=0)
    return adapter


def problems_of(folder: str, config: PreTrainedConfig) -> list[str]:
    try:
        return fit_adapters([read_adapter(folder)], config).problems
    except AdapterError as error:
        return error.problems


PROJECTIONS = r".*language_model.*\.(q_proj|down_proj)"


def test_an_adapter_of_the_multimodal_class_serves_the_language_model(tmp_path: Path) -> None:
    folder = saved(tmp_path / "expert", MULTIMODAL, PROJECTIONS)
    (note,) = assert_as_in_peft(folder, TEXT).notes
    old = "model.language_model.layers.0.mlp.down_proj"
    assert f"4 of its 4 layers have other names here ({old}: model.layers.0.mlp." in note
    older = renamed(
        folder, lambda key: key.replace("model.language_model.", "language_model.model.")
    )
    for config in (TEXT, MULTIMODAL):
        assert_as_in_peft(older, config)


def test_an_adapter_of_the_language_model_serves_the_multimodal_class(tmp_path: Path) -> None:
    folder = saved(tmp_path / "expert", TEXT, ["q_proj", "down_proj"])
    adapter = assert_as_in_peft(folder, MULTIMODAL)
    assert set(adapter.shapes) == {
        f"model.language_model.layers.{i}.{p}"
        for i in (0, 1)
        for p in ("mlp.down_proj", "self_attn.q_proj")
    }


def test_layers_that_text_does_not_reach_are_left_out(tmp_path: Path) -> None:
    folder = saved(tmp_path / "expert", MULTIMODAL, ["q_proj", "down_proj"])
    adapter = assert_as_in_peft(folder, MULTIMODAL)
    assert not any("vision" in path for path in adapter.shapes)
    (note,) = adapter.notes
    assert "2 of its 6 layers do not run when text is read (model.vision_tower." in note
    (problem,) = problems_of(folder, TEXT)
    assert "model.vision_tower.encoder.layers.0.self_attn.q_proj is not in the base" in problem
    assert "(2 of its 6 layers); it was trained on another base model" in problem


def test_a_base_with_a_tower_is_routed_and_recorded(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    base = tmp_path / "base"
    new_base(MULTIMODAL).save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = load(str(base), saved(tmp_path / "expert", MULTIMODAL, ["q_proj", "down_proj"]))
    step = model.compare("Hi", ["single:expert", "spectr"], max_new_tokens=2)
    assert step.trace is not None
    assert step.trace.projections == ("q_proj", "down_proj")
    for column in ("single:expert", "spectr"):
        assert step.trace.share(column) == pytest.approx([1])


def test_a_tower_alone_is_no_expert(tmp_path: Path) -> None:
    folder = saved(tmp_path / "expert", TEXT, ["q_proj"])
    within = "base_model.model.model.vision_tower.encoder"
    renamed(folder, lambda key: key.replace("base_model.model.model", within))
    (problem,) = problems_of(folder, MULTIMODAL)
    assert "does not run when text is read (2 of its 2 layers); it was trained on other" in problem
    assert "is not in the base" in problems_of(folder, TEXT)[0], "never taken for the decoder"


def test_layers_whose_weights_are_read_elsewhere_change_nothing(tmp_path: Path) -> None:
    """Mamba multiplies by the weight of `dt_proj` itself, and PEFT's factors stay idle."""
    config = BASES["mamba"]
    folder = saved(tmp_path / "expert", config, ["in_proj", "x_proj", "dt_proj"])
    (note,) = assert_as_in_peft(folder, config).notes
    assert "2 of its 6 layers do not run when text is read (backbone.layers.0.mixer.dt_proj" in note


@pytest.mark.parametrize(
    ("change", "taken_out"),
    [
        (lambda key: f"_orig_mod.{key}", "'_orig_mod.'"),
        (lambda key: key.replace("model.model.", "model._orig_mod.model."), "'_orig_mod.'"),
        (lambda key: key.replace("layers.0.", "layers.0._orig_mod."), "'_orig_mod.'"),
        (lambda key: f"module.{key}", "'module.'"),
        (
            lambda key: key.replace("model.model.", "model._fsdp_wrapped_module._orig_mod.model."),
            "'_fsdp_wrapped_module.', '_orig_mod.'",
        ),
        (lambda key: key.replace(".weight", ".default.weight"), "'default.'"),
        (lambda key: f"_orig_mod.{key.replace('.weight', '.law.weight')}", "'_orig_mod.', 'law.'"),
    ],
    ids=["compiled", "compiled within", "a compiled layer", "DDP", "FSDP", "named", "both"],
)
def test_what_training_puts_into_names_is_taken_out(
    change: Callable[[str], str], taken_out: str, tmp_path: Path
) -> None:
    folder = renamed(saved(tmp_path / "expert", TEXT, ["q_proj", "down_proj"]), change)
    adapter = assert_as_in_peft(folder, TEXT)
    assert adapter.notes == (
        f"expert 'expert': {taken_out} was taken out of the names of its tensors",
    )


def test_a_configuration_may_name_layers_as_training_does(tmp_path: Path) -> None:
    """Of a compiled base, `_orig_mod` is in its target modules and patterns too."""
    settings = {
        "target_modules": ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"],
        "rank_pattern": {r"^model.layers.0.mlp.down_proj": 3},
        "alpha_pattern": {r"^model.layers.0.mlp.down_proj": 24},
    }
    folder = saved(tmp_path / "expert", TEXT, **settings)
    renamed(folder, lambda key: key.replace("model.layers", "_orig_mod.model.layers"))
    compiled = json.loads(json.dumps(settings).replace("model.layers", "_orig_mod.model.layers"))
    config = Path(folder) / CONFIG_FILE
    config.write_text(json.dumps(json.loads(config.read_text()) | compiled))
    assert assert_as_in_peft(folder, TEXT).ranks == (2, 3)


def test_the_names_of_older_checkpoints_are_known(tmp_path: Path) -> None:
    """NemotronH's layers were in `backbone`, which transformers renames in checkpoints too."""
    config = NemotronHConfig(**SMALL, layers_block_type=["attention", "mlp"], head_dim=16)
    folder = saved(tmp_path / "expert", config, ["q_proj", "down_proj"])
    renamed(folder, lambda key: key.replace("model.model.layers", "model.backbone.layers"))
    (note,) = assert_as_in_peft(folder, config).notes
    assert "(backbone.layers.0" in note


MIXTURE = MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)


@pytest.mark.filterwarnings("ignore")
def test_a_mixture_of_experts_is_one_line(tmp_path: Path) -> None:
    folder = saved(tmp_path / "expert", MIXTURE, "all-linear")
    (problem,) = problems_of(folder, MIXTURE)
    assert "it uses LoRA of parameters, as of a mixture's experts (target_parameters=[" in problem

    folder = saved(tmp_path / "older", MIXTURE, ["q_proj", "k_proj", "v_proj"])
    config = Path(folder) / CONFIG_FILE
    values = json.loads(config.read_text()) | {"target_modules": ["q_proj", "w1", "w3"]}
    config.write_text(json.dumps(values))

    def as_in_transformers_4(key: str) -> str:
        key = key.replace("self_attn.k_proj", "block_sparse_moe.experts.0.w1")
        return key.replace("self_attn.v_proj", "block_sparse_moe.experts.0.w3")

    (problem,) = problems_of(renamed(folder, as_in_transformers_4), MIXTURE)
    assert "layers.0.block_sparse_moe.experts.0.w1 is not in the base (4 of its 6" in problem
    assert "it keeps the experts of a mixture in one stacked tensor" in problem


def test_dense_layers_beside_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT now trains the mixture's parameters in their place. It left the mixture alone before."""
    config = BASES["deepseek_v3"]
    folder = saved(tmp_path / "expert", config, ["q_a_proj", "down_proj"])
    (problem,) = problems_of(folder, config)
    assert "of a mixture's experts (target_parameters=['down_proj'])" in problem
    of_down = [key for key in load_file(Path(folder) / WEIGHTS_FILE) if "q_a_proj" not in key]
    assert all(".layers.1.mlp.experts." in key for key in of_down)

    renamings = "peft.utils.transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING"
    monkeypatch.setattr(renamings, {})
    older = saved(tmp_path / "older", config, ["q_a_proj", "down_proj"])
    paths = assert_as_in_peft(older, config).shapes.keys()
    assert {path for path in paths if "q_a_proj" not in path} == {
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.shared_experts.down_proj",
    }


def test_another_base_is_one_line(tmp_path: Path) -> None:
    """... whether its layers are more, larger, or called otherwise."""
    larger = Gemma3TextConfig(**SMALL_TEXT | {"num_hidden_layers": 3, "intermediate_size": 192})
    folder = saved(tmp_path / "expert", larger, ["q_proj", "down_proj"])
    (problem,) = problems_of(folder, TEXT)
    assert problem.startswith(
        "expert 'expert': model.layers.0.mlp.down_proj has 192 inputs and 64 outputs, the base has "
        "128 and 64 (4 of its 6 layers); it was trained on another base model ("
    )
    (problem,) = problems_of(folder, BASES["gpt2"])
    assert "layers.0.mlp.down_proj is not in the base, whose " in problem
    assert "(6 of its 6 layers)" in problem


def test_a_module_with_two_names_is_one_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """... whether its factors are saved under one of them, or under both."""
    base = AutoModelForCausalLM.from_config(TEXT)
    base.model.layers[1].mlp = base.model.layers[0].mlp
    skeleton = Skeleton(model=base, inputs=None)
    monkeypatch.setattr("spectr_demo.experts.fit.skeleton_of", lambda config: skeleton)
    lora = LoraConfig(r=2, target_modules=["down_proj"])
    get_peft_model(deepcopy(base), lora).save_pretrained(tmp_path)
    first = load_file(tmp_path / WEIGHTS_FILE)
    assert all("layers.0." in key for key in first), "PEFT saves the first"
    second = {key.replace("layers.0.", "layers.1."): t.clone() for key, t in first.items()}
    for state in (first, second, first | second):
        save_file(state, tmp_path / WEIGHTS_FILE)
        (fitted,), problems = fit_adapters([read_adapter(tmp_path)], TEXT)
        assert problems == []
        assert list(fitted.shapes) == list(fitted.read()) == ["model.layers.0.mlp.down_proj"]


def test_two_layers_never_share_a_place(tmp_path: Path) -> None:
    folder = saved(tmp_path / "expert", TEXT, ["q_proj"])
    state = load_file(Path(folder) / WEIGHTS_FILE)
    twice = {
        key.replace("model.layers", "model.language_model.layers"): tensor.clone()
        for key, tensor in state.items()
    }
    save_file({**state, **twice}, Path(folder) / WEIGHTS_FILE)
    (problem,) = problems_of(folder, TEXT)
    assert "language_model.layers.0.self_attn.q_proj is not in the base" in problem
    assert "(2 of its 4 layers)" in problem
