"""A library on disk: the same experts, bit for bit, of which only what is used is read."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spectr_demo.cpu.filter import Arrows
from spectr_demo.cpu.pages import zeros_in_large_pages
from spectr_demo.experts import library
from spectr_demo.experts.adapters import AdapterError
from spectr_demo.experts.arrows import arrows_of
from spectr_demo.experts.library import ExpertLibrary, load_experts, read_adapters
from spectr_demo.experts.packed import INDEX_FILE, _digest, packed_adapters, verify
from spectr_demo.experts.packing import write_library
from spectr_demo.routing.bank import ExpertBank
from tests.conftest import SaveExpert, tiny_llama

FACTORS = "factors/0000.safetensors"


@pytest.fixture(scope="module")
def folders(save_expert: SaveExpert) -> list[str]:
    """Experts of several ranks, on several layers."""
    return [
        save_expert("all", seed=0),
        save_expert("attention", seed=1, r=2, target_modules=["q_proj", "v_proj"]),
        save_expert("query", seed=2, r=8, target_modules=["q_proj"]),
        save_expert("mixed", seed=3, rank_pattern={"q_proj": 6, "layers.1.mlp.up_proj": 2}),
    ]


@pytest.fixture
def model(tokenizer: Any) -> LlamaForCausalLM:
    return tiny_llama(len(tokenizer))


def packed(
    folders: list[str], model: LlamaForCausalLM, target: Path, dtype: torch.dtype = torch.float32
) -> Path:
    adapters, problems = read_adapters(folders, model.config)
    assert not problems
    write_library(adapters, model.config, target, dtype)
    return target


@pytest.fixture
def disk(folders: list[str], model: LlamaForCausalLM, tmp_path: Path) -> Path:
    return packed(folders, model, tmp_path / "disk")


def tensors_of(bank: ExpertBank) -> list[torch.Tensor]:
    return [bank.expert_ids, bank.A, *bank.B, bank.singular_values]


def assert_same(one: ExpertLibrary, other: ExpertLibrary) -> None:
    assert one.names == other.names
    for a, b in zip(one.adapters, other.adapters, strict=True):
        facts = [(x.base_model, x.sha256, x.num_bytes, list(x.shapes.items())) for x in (a, b)]
        assert facts[0] == facts[1]
    for bank, same in zip(one.banks, other.banks, strict=True):
        assert (bank.paths, bank.run) == (same.paths, same.run)
        for x, y in zip(tensors_of(bank), tensors_of(same), strict=True):
            assert x.dtype == y.dtype and torch.equal(x, y)
        for x, y in zip(arrows_of(bank), arrows_of(same), strict=True):
            assert (x == y).all()
    for factors, same_factors in zip(one.aligned, other.aligned, strict=True):
        assert list(factors) == list(same_factors)
        for path, aligned in factors.items():
            assert all(map(torch.equal, aligned, same_factors[path]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_library_bit_for_bit(
    folders: list[str],
    model: LlamaForCausalLM,
    tmp_path: Path,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = packed(folders, model, tmp_path / "disk", dtype)
    monkeypatch.setattr(library, "storage", lambda *_: (dtype, zeros_in_large_pages))
    expected = load_experts(folders, model)
    found = load_experts(disk, model)
    assert_same(found, expected)
    assert found.banks[0].A.dtype == dtype
    for adapter in found.adapters:
        assert adapter.source == str(disk / "experts" / adapter.name)
        assert adapter.packed is not None
        assert all(a is b for a, b in zip(adapter.packed.library.banks, found.banks, strict=True))
    update, same = (
        each.adapters[3].read()["model.layers.1.mlp.up_proj"] for each in (found, expected)
    )
    torch.testing.assert_close(
        update.scaling * update.lora_B @ update.lora_A,
        same.scaling * same.lora_B @ same.lora_A,
        rtol=0.02,
        atol=0.02,
    )


def test_layers_that_run_twice_have_a_bank_for_each_time(
    folders: list[str], model: LlamaForCausalLM, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Zamba2; here the index and the model say so."""
    groups = library.shared_inputs
    twice = lambda *given: [group._replace(num_runs=2) for group in groups(*given)]  # noqa: E731
    monkeypatch.setattr(library, "shared_inputs", twice)
    again = packed(folders, model, disk.parent / "twice")
    found = load_experts(again, model)
    assert_same(found, load_experts(folders, model))
    assert found.adapters[0].packed is not None
    assert found.banks[1] is found.adapters[0].packed.library.banks[1] and found.banks[1].run == 1
    # A library of layers that run once is copied into the banks that such a model needs.
    assert_same(load_experts(disk, model), found)


def resident(folder: Path) -> int:
    """Bytes of the factors in `folder` that this process has in memory."""
    total, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_ours = str(folder / "factors") in line
        elif is_ours and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="it needs /proc/self/smaps")
def test_memory_is_that_of_what_is_used(
    save_expert: SaveExpert, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    wide = save_expert("wide", r=64, target_modules=["q_proj", "k_proj", "v_proj"])
    disk = packed([f"e{i}={wide}" for i in range(48)], model, tmp_path / "disk")
    num_bytes = 0
    for file in (disk / "factors").iterdir():
        num_bytes += file.stat().st_size
        with file.open("rb+") as opened:  # what is in the system's cache is mapped with its pages
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    found = load_experts(disk, model)
    opened_bytes = resident(disk)
    assert num_bytes > 6e6 and opened_bytes < num_bytes / 10
    for bank in found.banks:
        arrows_of(bank)
        one = bank.folded(torch.arange(48) == 7, is_merged=False)
        assert one is not None and one.A.any()
    one_bytes = resident(disk)
    assert opened_bytes < one_bytes < num_bytes / 3
    of_A = sum(bank.A.nbytes for bank in found.banks)
    for bank in found.banks:
        bank.project(torch.ones(1, bank.A.shape[1]))
    assert of_A <= resident(disk) < num_bytes


def test_what_lies_beside_the_weights_is_kept(
    save_expert: SaveExpert, model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path
) -> None:
    """... and a tokenizer that several have, once."""
    sources = [save_expert(name, folder=tmp_path / "from") for name in ("red", "blue")]
    for source in map(Path, sources):
        tokenizer.save_pretrained(source)
        (source / "README.md").write_text(f"card of {source.name}")
    disk = packed(sources, model, tmp_path / "disk")
    shutil.rmtree(tmp_path / "from")
    for adapter in load_experts(disk, model).adapters:
        assert Path(adapter.source, "README.md").read_text() == f"card of {adapter.name}"
    found = sorted(str(file.relative_to(disk)) for file in disk.glob("experts/*/tokenizer.json"))
    assert found == ["experts/red/tokenizer.json"]


def test_one_expert_and_other_names(
    folders: list[str], model: LlamaForCausalLM, disk: Path
) -> None:
    some = [f"mine={disk}/experts/mixed", f"{disk}/experts/attention"]
    assert_same(load_experts(some, model), load_experts([f"mine={folders[3]}", folders[1]], model))
    beside = load_experts([disk, f"more={folders[0]}"], model)
    assert_same(beside, load_experts([*folders, f"more={folders[0]}"], model))
    for source, message in {
        f"x={disk}": "has 4 experts, needed one; name it as experts/NAME",
        f"{disk}/experts/nobody": "there is no folder",
        f"{disk}/factors": "has no adapter_config.json",
    }.items():
        with pytest.raises(AdapterError, match=re.escape(message)):
            load_experts(source, model)
    (disk / "experts" / "nobody").mkdir()
    with pytest.raises(AdapterError, match="has no expert 'nobody', needed one"):
        load_experts(f"{disk}/experts/nobody", model)


def test_another_base_is_refused_as_the_adapters_are(
    folders: list[str], tokenizer: Any, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    """... and of those that have the same layers and ranks, one is named."""
    disk = packed([*folders, f"as_all={folders[0]}"], model, tmp_path / "disk")
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
    )
    with pytest.raises(AdapterError) as error:
        load_experts(disk, LlamaForCausalLM(config))
    assert error.value.problems == read_adapters(folders, config).problems
    assert "has 64 inputs and 64 outputs, the base has 128 and 128" in str(error.value)


def test_experts_that_no_folder_can_be_called_after(
    folders: list[str], model: LlamaForCausalLM, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=r"expert '\.\.': no folder can have this name"):
        packed([f"..={folders[0]}"], model, tmp_path / "disk")
    assert not (tmp_path / "disk").exists()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def lengthen(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(bytes(100))


def spoil_header(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:8] + content[8:].replace(b'"A"', b'"C"', 1))


def spoil_kind(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"I32"'))


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        (FACTORS, cut, "factors/0000.safetensors: it has .* bytes, the index says"),
        (FACTORS, lengthen, "factors/0000.safetensors: it has .* bytes, the index says"),
        (FACTORS, Path.unlink, "factors/0000.safetensors: No such file"),
        (FACTORS, spoil_header, "its tensors are not those of the index"),
        (FACTORS, spoil_kind, "factors/0000.safetensors: .* is of I32"),
        ("details/0000.safetensors", cut, "details/0000.safetensors: it has .* bytes"),
        (INDEX_FILE, cut, "library.json: "),
        (INDEX_FILE, lambda file: file.write_text("[]"), "library.json: it is a list"),
        (
            INDEX_FILE,
            lambda file: file.write_text('{"format": 7}'),
            "its format is 7, this version",
        ),
    ],
)
def test_damage_is_one_message(
    model: LlamaForCausalLM,
    disk: Path,
    name: str,
    spoil: Callable[[Path], object],
    message: str,
) -> None:
    spoil(disk / name)
    with pytest.raises(AdapterError, match=f"^library .*{message}.*pack it again") as error:
        load_experts(disk, model)
    assert len(error.value.problems) == 1


def test_any_changed_byte_of_the_index_is_found(disk: Path) -> None:
    file = disk / INDEX_FILE
    sound = file.read_bytes()
    for place in range(0, len(sound), len(sound) // 100):
        file.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        with pytest.raises(AdapterError, match=r"library\.json"):
            packed_adapters(disk, None)


def test_changed_factors_are_found_when_all_is_compared(
    model: LlamaForCausalLM, disk: Path
) -> None:
    verify(disk)
    file = disk / FACTORS
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    load_experts(disk, model)  # which reads the headers alone
    with pytest.raises(AdapterError, match=r"factors/0000\.safetensors: not what was packed"):
        verify(disk)
    (disk / "details" / "0001.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"and 1 more: not what was packed"):
        verify(disk)


STRANGE: dict[str, Callable[[Any], object]] = {
    "a rank": lambda index: index["banks"][0].update(rank=9),
    "a rank of none": lambda index: index["banks"][0].update(rank=0),
    "a width": lambda index: index["banks"][0].update(D_in=128),
    "an output": lambda index: index["banks"][0].update(D_out=[1] * 9),
    "runs": lambda index: index["banks"][0].update(num_runs=0),
    "a text": lambda index: index["banks"][0].update(D_in="64"),
    "no path": lambda index: index["banks"][0].update(paths=[], D_out=[]),
    "a bank twice": lambda index: index["banks"].append(index["banks"][0]),
    "a bank of nobody": lambda index: index["banks"].append(
        {**index["banks"][0], "paths": ["x"], "D_out": [4]}
    ),
    "a layout": lambda index: index["experts"][0].update(layout=9),
    "a layout before": lambda index: index["experts"][0].update(layout=-1),
    "a layout's rank": lambda index: index["layouts"][0].update({"model.layers.0.mlp.up_proj": 99}),
    "a part of a bank": lambda index: index["layouts"][1].pop("model.layers.0.self_attn.v_proj"),
    "a layer elsewhere": lambda index: index["layouts"][0].update({"elsewhere": 4}),
    "a name twice": lambda index: index["experts"][0].update(name="query"),
    "a name outside": lambda index: index["experts"][0].update(name="../../all"),
    "the folder above": lambda index: index["experts"][0].update(name=".."),
    "a dtype": lambda index: index.update(dtype="float64"),
    "the other dtype": lambda index: index.update(dtype="bfloat16"),
    "a file": lambda index: index["files"].pop(FACTORS),
    "a key": lambda index: index.update(more=1),
    "no experts": lambda index: index.update(experts=[]),
}


@pytest.mark.parametrize("name", STRANGE)
def test_an_index_that_fits_nothing_is_refused(
    name: str, model: LlamaForCausalLM, disk: Path
) -> None:
    """Whoever made it has signed it."""
    file = disk / INDEX_FILE
    document = json.loads(file.read_text())
    STRANGE[name](document["library"])
    document["sha256"] = _digest(document["library"])
    file.write_text(json.dumps(document))
    with pytest.raises(AdapterError):
        load_experts(disk, model)


def test_the_cache_of_alignments_is_left_alone(
    model: LlamaForCausalLM, disk: Path, cache_folder: Path
) -> None:
    """There the factors of the adapter's files are kept, not those that were rounded here."""
    adapter = load_experts(disk, model).adapters[0]
    library.align_adapter(adapter)
    assert not (cache_folder / "aligned").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads what the system has mapped")
def test_to_open_a_library_touches_no_factor(model: LlamaForCausalLM, disk: Path) -> None:
    """A system may read far ahead of what is touched."""
    found = load_experts(disk, model)
    resident = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-", line):
            mapped = line
        elif line.startswith("Rss:") and str(disk / "factors") in mapped:
            resident[mapped] = int(line.split()[1])
    assert len(resident) == len(found.banks)
    assert set(resident.values()) == {0}


def test_arrows_are_mapped(model: LlamaForCausalLM, disk: Path) -> None:
    found = load_experts(disk, model)
    for bank in found.banks:
        rank = bank.singular_values.shape[-1]
        for mapped, made in zip(arrows_of(bank), Arrows.of(bank.A[::rank]), strict=True):
            assert not mapped.flags.owndata and (mapped == made).all()
