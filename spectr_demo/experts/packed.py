"""A library on disk: experts that are aligned and stacked already, mapped from their files.

    library.json        what is in it, with its own SHA-256
    factors/0000.safetensors, ...   of a bank: A, and B of each layer
    details/0000.safetensors, ...   of a bank: singular values, and the arrows in 8 bits
    ordinary/0000.safetensors, ...  of a bank, each time that it runs: what ordinary text told
    experts/NAME/       an expert's model card, scores and tokenizer

`packing.py` writes it. To open it reads the index and the files' headers. The system reads of the
factors what is used. The index has the size and the SHA-256 of each file: sizes are compared when
it is opened, contents by `verify`, since that reads all of it. Files of strangers are opened too:
nothing is mapped that is not as long as the index and the shapes in it say.

Axes: P projections of a bank, E experts, r rank.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from weakref import WeakValueDictionary

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from spectr_demo.base.files import file_sha256
from spectr_demo.cpu.filter import Arrows
from spectr_demo.experts.adapters import Adapter, LoraFactors, LoraShape, Misfits, local_folder
from spectr_demo.experts.arrows import keep_arrows
from spectr_demo.experts.messages import MOST_SHOWN, AdapterError, shown
from spectr_demo.experts.settings import MOST_RANK
from spectr_demo.experts.stacked import Measured, Packed, PackedPlace, Stacked, where_in
from spectr_demo.experts.weights import WeightsFile, parse_json
from spectr_demo.routing.bank import ExpertBank

INDEX_FILE, EXPERTS = "library.json", "experts"
FORMAT = 1  # raise it when `align`, the files, or what is measured over ordinary text changes
MOST_INDEX_BYTES = 200_000_000
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

_Size = Annotated[int, Field(ge=1, le=1 << 24)]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class BankRecord(_Record):
    """num_runs: how often its layers run in a pass."""

    paths: list[str] = Field(min_length=1)
    D_in: _Size
    D_out: list[_Size]
    rank: Annotated[int, Field(ge=1, le=MOST_RANK)]
    num_runs: _Size


class ExpertRecord(_Record):
    """layout: the number of its ranks among the layouts."""

    name: str
    base_model: str
    sha256: str
    num_bytes: int
    layout: int
    notes: list[str]


class MeasuredRecord(_Record):
    base: str
    prompts: list[str]


class FileRecord(_Record):
    num_bytes: int
    sha256: str


class Index(_Record):
    """layouts: an expert's ranks by layer, each that some expert has. files: by their paths."""

    dtype: str
    layouts: list[dict[str, int]]
    experts: list[ExpertRecord]
    banks: list[BankRecord]
    measured: MeasuredRecord | None
    files: dict[str, FileRecord]

    @model_validator(mode="after")
    def _check(self) -> "Index":
        names = [expert.name for expert in self.experts]
        ranks = {path: bank.rank for bank in self.banks for path in bank.paths}
        for is_wrong, what in (
            (self.dtype not in DTYPES, f"its dtype is {shown(self.dtype)}"),
            (len(set(names)) < len(names), "two experts have one name"),
            (not all(map(is_name, names)), "an expert's name is no name of a folder"),
            (len(ranks) < sum(len(b.paths) for b in self.banks), "a layer is in two banks"),
            (any(len(b.D_out) != len(b.paths) for b in self.banks), "a bank has other layers"),
            (any(not 0 <= e.layout < len(self.layouts) for e in self.experts), "a layout lacks"),
        ):
            if is_wrong:
                raise ValueError(what)
        for layout in self.layouts:
            if any(not 1 <= rank <= ranks.get(path, 0) for path, rank in layout.items()):
                raise ValueError("a rank is not that of a bank")
            for bank in self.banks:
                if len({path in layout for path in bank.paths}) > 1:
                    raise ValueError("an expert is on a part of a bank")
        used = {expert.layout for expert in self.experts}
        if any(used.isdisjoint(self.layouts_on(bank)) for bank in self.banks):
            raise ValueError("a bank has no expert")
        return self

    def layouts_on(self, bank: BankRecord) -> tuple[int, ...]:
        """The layouts of the experts that a bank holds."""
        return tuple(i for i, layout in enumerate(self.layouts) if bank.paths[0] in layout)

    def experts_with(self, layouts: tuple[int, ...]) -> list[int]:
        """(E,) numbers of the experts that have one of these layouts."""
        return [e for e, expert in enumerate(self.experts) if expert.layout in layouts]


def is_name(name: str) -> bool:
    """Whether a folder may be called like this expert, here and on other systems."""
    is_plain = shown(name) == name and not set(name) & set('<>:"/\\|?*')
    return is_plain and 0 < len(name.encode()) <= MOST_SHOWN and not name.endswith((".", " "))


def factors_file(number: int) -> str:
    return f"factors/{number:04}.safetensors"


def details_file(number: int) -> str:
    return f"details/{number:04}.safetensors"


def ordinary_file(number: int) -> str:
    return f"ordinary/{number:04}.safetensors"


def save_index(index: Index, folder: Path) -> None:
    content = index.model_dump(mode="json")
    document = {"format": FORMAT, "sha256": _digest(content), "library": content}
    (folder / INDEX_FILE).write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_index(folder: Path) -> tuple[Index, str]:
    """What is in a library on disk, and the digest of it. Raises AdapterError."""
    file = folder / INDEX_FILE
    try:
        if file.stat().st_size > MOST_INDEX_BYTES:
            raise ValueError(f"it has more than {MOST_INDEX_BYTES} bytes")
        document = parse_json(file.read_bytes())
        if document.get("format") != FORMAT:
            found = shown(document.get("format"))
            raise ValueError(f"its format is {found}, this version reads {FORMAT}")
        content = document.get("library")
        if document.get("sha256") != _digest(content):
            raise ValueError("it was changed: its SHA-256 is another")
        return Index.model_validate(content), document["sha256"]
    except ValidationError as error:
        raise _unusable(folder, f"{INDEX_FILE}: {error.errors()[0]['msg']}") from None
    except OSError as error:
        raise _unusable(folder, f"{INDEX_FILE}: {error.strerror}") from None
    except ValueError as error:
        raise _unusable(folder, f"{INDEX_FILE}: {error}") from None


def _unusable(folder: Path, what: str) -> AdapterError:
    return AdapterError([f"library {shown(folder)}: {what}; pack it again, or copy it anew"])


_open: WeakValueDictionary[tuple[Path, str], Packed] = WeakValueDictionary()


def _opened(folder: Path, index: Index, digest: str) -> Packed:
    """The library with its banks mapped. One that is open already is the same."""
    key = folder.resolve(), digest
    library, record = _open.get(key), index.measured
    if library is None:
        # Banks share their numbers of experts where they have the same.
        ids = {
            layouts: torch.tensor(index.experts_with(layouts))
            for layouts in set(map(index.layouts_on, index.banks))
        }
        banks = [
            bank
            for number, each in enumerate(index.banks)
            for bank in _bank(folder, index, number, ids[index.layouts_on(each)])
        ]
        library = _open[key] = Packed(
            folder=folder,
            num_experts=len(index.experts),
            banks=tuple(banks),
            measured=None
            if record is None
            else Measured(
                base=record.base,
                prompts=tuple(record.prompts),
                read=partial(_read_ordinary, folder, index),
            ),
        )
    return library


def factor_shapes(bank: BankRecord, num_experts: int) -> dict[str, tuple[int, ...]]:
    """Of the tensors of a bank's file, in the order in which they are in it."""
    num_rows = num_experts * bank.rank
    B = {f"B.{p}": (num_rows, D_out) for p, D_out in enumerate(bank.D_out)}
    return {"A": (len(bank.paths) * num_rows, bank.D_in), **B}


def _bank(folder: Path, index: Index, number: int, expert_ids: Tensor) -> list[ExpertBank]:
    """A bank once for each time that it runs, mapped."""
    record, dtype = index.banks[number], DTYPES[index.dtype]
    P, E, r = len(record.paths), len(expert_ids), record.rank
    shapes = factor_shapes(record, E)
    factors = _mapped(
        folder, index, factors_file(number), {n: (dtype, s) for n, s in shapes.items()}
    )
    details = _mapped(
        folder,
        index,
        details_file(number),
        {
            "singular_values": (torch.float32, (P, E, r)),
            "arrows": (torch.int8, (P * E, record.D_in)),
            "arrow_scales": (torch.float32, (P * E,)),
            "arrow_errors": (torch.float32, (P * E,)),
        },
    )
    first = ExpertBank(
        paths=tuple(record.paths),
        expert_ids=expert_ids,
        A=factors["A"],
        B=tuple(factors[f"B.{p}"] for p in range(P)),
        singular_values=details["singular_values"],
    )
    banks = [first, *(replace(first, run=run) for run in range(1, record.num_runs))]
    arrows = Arrows(*(details[name].numpy() for name in ("arrows", "arrow_scales", "arrow_errors")))
    for bank in banks:
        keep_arrows(bank, arrows)
    return banks


def _mapped(
    folder: Path,
    index: Index,
    name: str,
    needed: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a file, mapped from it: what is not used is not read. needed: their dtypes and
    shapes; None for any."""
    file, record = folder / name, index.files.get(name)
    try:
        num_bytes = file.stat().st_size
        if record is None or num_bytes != record.num_bytes:
            wanted = record.num_bytes if record else "none"
            raise ValueError(f"it has {num_bytes} bytes, the index says {wanted}")
        tensors = WeightsFile.opened(file).mapped()
    except OSError as error:
        raise _unusable(folder, f"{name}: {error.strerror}") from None
    except ValueError as error:
        raise _unusable(folder, f"{name}: {error}") from None
    found = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    if needed is not None and found != needed:
        raise _unusable(folder, f"{name}: its tensors are not those of the index")
    return tensors


def _read_ordinary(folder: Path, index: Index, number: int) -> dict[str, Tensor] | None:
    """See `Measured.read`. All of it is used, so all of it is compared with its digest."""
    name = ordinary_file(number)
    if name not in index.files:
        return None
    tensors = _mapped(folder, index, name)
    if file_sha256(folder / name) != index.files[name].sha256:
        raise _unusable(folder, f"{name}: it was changed")
    return tensors


def verify(folder: Path) -> Index:
    """Compare all files of a library with their digests. Raises AdapterError with those that were
    changed, or are not there."""
    index, _ = read_index(folder)
    changed = []
    for name, record in index.files.items():
        file = folder / name
        if not file.is_file() or file_sha256(file) != record.sha256:
            changed.append(name)
    if changed:
        more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise _unusable(folder, f"{changed[0]}{more}: not what was packed")
    return index


def packed_adapters(
    source: str | Path, name: str | None, misfits: Misfits = lambda adapter: ()
) -> list[Adapter] | None:
    """The experts of a library on disk: all of `FOLDER`, or the one of `FOLDER/experts/NAME`. None
    where there is no library.

    name, misfits: as `read_adapter` takes them. The layouts are asked about, not each expert.
    Raises AdapterError for a library that cannot be used, or does not fit.
    """
    found = _found(source)
    if found is None:
        return None
    folder, one = found
    index, digest = read_index(folder)
    adapters = _adapters(folder, index, digest, misfits)
    if one is not None:
        adapters = [adapter for adapter in adapters if adapter.name == one]
    if len(adapters) != 1 and (one is not None or name is not None):
        what = f"has no expert {one!r}" if one is not None else f"has {len(adapters)} experts"
        raise AdapterError(
            [f"library {shown(folder)} {what}, needed one; name it as {EXPERTS}/NAME of its folder"]
        )
    return [replace(adapters[0], name=shown(name))] if name is not None else adapters


def _found(source: str | Path) -> tuple[Path, str | None] | None:
    """A library's folder, and the one of its experts that is named."""
    folder = local_folder(source)
    if folder is None:
        return None
    if (folder / INDEX_FILE).is_file():
        return folder, None
    above = folder.parent
    if above.name == EXPERTS and (above.parent / INDEX_FILE).is_file():
        return above.parent, folder.name
    return None


def _adapters(folder: Path, index: Index, digest: str, misfits: Misfits) -> list[Adapter]:
    sizes = {
        path: (D_out, bank.D_in)
        for bank in index.banks
        for path, D_out in zip(bank.paths, bank.D_out, strict=True)
    }
    layouts = [
        {path: LoraShape(*sizes[path], rank) for path, rank in layout.items()}
        for layout in index.layouts
    ]
    plain = [
        Adapter(
            name=expert.name,
            source=str(folder / EXPERTS / expert.name),
            base_model=expert.base_model,
            sha256=expert.sha256,
            num_bytes=expert.num_bytes,
            shapes=layouts[expert.layout],
            read=dict,
            notes=tuple(expert.notes),
            is_lasting=False,  # its rounded factors must not be cached as those of its files
        )
        for expert in index.experts
    ]
    first = {expert.layout: e for e, expert in reversed(list(enumerate(index.experts)))}
    if problems := [problem for e in sorted(first.values()) for problem in misfits(plain[e])]:
        raise AdapterError(problems)
    library = _opened(folder, index, digest)
    where = where_in(library.banks)
    return [
        replace(
            adapter,
            packed=PackedPlace(library, e),
            read=partial(_read, Stacked(e, index.layouts[expert.layout], where)),
        )
        for e, (adapter, expert) in enumerate(zip(plain, index.experts, strict=True))
    ]


def _read(aligned: Stacked) -> dict[str, LoraFactors]:
    return {
        path: LoraFactors(lora_A=factors.A, lora_B=factors.B, scaling=1.0)
        for path, factors in aligned.items()
    }
