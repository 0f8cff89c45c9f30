"""Adapters that are made to do harm, or are broken in an odd way: one clear, short message, soon.

Each was found by hand or by `tests/fuzz`; each stands for its kind.
"""

import errno
import json
import math
import os
import re
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from spectr_demo.__main__ import main
from spectr_demo.experts.adapters import CONFIG_FILE, WEIGHTS_FILE, AdapterError, read_adapter
from spectr_demo.experts.library import load_experts
from spectr_demo.experts.messages import MOST_SAID, shown
from tests.conftest import SaveExpert

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
MOST_SECONDS = 6.0


@pytest.fixture
def folder(save_expert: SaveExpert, tmp_path: Path) -> Path:
    """A sound adapter's folder that a test may spoil."""
    return Path(save_expert("sound", seed=3, target_modules=["q_proj", "up_proj"], folder=tmp_path))


def refused(source: str | Path, llama: LlamaForCausalLM | None = None) -> str:
    """The message with which an adapter is refused: of one line for each thing, and bounded."""
    begin, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterError) as caught:
        load_experts(str(source), llama) if llama else read_adapter(source)
    assert time.process_time() - begin < MOST_SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300_000, "KB"
    for problem in caught.value.problems:
        assert problem.startswith("expert ")
        assert problem.isprintable()
        assert len(problem) <= MOST_SAID + 3
    return str(caught.value)


def write_config(folder: Path, **values: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def header_of(folder: Path) -> tuple[dict[str, Any], bytes]:
    """... and what follows it, of which a megabyte is enough."""
    with (folder / WEIGHTS_FILE).open("rb") as file:
        return json.loads(file.read(struct.unpack("<Q", file.read(8))[0])), file.read(1_000_000)


def in_one_row(header: dict[str, Any]) -> int:
    """Gives the tensors of float32 their bytes, one after another; how many bytes there are."""
    place = 0
    for entry in (header[name] for name in header if name != "__metadata__"):
        size = 4 * math.prod(entry["shape"])
        entry["data_offsets"] = [place, place + size]
        place += size
    return place


def write_header(folder: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(text)) + text + data)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a rank pattern that is a text": ({"rank_pattern": "x"}, "rank_pattern is 'x', needed: "),
    "a rank pattern that is a number": ({"rank_pattern": 5}, "rank_pattern is 5, needed: "),
    "a rank pattern that is a list": ({"rank_pattern": [1]}, r"rank_pattern is \[1\], needed: "),
    "half an expression": ({"alpha_pattern": {"(": 4}}, r"'\(' is no regular expression \(miss"),
    "a large count": ({"alpha_pattern": {"a{99999999999}": 4}}, "the repetition number is too"),
    "counts of counts": ({"alpha_pattern": {"((a{99}){99}){99}": 4}}, "repeats its parts too of"),
    "alpha as a text": ({"lora_alpha": "16"}, "lora_alpha is '16', needed: a number from"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha is None, needed: a number"),
    "a list of alphas": ({"lora_alpha": []}, r"lora_alpha is \[\], needed: a number"),
    "alpha NaN": ({"lora_alpha": math.nan}, "lora_alpha is nan, needed: a number"),
    "alpha infinite": ({"lora_alpha": math.inf}, "lora_alpha is inf, needed: a number"),
    "a large alpha": ({"lora_alpha": 1e308}, r"lora_alpha is 1e\+308, needed: a number"),
    "a whole number that no float holds": ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
    "a large rank": ({"r": 10**400}, "r is 1000.*, needed: a whole number from 1 to 2048"),
    "rank 0": ({"r": 0}, "r is 0, needed: a whole number from 1"),
    "a rank of true": ({"r": True}, "r is True, needed: a whole number"),
    "200 brackets": ({"target_modules": "(" * 200}, "is no regular expression"),
    "900 brackets": ({"target_modules": "(" * 900 + ")" * 900}, "is no regular expression"),
    "a pattern of 200,000 characters": ({"target_modules": "a+" * 100_000}, "200000 characters"),
    "200,000 patterns": (
        {"rank_pattern": {f"layers.{i}": 4 for i in range(200_000)}},
        "has 4.* bytes, at most 4000000 are read|needed: up to 10000 names",
    ),
    "20,000 patterns": ({"rank_pattern": {f"l.{i}": 4 for i in range(20_000)}}, "up to 10000 na"),
    "3,000 expressions": ({"rank_pattern": {f"l.{i}+": 4 for i in range(3000)}}, "3000 of its pa"),
    "names that are no texts": ({"target_modules": ["q_proj", 3]}, "target_modules is .*needed"),
    "layers that are no numbers": ({"layers_to_transform": ["0"]}, "layers_to_transform is"),
    "a field of another place": ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_tr"),
    "2,000 expressions that compile slowly": (
        {"rank_pattern": {f"(?i:{'[!-~]' * 300}){i}": 4 for i in range(2000)}},
        "its patterns take too long; name the layers instead",
    ),
    "all at once": (
        {"r": "4", "lora_alpha": None, "use_rslora": 7},
        "r is '4'.*; lora_alpha is None.*; use_rslora is 7",
    ),
    "a base that is a list": ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path is"),
    "control characters in a name": ({"\x1b[2J\nforged": 1}, r"\\x1b\[2J\\nforged"),
    "a long name": ({"x" * 63_000: 1}, r"a setting that is not known here \(x+\.\.\.x+=1\)"),
    "control characters in a value": ({"use_dora": "\x1b[2J\nforged"}, r"use_dora='\\x1b\[2J\\n"),
    "another method, of 63,000 characters": ({"peft_type": "x" * 63_000}, "its peft_type is 'xxx"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_bad_value_is_named(case: str, folder: Path) -> None:
    values, message = CONFIGS[case]
    write_config(folder, **values)
    assert re.search(message, refused(folder))


DEEP = 100_000
TEXTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nested lists": (lambda c: c[:-1] + b',"x":' + b"[" * DEEP + b"]" * DEEP + b"}", "too deep"),
    "nested objects": (lambda c: b'{"a":' * DEEP + b"1" + b"}" * DEEP, "nested too deep"),
    "brackets alone": (lambda c: b"[" * DEEP, "is not a JSON object"),
    "one key twice": (lambda c: c[:-1] + b', "r": 2}', "it has 'r' twice"),
    "two spellings of one key": (lambda c: c[:-1] + b', "\\u0072": 2}', "it has 'r' twice"),
    "a list": (lambda c: b"[]", "it is a list"),
    "null": (lambda c: b"null", "it is a NoneType"),
    "nothing": (lambda c: b"", "is not a JSON object"),
    "no text": (lambda c: b"\xff\xfe" + c, "is not a JSON object"),
    "a number of 5,000 digits": (lambda c: c[:-1] + b', "x": ' + b"9" * 5000 + b"}", "not a JSON"),
    "five million blanks": (lambda c: c + b" " * 5_000_000, "bytes, at most 4000000 are read"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_bad_configuration_is_named(case: str, folder: Path) -> None:
    change, message = TEXTS[case]
    file = folder / CONFIG_FILE
    file.write_bytes(change(file.read_bytes()))
    assert re.search(message, refused(folder))


def test_numbers_as_peft_writes_them_are_taken(folder: Path) -> None:
    for alpha, scaling in ((16.0, 4), (0.5, 0.125), (-8, -2), (0, 0)):
        write_config(folder, lora_alpha=alpha, rank_pattern=None, use_rslora=None)
        factors = read_adapter(folder).read()
        assert {layer.scaling for layer in factors.values()} == {scaling}


@pytest.mark.parametrize("pattern", [r"(([a-z_.0-9])+)+#", r"(([a-z_.0-9])+)+(?!.)(?!x|$)y"])
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "target_modules"])
def test_a_pattern_does_not_hold_the_reader(pattern: str, field: str, folder: Path) -> None:
    write_config(folder, **{field: pattern if field == "target_modules" else {pattern: 8}})
    begin = time.process_time()
    try:
        assert len(read_adapter(folder).shapes) == 4
    except AdapterError as error:
        assert "take too long" in str(error) or "is not among" in str(error)  # noqa: PT017
    assert time.process_time() - begin < MOST_SECONDS


@pytest.mark.parametrize(
    "source",
    [
        "x" * 300,
        "~nobody/x",
        "owner/" + "x" * 300,
        "a/b\x00c",
        "/" * 5000,
        "./" + "y" * 300,
        "\n",
        "",
    ],
)
def test_a_source_that_is_none_is_named(source: str, llama: LlamaForCausalLM) -> None:
    assert len(refused(source, llama)) < 1000


def no_tensors(folder: Path) -> None:
    write_header(folder, {}, b"")


def many_tensors(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    write_header(folder, {f"x{i}": entry for i in range(150_000)}, b"")


def long_header(folder: Path) -> None:
    write_header(folder, b'{"__metadata__": {"a": "' + b"x" * 20_000_000 + b'"}}', b"")


def deep_header(folder: Path) -> None:
    write_header(folder, b'{"__metadata__": ' + b"[" * DEEP + b"]" * DEEP + b"}", b"")


def claimed_header(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", 2**63) + b"{}")


def two_spellings(folder: Path) -> None:
    header, data = header_of(folder)
    text = json.dumps(header).encode()
    name = f'"{PREFIX}.lora_A.weight": '.encode()
    again = text[text.index(name) + len(name) :].partition(b"}")[0] + b"}"
    assert b'"dtype"' in again
    write_header(folder, text[:-1] + b', "\\u0062' + name[2:] + again + b"}", data)


def two_names(folder: Path) -> None:
    state = load_file(folder / WEIGHTS_FILE)
    for part in ("A", "B"):
        name = f"{PREFIX}.lora_{part}.weight"
        state[f"_orig_mod.{name}"] = state[name] + 1
    save_file(state, folder / WEIGHTS_FILE)


def control_characters(folder: Path) -> None:
    header, data = header_of(folder)
    header[f"{PREFIX}\n\x1b[31m.lora_A.weight"] = header.pop(f"{PREFIX}.lora_A.weight")
    write_header(folder, header, data)


def long_name(folder: Path) -> None:
    header, data = header_of(folder)
    header[f"{PREFIX * 1300}.lora_A.weight"] = header.pop(f"{PREFIX}.lora_A.weight")
    write_header(folder, header, data)


def of_kind(kind: str, bits: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        header, _ = header_of(folder)
        place = 0
        for name, entry in header.items():
            if name != "__metadata__":
                size = math.prod(entry["shape"]) * bits // 8
                entry |= {"dtype": kind, "data_offsets": [place, place + size]}
                place += size
        write_header(folder, header, bytes(place))

    change.__name__ = kind
    return change


def without_room(folder: Path, header: dict[str, Any]) -> None:
    """A file that has all bytes of its tensors, and takes no room on the disk."""
    size = in_one_row(header)
    write_header(folder, header, b"")
    os.truncate(folder / WEIGHTS_FILE, (folder / WEIGHTS_FILE).stat().st_size + size)


def wide(rank: int, width: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        header, _ = header_of(folder)
        header[f"{PREFIX}.lora_A.weight"]["shape"] = [rank, width]
        without_room(folder, header)

    change.__name__ = f"{rank} x {width}"
    return change


def wide_and_consistent(folder: Path) -> None:
    """Its configuration says that rank, too: 4 GB, which do not fit the base."""
    write_config(folder, rank_pattern={"layers.0.self_attn.q_proj": 1024})
    header, _ = header_of(folder)
    header[f"{PREFIX}.lora_A.weight"]["shape"] = [1024, 1_000_000]
    header[f"{PREFIX}.lora_B.weight"]["shape"] = [64, 1024]
    without_room(folder, header)


def a_folder(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (folder / WEIGHTS_FILE).mkdir()


def large_numbers(folder: Path) -> None:
    state = load_file(folder / WEIGHTS_FILE)
    save_file({key: tensor * 1e20 for key, tensor in state.items()}, folder / WEIGHTS_FILE)


def large_doubles(folder: Path) -> None:
    state = load_file(folder / WEIGHTS_FILE)
    doubles = {key: tensor.double() * 1e300 for key, tensor in state.items()}
    save_file(doubles, folder / WEIGHTS_FILE)


WEIGHTS: dict[Callable[[Path], None], str] = {
    no_tensors: "holds no LoRA factors",
    many_tensors: "has 150000 tensors, at most 100000 are read",
    long_header: "has a header of 200000.. bytes, at most 20000000 are read",
    deep_header: "nested too deep",
    claimed_header: r"corrupt or truncated \(a header of 9223372036854775808 bytes in a file of 10",
    two_spellings: r"it has 'base_model.*lora_A.weight' twice",
    two_names: r"lora_A.weight and base_model.* are one factor \(as 2 pairs do\); save it again",
    control_characters: r"the name of a tensor \(base_model.*\\n\\x1b\[31m.*at most 500 that can",
    long_name: r"\) has \d+ characters, at most 500 that can be printed",
    of_kind("F4", 4): r"torch cannot read its numbers \(of base_model",
    of_kind("F8_E8M0", 8): "holds F8_E8M0 .as 8 tensors do.; floating point was needed",
    of_kind("I64", 64): "holds int64 .as 8 tensors do.; floating point was needed",
    of_kind("C64", 64): "holds C64",
    wide(4, 312_500_000): r"has shape \(4, 312500000\); a rank up to 2048 and a width up to",
    wide(1_250_000_000, 1): r"has shape \(1250000000, 1\); a rank up to 2048",
    wide(2048, 600_000): r"\(2048, 600000\) and lora_B \(64, 4\), but .* says rank 4",
    wide_and_consistent: "has 1000000 inputs and 64 outputs, the base has 64 and 64",
    a_folder: "has no weights",
    large_numbers: "too large to compute with .as 4 layers do.; singular values up to 65,504",
    large_doubles: "too large to compute with .as 4 layers do.",
}


@pytest.mark.parametrize("spoil", WEIGHTS, ids=lambda spoil: spoil.__name__)
def test_bad_weights_are_named(
    spoil: Callable[[Path], None], folder: Path, llama: LlamaForCausalLM
) -> None:
    spoil(folder)
    load_experts([], llama)  # what the first call loads is not the file's
    assert re.search(WEIGHTS[spoil], refused(folder, llama))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_rare_kinds_of_numbers_are_read(dtype: torch.dtype, folder: Path) -> None:
    state = load_file(folder / WEIGHTS_FILE)
    save_file({key: tensor.to(dtype) for key, tensor in state.items()}, folder / WEIGHTS_FILE)
    factors = read_adapter(folder).read()[f"{PREFIX.removeprefix('base_model.model.')}"]
    assert factors.lora_A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    state["x"] = torch.tensor([math.nan]).to(dtype)
    save_file({key: tensor.to(dtype) for key, tensor in state.items()}, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterError):
        read_adapter(folder)


def test_a_tensor_of_many_megabytes_is_looked_through_to_its_end(folder: Path) -> None:
    state = load_file(folder / WEIGHTS_FILE)
    long = torch.zeros(64, 70_000)
    long[-1, -1] = math.nan
    state[f"{PREFIX}.base_layer.weight"] = long  # which no adapter needs
    save_file(state, folder / WEIGHTS_FILE)
    assert "q_proj.base_layer.weight holds NaN" in refused(folder)


def test_weights_that_take_too_much_of_the_memory_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spectr_demo.experts.weights.available_memory", lambda: 10_000)
    assert "of 0.0 GB of free memory at most 50% are taken for it" in refused(folder)


def test_a_file_that_changes_after_it_was_checked_is_an_error(folder: Path) -> None:
    adapter = read_adapter(folder)
    state = load_file(folder / WEIGHTS_FILE)
    save_file({key: tensor[:1] for key, tensor in state.items()}, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match=r"^expert 'sound': .*changed while it was read"):
        adapter.read()
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(AdapterError, match=r"^expert 'sound': .*cannot be read"):
        adapter.read()


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_file_that_cannot_be_read_is_named(
    file: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system refuses it, or the disk fails; root may read all files, so it is played here."""

    def opened(path: Path, *options: Any) -> Any:
        if path.name == file:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return really_opened(path, *options)

    really_opened = Path.open
    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened(path, "rb").read())
    assert f"{folder / file} cannot be read (Permission denied); check whose" in refused(folder)


@pytest.mark.parametrize("case", ["alpha as a text", "half an expression"])
def test_the_command_line_has_one_line_for_it(
    case: str, folder: Path, base_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(folder, **CONFIGS[case][0])
    for options in ([], ["--json"]):
        command = ["inspect", "--base", base_folder, "--experts", str(folder), *options]
        assert main(command) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = [each for each in captured.err.splitlines() if each.startswith("spectr-demo")]
        assert line.startswith("spectr-demo inspect: expert 'sound': PEFT refuses")
        assert "Traceback" not in captured.err


def test_what_is_shown_is_one_line_of_bounded_length() -> None:
    assert shown("plain é") == "plain é"
    assert shown("a\nb\x1b[2J\u202e\ud800") == r"a\nb\x1b[2J\u202e\ud800"
    assert shown("x" * 63_000) == "x" * 100 + "..." + "x" * 100
