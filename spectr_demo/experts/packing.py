"""Writing a library to disk, adapter by adapter: it need not fit into memory."""

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from spectr_demo.base.files import check_space, file_sha256
from spectr_demo.experts.adapters import Adapter, AdapterError
from spectr_demo.experts.arrows import arrows_of
from spectr_demo.experts.library import Room, fill_, rooms_for
from spectr_demo.experts.packed import (
    DTYPES,
    EXPERTS,
    BankRecord,
    ExpertRecord,
    FileRecord,
    Index,
    details_file,
    factor_shapes,
    factors_file,
    is_name,
    save_index,
)
from spectr_demo.experts.skeleton import skeleton_of
from spectr_demo.experts.tokenizers import TOKENIZER_FILES, tokenizer_folder
from spectr_demo.routing.bank import ExpertBank

_CARDS = ("README.md", "scores.json")
_PAGE = 4096
_KINDS = {torch.bfloat16: "BF16", torch.float32: "F32"}  # as safetensors names them


def write_library(
    adapters: Sequence[Adapter], config: PretrainedConfig, folder: Path, dtype: torch.dtype
) -> Index:
    """Align and stack adapters into the files of a library. Gives its index, which is saved too.

    adapters: that fit the base of this configuration. folder: is made. dtype: of the factors,
        bfloat16 or float32.
    Raises AdapterError for updates that are too large to compute with, and for names that no folder
    can have; OSError where the disk is full.
    """
    if strange := [adapter.name for adapter in adapters if not is_name(adapter.name)]:
        raise AdapterError(
            [
                f"expert {name!r}: no folder can have this name on all systems; give another, as "
                "NAME=SOURCE"
                for name in strange
            ]
        )
    rooms = rooms_for(adapters, skeleton_of(config).model)
    records = [_record(room) for room in rooms]
    sizes = [
        _num_bytes(record, len(room.experts), dtype)
        for record, room in zip(records, rooms, strict=True)
    ]
    folder.mkdir(parents=True)
    check_space(folder, sum(sizes))
    banks = [
        _room_on_disk(folder / factors_file(number), record, room.experts, dtype)
        for number, (record, room) in enumerate(zip(records, rooms, strict=True))
    ]
    fill_(banks, [replace(adapter, is_lasting=False) for adapter in adapters])  # kept there
    for number, bank in enumerate(banks):
        arrows = arrows_of(bank)
        details = {
            "singular_values": bank.singular_values,
            "arrows": torch.from_numpy(arrows.values),
            "arrow_scales": torch.from_numpy(arrows.scales),
            "arrow_errors": torch.from_numpy(arrows.errors),
        }
        save_part(details, folder / details_file(number))
    _copy_cards(adapters, folder / EXPERTS)
    layouts: dict[tuple[tuple[str, int], ...], int] = {}  # their numbers
    numbers = [
        layouts.setdefault(
            tuple((path, shape.rank) for path, shape in adapter.shapes.items()), len(layouts)
        )
        for adapter in adapters
    ]
    names = [f(i) for i in range(len(banks)) for f in (factors_file, details_file)]
    index = Index(
        dtype=next(name for name, each in DTYPES.items() if each == dtype),
        layouts=[dict(layout) for layout in layouts],
        experts=[
            ExpertRecord(
                name=adapter.name,
                base_model=adapter.base_model,
                sha256=adapter.sha256,
                num_bytes=adapter.num_bytes,
                layout=number,
                notes=list(adapter.notes),
            )
            for adapter, number in zip(adapters, numbers, strict=True)
        ],
        banks=records,
        measured=None,
        files=records_of(folder, names),
    )
    save_index(index, folder)
    return index


def records_of(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Sizes and digests of files, by their paths in the folder."""
    return {
        name: FileRecord(
            num_bytes=(folder / name).stat().st_size, sha256=file_sha256(folder / name)
        )
        for name in names
    }


def save_part(tensors: Mapping[str, Tensor], file: Path) -> None:
    """A file of a library; its folder is made if need be."""
    file.parent.mkdir(exist_ok=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, file)


def _record(room: Room) -> BankRecord:
    return BankRecord(
        paths=list(room.paths),
        D_in=room.shapes[0][1],
        D_out=[D_out for D_out, _ in room.shapes],
        rank=room.rank,
        num_runs=room.num_runs,
    )


def _num_bytes(record: BankRecord, num_experts: int, dtype: torch.dtype) -> int:
    shapes = factor_shapes(record, num_experts).values()
    return sum(math.prod(shape) for shape in shapes) * dtype.itemsize


def _room_on_disk(
    file: Path, record: BankRecord, experts: Sequence[int], dtype: torch.dtype
) -> ExpertBank:
    """An empty bank whose factors are mapped from a new file, and are written to it."""
    shapes = factor_shapes(record, len(experts))
    header: dict[str, Any] = {}
    stop = 0
    for name, shape in shapes.items():
        start, stop = stop, stop + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _KINDS[dtype], "shape": shape, "data_offsets": [start, stop]}
    content = json.dumps(header).encode()
    begin = -(-(8 + len(content)) // _PAGE) * _PAGE  # so that rows begin where pages do
    file.parent.mkdir(exist_ok=True)
    with file.open("wb") as made:
        made.write((begin - 8).to_bytes(8, "little") + content.ljust(begin - 8))
        made.truncate(begin + stop)
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and a crash later
            os.posix_fallocate(made.fileno(), 0, begin + stop)
    memory = torch.from_file(str(file), shared=True, size=begin + stop, dtype=torch.uint8)
    values = memory[begin:].view(dtype)
    sizes = [math.prod(shape) for shape in shapes.values()]
    tensors = dict(zip(shapes, values.split(sizes), strict=True))
    tensors = {name: tensor.view(shapes[name]) for name, tensor in tensors.items()}
    return ExpertBank(
        paths=tuple(record.paths),
        expert_ids=torch.tensor(experts),
        A=tensors["A"],
        B=tuple(tensors[f"B.{p}"] for p in range(len(record.paths))),
        singular_values=torch.zeros(len(record.paths), len(experts), record.rank),
    )


def _copy_cards(adapters: Sequence[Adapter], folder: Path) -> None:
    """What lies beside the weights and is read: model cards, scores, and each tokenizer once."""
    brought: set[tuple[str, ...]] = set()
    for adapter in adapters:
        source, target = tokenizer_folder(adapter.source), folder / adapter.name
        target.mkdir(parents=True)
        there = [name for name in TOKENIZER_FILES if (source / name).is_file()]
        digests = tuple(file_sha256(source / name) for name in there)
        is_new = digests not in brought
        brought.add(digests)
        for name in (*_CARDS, *(there if is_new else ())):
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
