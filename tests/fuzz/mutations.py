"""Adapters as strangers may make them: a sound one with a few changes, all drawn from a seed."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig

from spectr_demo.experts.adapters import CONFIG_FILE, WEIGHTS_FILE

FIELDS = [field.name for field in fields(LoraConfig)] + ["", "use_newest_lora", "r\x00", "R"]
# Those that decide what the weights mean, where a change is read most closely.
READ = ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"]
READ += ["layers_to_transform", "layers_pattern", "use_rslora", "base_model_name_or_path"]
WORDS = ["", "16", "q_proj", "all-linear", "x" * 63_000, "\x1b[2J\r\nforged line", "\ud800", "é"]
WORDS += ["a" * 300, "../../x", "~nobody", "{}", "%s%n", "None", "\u202e"]
NUMBERS = [0, 1, -1, 2, 4, 8, 4.0, 0.5, -0.0, 2**31, 2**63, -(2**64), 10**400, 1e-320, 1e308]
NUMBERS += [float("nan"), float("inf"), -float("inf"), 3e38, 65_536, 2049, True, False]
PIECES = ["q_proj", "layers", ".", r"\.", ".*", "(", ")", "[", "]", "+", "*", "?", "{2}", "{,9}"]
PIECES += ["{99999999999}", "(?:", "(?i)", "(?i:", "|", "^", "$", r"\d", r"\1", "(?=", "(?<!", "a"]
PIECES += ["[a-z_.0-9]", "((a+)+)+", "(.*)*", "#", r"\p{L}", "(?P<idx>", "{e<=3}", "[[:alpha:]]"]
PIECES += ["[\u0000-\uffff]", "(?R)", "(?1)", r"\L<x>", "(?s)", r"\b", "[^", "&&", "--", "é"]
KINDS = ["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"]
KINDS += ["F4", "F6_E2M3", "C64", "F8_E4M3FNUZ", "X9", "", 7, None, "f32"]


@dataclass
class Parts:
    """What an adapter's folder is made of. header: of the weights, data: what follows it."""

    config: dict[str, Any]
    header: dict[str, Any]
    data: bytearray
    config_bytes: bytes | None = None  # instead of the values
    header_bytes: bytes | None = None
    header_length: int | None = None  # that the file claims
    num_bytes: int | None = None  # to which the file is cut, or grows without taking room


def parts_of(folder: Path) -> Parts:
    content = (folder / WEIGHTS_FILE).read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    config = json.loads((folder / CONFIG_FILE).read_text())
    return Parts(config, json.loads(content[8:begin]), bytearray(content[begin:]))


def write(parts: Parts, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    config, header = parts.config_bytes, parts.header_bytes
    config = json.dumps(parts.config).encode() if config is None else config
    header = json.dumps(parts.header).encode() if header is None else header
    length = len(header) if parts.header_length is None else parts.header_length
    (folder / CONFIG_FILE).write_bytes(config)
    with (folder / WEIGHTS_FILE).open("wb") as file:
        file.write(length.to_bytes(8, "little") + header + parts.data)
        if parts.num_bytes is not None:
            file.truncate(parts.num_bytes)


def mutate(parts: Parts, seed: int) -> Parts:
    """A few changes, the same for the same seed; parts is changed too."""
    chosen = random.Random(seed)
    for _ in range(chosen.choice([1, 1, 1, 2, 3])):
        chosen.choice(CHANGES)(parts, chosen)
    return parts


def value(chosen: random.Random, depth: int = 0) -> Any:
    kind = chosen.randrange(6 if depth < 3 else 4)
    if kind == 0:
        return None
    if kind == 1:
        return chosen.choice(WORDS)
    if kind == 2:
        return chosen.choice(NUMBERS)
    if kind == 3:
        return pattern(chosen)
    several = range(chosen.choice([0, 1, 2, 5]))
    if kind == 4:
        return [value(chosen, depth + 1) for _ in several]
    return {str(value(chosen, 3))[:100]: value(chosen, depth + 1) for _ in several}


def pattern(chosen: random.Random) -> str:
    text = "".join(chosen.choices(PIECES, k=chosen.choice([1, 2, 3, 5, 8, 13])))
    return text * chosen.choice([1, 1, 1, 1, 30, 200])


def _config_value(parts: Parts, chosen: random.Random) -> None:
    parts.config[chosen.choice(FIELDS)] = value(chosen)


def _read_value(parts: Parts, chosen: random.Random) -> None:
    parts.config[chosen.choice(READ)] = value(chosen)


def _some_pattern(parts: Parts, chosen: random.Random) -> None:
    patterns = [pattern(chosen) for _ in range(chosen.choice([1, 1, 3]))]
    field = chosen.choice(["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"])
    if field.endswith("modules"):
        parts.config[field] = chosen.choice([patterns[0], patterns])
    else:
        parts.config[field] = {each: chosen.choice([4, 8, 1, 0.5]) for each in patterns}


def _layer_patterns(parts: Parts, chosen: random.Random) -> None:
    parts.config["layers_to_transform"] = chosen.choice([0, [0, 1], [1], [], 10**30, ["0"]])
    parts.config["layers_pattern"] = chosen.choice(["layers", [pattern(chosen)], pattern(chosen)])


def _many_patterns(parts: Parts, chosen: random.Random) -> None:
    number = chosen.choice([100, 1000, 11_000])
    ending = chosen.choice(["", "+", "*[#]", ".*.*#"])
    names = {f"layers.{i}.mlp.up_proj{ending}": 4 for i in range(number)}
    parts.config[chosen.choice(["rank_pattern", "alpha_pattern"])] = names


def _config_key(parts: Parts, chosen: random.Random) -> None:
    key = chosen.choice(list(parts.config) or ["r"])
    kept = parts.config.pop(key, None)
    if chosen.random() < 0.5:
        parts.config[chosen.choice([key.upper(), *WORDS])] = kept


def _config_text(parts: Parts, chosen: random.Random) -> None:
    content = json.dumps(parts.config).encode()
    deep = chosen.choice([50, 1000, 100_000])
    parts.config_bytes = chosen.choice(
        [
            _damaged(content, chosen),
            content[:-1] + b', "r": 2}',
            content[:-1] + b', "\\u0072": 2}',
            content[:-1] + b', "x": ' + b"[" * deep + b"]" * deep + b"}",
            content[:-1] + b', "auto_mapping": ' + b'{"a":' * deep + b"1" + b"}" * deep + b"}",
            b"[" * deep,
            b"\xff\xfe" + content,
            b"\xef\xbb\xbf" + content,
            content.decode().encode("utf-16"),
            b"null",
            b"[]",
            b"",
            content + b" " * 5_000_000,
            b'{"peft_type": "LORA"}',
        ]
    )


def _damaged(content: bytes, chosen: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(chosen.choice([1, 2, 10])):
        place = chosen.randrange(len(damaged) + 1)
        kind = chosen.randrange(3)
        if kind == 0 and place < len(damaged):
            damaged[place] = chosen.randrange(256)
        elif kind == 1:
            del damaged[place : place + chosen.choice([1, 5, 1000])]
        else:
            damaged[place:place] = bytes(chosen.choices(b'{}[]",:0\\\x00\xff9a', k=3))
    return bytes(damaged)


def _names(parts: Parts) -> list[str]:
    return [name for name in parts.header if name != "__metadata__"] or ["none"]


def _tensor_name(parts: Parts, chosen: random.Random) -> None:
    name = chosen.choice(_names(parts))
    new = chosen.choice(
        [
            name.replace("layers.0", "layers.9"),
            name.replace("q_proj", "lm_head"),
            name.replace(".weight", ""),
            name.replace(".weight", ".default.weight"),
            name.replace(".weight", ".bias"),
            name.removeprefix("base_model.model."),
            f"_orig_mod.{name}",
            name.replace("lora_A", "lora_B"),
            name.replace("lora_A", "lora_embedding_A"),
            name.replace("lora_", "lora_magnitude_vector_"),
            f"{name}\n\x1b[31m",
            name * 1000,
            name.replace("model", "model" + ".x" * 200),
            chosen.choice(WORDS),
            "__metadata__",
            "." * 400,
            ".lora_A.weight",
        ]
    )
    entry = parts.header.get(name)
    if chosen.random() < 0.7:
        parts.header.pop(name, None)
    parts.header[new] = entry


def _tensor_entry(parts: Parts, chosen: random.Random) -> None:
    entry = parts.header.get(chosen.choice(_names(parts)))
    if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
        return
    kind = chosen.randrange(6)
    if kind == 0:
        entry["dtype"] = chosen.choice(KINDS)
    elif kind == 1:
        entry["shape"] = entry["shape"][::-1]
    elif kind == 2:
        entry["shape"] = chosen.choice([[], [0], [-1, 4], [1, *entry["shape"]], [2**62, 4], "x"])
    elif kind == 3:
        entry["data_offsets"] = chosen.choice([[0, 0], [5, 1], [0, 2**63], [], "x", [0.5, 1]])
    elif kind == 4:
        entry[chosen.choice(["dtype", "shape", "data_offsets", "more"])] = value(chosen)
    else:
        entry.pop(chosen.choice(list(entry)), None)


def _numbers(parts: Parts, chosen: random.Random) -> None:
    numbers = np.frombuffer(parts.data[: len(parts.data) // 4 * 4], np.float32).copy()
    if not len(numbers):
        return
    start = chosen.randrange(len(numbers))
    some = slice(start, chosen.choice([start + 1, start + 100, None]))
    change: Callable[[Any], Any] = chosen.choice(
        [
            lambda old: np.nan,
            lambda old: np.inf,
            lambda old: old * np.float32(1e10),
            lambda old: old * np.float32(1e20),
            lambda old: np.float32(3e38),
            lambda old: np.float32(1e-45),
            lambda old: 0,
            lambda old: old * -1,
        ]
    )
    with np.errstate(over="ignore"):
        numbers[some] = change(numbers[some])
    parts.data[: len(numbers) * 4] = numbers.tobytes()


def _other_kind(parts: Parts, chosen: random.Random) -> None:
    """All tensors in another type, of as many bytes as they have; or with zeros added."""
    kind = chosen.choice(["F16", "BF16", "F8_E4M3", "F8_E5M2", "I32", "F64", "F8_E8M0", "F4"])
    bits = {"F64": 64, "I32": 32, "F16": 16, "BF16": 16, "F4": 4}.get(kind, 8)
    place = 0
    for name in _names(parts):
        entry = parts.header.get(name)
        if isinstance(entry, dict) and isinstance(entry.get("shape"), list):
            size = int(np.prod([n for n in entry["shape"] if isinstance(n, int)])) * bits // 8
            entry |= {"dtype": kind, "data_offsets": [place, place + size]}
            place += size
    place = min(max(place, 0), 1_000_000)
    parts.data = bytearray(chosen.randbytes(place) if chosen.random() < 0.5 else bytes(place))


def _more_tensors(parts: Parts, chosen: random.Random) -> None:
    for i in range(chosen.choice([1, 50, 3000])):
        end = len(parts.data)
        entry = {"dtype": "F32", "shape": [0, 4], "data_offsets": [end, end]}
        parts.header[f"{chosen.choice(['x', 'y.lora_A.weight', 'embed_tokens'])}.{i}"] = entry


def _large_tensor(parts: Parts, chosen: random.Random) -> None:
    """One that the file claims to have; it grows to that, but takes no room."""
    shape = chosen.choice([[4, 10**9], [10**9, 4], [4096, 4096], [4, 1 << 20], [2048, 1 << 20]])
    end = len(parts.data)
    size = 4 * shape[0] * shape[1]
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    parts.header["large" if chosen.random() < 0.3 else name.replace("q_proj", "o_proj")] = {
        "dtype": "F32",
        "shape": shape,
        "data_offsets": [end, end + size],
    }
    if size < 10**8 or chosen.random() < 0.2:
        parts.num_bytes = 8 + len(json.dumps(parts.header)) + end + size


def _header_text(parts: Parts, chosen: random.Random) -> None:
    content = json.dumps(parts.header).encode()
    first = json.dumps(_names(parts)[0]).encode()
    deep = chosen.choice([100, 100_000])
    parts.header_bytes = chosen.choice(
        [
            _damaged(content, chosen),
            content.replace(first, first + b":0," + first, 1),
            content.replace(b'"base_model', b'"\\u0062ase_model', 1),
            content[:-1] + b", " + content[1:],
            content[:-1] + b', "__metadata__": ' + b"[" * deep + b"]" * deep + b"}",
            content[:-1] + b', "__metadata__": {"a": "' + b"x" * 100_000 + b'"}}',
            b"[" * deep,
            b"",
            b"{}",
            b"null",
            content + b" " * 1000,
            b" " + content,
        ]
    )


def _file_length(parts: Parts, chosen: random.Random) -> None:
    if chosen.random() < 0.5:
        parts.header_length = chosen.choice([0, 1, 7, 2**31, 2**63, 2**64 - 1, 10**8])
    else:
        parts.num_bytes = chosen.choice([0, 1, 7, 8, 9, 100, 10_000, 10**6])


CHANGES = [
    *(_config_value, _read_value, _some_pattern, _layer_patterns, _many_patterns, _config_key),
    *(_config_text, _tensor_name, _tensor_entry, _numbers, _other_kind, _more_tensors),
    *(_large_tensor, _header_text, _file_length, _some_pattern, _numbers),
]
