"""Reading, checking and stacking adapters: each supported variety of PEFT, and each bad one."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from spectr_demo.experts import library
from spectr_demo.experts.adapters import CONFIG_FILE, WEIGHTS_FILE, AdapterError, read_adapter
from spectr_demo.experts.inspection import warnings
from spectr_demo.experts.library import _short_names, align_adapter, load_experts
from spectr_demo.routing.spectr import Aligned
from tests.conftest import (
    EXPERT_NAMES,
    PROJECTIONS,
    BuildModel,
    SaveExpert,
    banks_by_path,
    tiny_llama,
)


@pytest.fixture
def folder(save_expert: SaveExpert, tmp_path: Path) -> Path:
    """A sound adapter's folder that a test may spoil."""
    return Path(save_expert("sound", seed=3, folder=tmp_path))


def spoil_config(folder: Path, **changes: object) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil_weights(folder: Path, change: object) -> None:
    state = load_file(folder / WEIGHTS_FILE)
    change(state)  # type: ignore[operator]
    save_file(state, folder / WEIGHTS_FILE)


def test_factors_and_scaling(folder: Path) -> None:
    adapter = read_adapter(str(folder))
    assert adapter.name == "sound"
    assert len(adapter.read()) == 14
    assert adapter.ranks == (4, 4)
    factors = adapter.read()["model.layers.1.mlp.down_proj"]
    assert factors.lora_A.shape == (4, 128)
    assert factors.lora_B.shape == (64, 4)
    assert factors.scaling == 8 / 4  # PEFT's default lora_alpha is 8


def test_a_folder_of_adapters_is_each_of_them(
    save_expert: SaveExpert, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    for seed, name in enumerate(("red", "blue")):
        save_expert(name, seed=seed, folder=tmp_path / "mine")
    other = save_expert("green", seed=2, folder=tmp_path)
    (tmp_path / "mine" / "notes").mkdir()
    library = load_experts([tmp_path / "mine", f"last={other}"], llama)
    assert library.names == ("blue", "red", "last")
    # An adapter that PEFT saved with others inside it is the one that is named.
    save_expert("inner", folder=Path(other))
    assert load_experts(other, llama).names == ("green",)
    with pytest.raises(AdapterError, match=f"notes has no {CONFIG_FILE}"):
        load_experts(str(tmp_path / "mine" / "notes"), llama)


def test_patterns_and_rslora_scale_as_in_peft(save_expert: SaveExpert) -> None:
    folder = save_expert(
        "patterned",
        r=4,
        lora_alpha=16,
        use_rslora=True,
        rank_pattern={"q_proj": 2, "layers.1.self_attn.k_proj": 6},
        alpha_pattern={"q_proj": 4},
    )
    factors = read_adapter(folder).read()
    assert factors["model.layers.0.self_attn.q_proj"].scaling == pytest.approx(4 / math.sqrt(2))
    assert factors["model.layers.1.self_attn.k_proj"].lora_A.shape[0] == 6
    assert factors["model.layers.1.self_attn.k_proj"].scaling == pytest.approx(16 / math.sqrt(6))
    assert factors["model.layers.0.self_attn.k_proj"].scaling == pytest.approx(16 / 2)
    assert read_adapter(folder).ranks == (2, 6)


def test_ranks_and_target_modules_may_differ(
    build_model: BuildModel, save_expert: SaveExpert
) -> None:
    """A layer that an expert does not touch never gives it weight; its text is PEFT's own."""
    attention = save_expert("attention", seed=1, r=2, target_modules=["q_proj", "v_proj"])
    feedforward = save_expert("feedforward", seed=2, r=8, target_modules=["v_proj", "up_proj"])
    model = build_model([attention, feedforward])
    banks = banks_by_path(model.library)
    assert model.library.projections == ("q_proj", "v_proj", "up_proj")
    assert banks["model.layers.0.self_attn.q_proj"].expert_ids.tolist() == [0]
    assert banks["model.layers.0.self_attn.v_proj"].expert_ids.tolist() == [0, 1]
    assert banks["model.layers.0.self_attn.v_proj"].singular_values.shape == (1, 2, 8)
    assert banks["model.layers.0.mlp.up_proj"].expert_ids.tolist() == [1]

    columns = ["spectr-paper", "uniform", "single:attention"]
    step = model.compare("Hello", columns, max_new_tokens=4)
    assert step.trace is not None
    routed = step.trace.column("spectr-paper")
    up_proj = step.trace.projection_index("up_proj")
    assert set(routed.experts[:-1, :, up_proj].ravel().tolist()) == {1, -1}
    assert routed.weights[:-1].sum(-1) == pytest.approx(1)
    uniform = step.trace.column("uniform").weights.sum(-1)[0, 0]
    assert uniform.tolist() == [0.5, 1.0, 0.5], "the mean of the deltas, as in PEFT's cat"
    alone = build_model([attention]).compare("Hello", ["single:attention"], max_new_tokens=4)
    assert alone.columns[0].text == step.columns[2].text


def test_hub_ids_are_fetched_in_the_hubs_layout(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, the hub client reads its own cache: the layout is the Hub's, the path is real."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--someone--their-expert"
    snapshot = repo / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(folder, snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(snapshot.name)
    adapter = read_adapter("someone/their-expert")
    assert adapter.name == "their-expert"
    assert adapter.sha256 == read_adapter(str(folder)).sha256
    with pytest.raises(AdapterError, match=r"the Hub did not give it.*check the name and the netw"):
        read_adapter("someone/other-expert")


def test_alignment_is_cached_by_content(
    folder: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = read_adapter(str(folder))
    first = align_adapter(adapter)
    with monkeypatch.context() as patch:
        patch.setattr(library, "align_in_groups", lambda adapter: pytest.fail("aligned again"))
        _assert_same(align_adapter(adapter), first)
    spoil_weights(folder, lambda state: next(iter(state.values())).add_(1))
    align_adapter(read_adapter(str(folder)))
    assert len(list((cache_folder / "aligned").iterdir())) == 2, "other weights, another entry"


def test_a_changed_alignment_is_made_again(
    folder: Path, cache_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """... wherever the file was changed, and whoever wrote it."""
    adapter = read_adapter(str(folder))
    first = align_adapter(adapter)
    (cached,) = (cache_folder / "aligned").iterdir()
    sound = cached.read_bytes()
    for place in [0, 9, 100, *range(200, len(sound), len(sound) // 25), len(sound) - 1]:
        cached.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        caplog.clear()
        _assert_same(align_adapter(adapter), first)
        assert caplog.messages == [f"{cached} is damaged and is made again"], place
        assert cached.read_bytes() == sound


def test_a_spoiled_or_unwritable_cache_costs_time_only(folder: Path, cache_folder: Path) -> None:
    adapter = read_adapter(str(folder))
    first = align_adapter(adapter)
    (cached,) = (cache_folder / "aligned").iterdir()
    cached.write_bytes(cached.read_bytes()[:100])
    _assert_same(align_adapter(adapter), first)
    assert cached.stat().st_size > 100, "written again"
    shutil.rmtree(cache_folder)
    cache_folder.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="could not be cached in .*SPECTR_CACHE"):
        _assert_same(align_adapter(adapter), first)


def _assert_same(first: dict[str, Aligned], second: dict[str, Aligned]) -> None:
    for path, factors in first.items():
        assert_close(factors.B @ factors.A, second[path].B @ second[path].A)


def missing_config(folder: Path) -> None:
    (folder / CONFIG_FILE).unlink()


def missing_weights(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()


def pickled(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")


def truncated(folder: Path) -> None:
    weights = folder / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-1000])


def garbage(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes(b"\xff" * 2000)


def not_json(folder: Path) -> None:
    (folder / CONFIG_FILE).write_text("{")


def other_method(folder: Path) -> None:
    spoil_config(folder, peft_type="IA3")


def dora(folder: Path) -> None:
    spoil_config(folder, use_dora=True)


def modules_to_save(folder: Path) -> None:
    spoil_config(folder, modules_to_save=["lm_head"])


def pissa(folder: Path) -> None:
    spoil_config(folder, init_lora_weights="pissa")


def shards(folder: Path) -> None:
    spoil_weights(folder, lambda state: state.update({k: torch.zeros(0) for k in state}))


def flat_shards(folder: Path) -> None:
    spoil_weights(folder, lambda state: state.update({k: v.flatten() for k, v in state.items()}))


def integers(folder: Path) -> None:
    spoil_weights(
        folder, lambda state: state.update({k: v.to(torch.int8) for k, v in state.items()})
    )


def several(folder: Path) -> None:
    def name(state: dict[str, torch.Tensor]) -> None:
        for key in list(state):
            for adapter in ("law", "code"):
                state[key.replace(".weight", f".{adapter}.weight")] = state[key].clone()
            del state[key]

    spoil_weights(folder, name)


def trained_bias(folder: Path) -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"
    spoil_weights(folder, lambda state: state.update({key: torch.zeros(64)}))


def nan(folder: Path) -> None:
    spoil_weights(folder, lambda state: next(iter(state.values())).fill_(math.nan))


def infinite(folder: Path) -> None:
    spoil_weights(folder, lambda state: next(iter(state.values()))[0].fill_(math.inf))


def embedding(folder: Path) -> None:
    key = "base_model.model.model.embed_tokens.lora_embedding_A"
    spoil_weights(folder, lambda state: state.update({key: torch.zeros(4, 8)}))


def other_rank(folder: Path) -> None:
    spoil_config(folder, r=8)


def half_a_pair(folder: Path) -> None:
    spoil_weights(folder, lambda state: state.pop(sorted(state)[0]))


def wrong_shape(folder: Path) -> None:
    def widen(state: dict[str, torch.Tensor]) -> None:
        key = next(key for key in state if key.endswith("q_proj.lora_A.weight"))
        state[key] = torch.zeros(4, 512)

    spoil_weights(folder, widen)
    spoil_config(folder, base_model_name_or_path="someone/larger-base")


def missing_layers(folder: Path) -> None:
    def rename(state: dict[str, torch.Tensor]) -> None:
        for key in [key for key in state if "layers.1." in key]:
            state[key.replace("layers.1.", "layers.31.")] = state.pop(key)

    spoil_weights(folder, rename)


def output_embedding(folder: Path) -> None:
    state = {
        "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64),
        "base_model.model.lm_head.lora_B.weight": torch.zeros(258, 4),
    }
    spoil_weights(folder, lambda old: old.update(state))
    spoil_config(folder, target_modules=[*PROJECTIONS, "lm_head"])


SPOILED = {
    missing_config: f"has no {CONFIG_FILE}",
    missing_weights: f"has no weights; {WEIGHTS_FILE} is needed",
    pickled: "only pickled weights .*save the adapter again with safetensors",
    truncated: "corrupt or truncated",
    garbage: "corrupt or truncated",
    not_json: "is not a JSON object",
    other_method: "peft_type is 'IA3'; only 'LORA'",
    dora: "DoRA .*not supported",
    modules_to_save: "modules_to_save=.*not supported",
    pissa: "changes the base.s own weights .init_lora_weights=",
    shards: r"has shape .0,. .as 28 tensors do.; DeepSpeed ZeRO-3 and FSDP",
    flat_shards: r"has shape .512,. .as 28 tensors do.; DeepSpeed ZeRO-3 and FSDP",
    integers: r"holds int8 .as 28 tensors do.; floating point was needed",
    several: r"of several adapters .named 'code', 'law'.; one was needed",
    trained_bias: "1 tensors .*q_proj.base_layer.bias.*; trained biases or other parts",
    nan: "holds NaN or infinite values",
    infinite: "holds NaN or infinite values",
    embedding: "embedding layers or other parts than linear layers are not supported",
    other_rank: "says rank 8 .as 14 layers do.; the two files do not belong together",
    half_a_pair: "it needs both",
    wrong_shape: "512 inputs and 64 outputs, the base has 64 and 64 .*larger-base",
    missing_layers: "layers.31.* not in the base, .*no .31. .7 of its 14 layers.; .*another base",
    output_embedding: "the output embedding",
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_a_bad_adapter_is_named_with_what_is_wrong(
    spoil: object, folder: Path, llama: LlamaForCausalLM
) -> None:
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(AdapterError, match=SPOILED[spoil]) as caught:  # type: ignore[index]
        load_experts([str(folder)], llama)
    (problem,) = caught.value.problems
    assert problem.startswith("expert 'sound': ")
    assert not any("lora" in name for name, _ in llama.named_modules()), "nothing was attached"


def test_all_that_is_wrong_with_all_of_them_is_one_error(
    save_expert: SaveExpert, tmp_path: Path, llama: LlamaForCausalLM, expert_folders: list[str]
) -> None:
    folders = [Path(save_expert(name, folder=tmp_path)) for name in ("one", "two", "three")]
    dora(folders[0])
    nan(folders[0])
    truncated(folders[1])
    wrong_shape(folders[2])
    sources = [*map(str, folders), *expert_folders, expert_folders[0], str(tmp_path / "nowhere")]
    with pytest.raises(AdapterError) as caught:
        load_experts(sources, llama)
    problems = caught.value.problems
    for name, needed in [
        ("one", "DoRA"),
        ("one", "NaN"),
        ("two", "truncated"),
        ("three", "512 inputs"),
        ("red", "2 adapters have this name"),
        ("nowhere", "there is no folder"),
    ]:
        assert any(p.startswith(f"expert {name!r}") and needed in p for p in problems), problems
    assert len(problems) == 6


def test_sources_are_folders_paths_and_names(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: LlamaForCausalLM
) -> None:
    """... one or several. A path with an equals sign is a path."""
    run = folder.rename(tmp_path / "lr=1e-4")
    expected = read_adapter(run).sha256
    monkeypatch.chdir(tmp_path)
    for sources, name in {
        str(run): "lr=1e-4",
        f"law={run}": "law",
        "law=./lr=1e-4": "law",
        "lr=1e-4": "lr=1e-4",
        "./lr=1e-4": "lr=1e-4",
        run: "lr=1e-4",
        Path("lr=1e-4"): "lr=1e-4",
    }.items():
        for given in (sources, [sources], (sources,)):
            (adapter,) = load_experts(given, llama).adapters
            assert (adapter.name, adapter.sha256) == (name, expected)
    with pytest.raises(AdapterError, match=r"^expert 'lr': there is no folder \./2e-4; give"):
        load_experts("lr=./2e-4", llama)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
def test_small_numbers_are_widened_as_in_peft(
    dtype: torch.dtype, folder: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    spoil_weights(folder, lambda state: state.update({k: v.to(dtype) for k, v in state.items()}))
    peft = PeftModel.from_pretrained(tiny_llama(len(tokenizer)), folder)
    library = load_experts(folder, llama)
    for path, aligned in library.aligned[0].items():
        layer = peft.base_model.model.get_submodule(path)
        assert_close(aligned.B @ aligned.A, layer.get_delta_weight("default"))


def test_what_was_renamed_is_said(
    folder: Path, llama: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    def rename(state: dict[str, torch.Tensor]) -> None:
        for key in list(state):
            state[key.replace("model.layers", "model.language_model.layers")] = state.pop(key)

    spoil_weights(folder, rename)
    (note,) = warnings(load_experts(folder, llama))
    assert "14 of its 14 layers have other names here" in note
    assert caplog.messages == [note]


def test_renaming_makes_two_of_one_name_possible(
    expert_folders: list[str], llama: LlamaForCausalLM
) -> None:
    library = load_experts([expert_folders[0], f"again={expert_folders[0]}"], llama)
    assert library.names == (EXPERT_NAMES[0], "again")
    assert library.index("again") == 1
    with pytest.raises(ValueError, match=r"unknown expert 'agian'.*Did you mean 'again'"):
        library.index("agian")


def test_the_stacked_factors_are_the_only_copy(
    expert_folders: list[str], llama: LlamaForCausalLM, save_expert: SaveExpert
) -> None:
    """... and give every expert its own again, whatever rank it is padded to."""
    folders = [*expert_folders, save_expert("small", seed=9, r=2, target_modules=["v_proj"])]
    library = load_experts(folders, llama)
    for adapter, expert in zip(library.adapters, library.aligned, strict=True):
        expected = align_adapter(adapter)
        assert expert.keys() == expected.keys()
        for path, layer in expert.items():
            assert_close(layer, expected[path])
    stacked = {t.untyped_storage().data_ptr() for b in library.banks for t in (b.A, *b.B)}
    held = {t.untyped_storage().data_ptr() for e in library.aligned for a in e.values() for t in a}
    assert held == stacked


def test_four_bit_layers_take_experts(llama: LlamaForCausalLM, expert_folders: list[str]) -> None:
    import bitsandbytes as bnb

    from spectr_demo.engine.layers import Place, RoutedLinear, routed
    from spectr_demo.engine.plan import RoutingPlan
    from spectr_demo.routing.routers import parse_router

    dense = llama.model.layers[0].mlp.up_proj
    quantized = bnb.nn.Linear4bit(64, 128, bias=False, quant_type="nf4")
    quantized.load_state_dict({"weight": dense.weight.data})
    quantized.to("cpu")
    llama.model.layers[0].mlp.up_proj = quantized
    library = load_experts(expert_folders, llama)
    path = "model.layers.0.mlp.up_proj"
    bank = banks_by_path(library)[path]
    place = Place(bank, 0, (quantized.forward,))
    layer, x = RoutedLinear(quantized, path, [place]).eval(), torch.randn(1, 3, 64)
    factors = library.adapters[1].read()[path]
    expected = quantized(x) + factors.scaling * x @ factors.lora_A.mT @ factors.lora_B.mT
    plan = RoutingPlan([parse_router("single:green", library.names)], library.names)
    with torch.no_grad(), routed(plan):
        assert_close(layer(x), expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["model.layers.*.self_attn.q_proj", "model.layers.*.mlp.up_proj"], ["q_proj", "up_proj"]),
        (
            ["transformer.h.*.attn.c_proj", "transformer.h.*.mlp.c_proj", "transformer.h.*.c_fc"],
            ["attn.c_proj", "mlp.c_proj", "c_fc"],
        ),
        (
            ["model.low.layers.*.q_proj", "model.high.layers.*.q_proj", "model.high.layers.*.o"],
            ["model.low.layers.*.q_proj", "model.high.layers.*.q_proj", "o"],
        ),
        (["model.merge.0", "model.merge.1", "model.embed"], ["merge.0", "merge.1", "embed"]),
        (["model.layers.*.router", "model.layers.*.router (run 2)"], ["router", "router (run 2)"]),
        (
            ["a.layers.*.x.up", "a.layers.*.x.up (run 2)", "a.layers.*.y.up"],
            ["x.up", "x.up (run 2)", "y.up"],
        ),
    ],
)
def test_projections_have_short_names(paths: list[str], names: list[str]) -> None:
    """The last one where only one has it, else the path inside the layer, else the whole."""
    assert list(_short_names(paths)) == names
