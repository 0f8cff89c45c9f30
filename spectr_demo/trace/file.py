"""The file of a trace: a .npz of plain arrays and a JSON header (ASCII bytes), no pickle.

Column `i` has the arrays `i.spans`, `i.token_ids`, ..., `i.experts`, ...: one for each array of
`ColumnTrace`. The header holds everything else.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from spectr_demo.trace.column import (
    READING_ARRAYS,
    ROUTED_ARRAYS,
    TOKEN_ARRAYS,
    Candidates,
    ColumnTrace,
    Reading,
    distinct,
)

FORMAT_NAME = "spectr-routing-trace"
FORMAT_VERSION = 1

Arrays = dict[str, NDArray[Any]]
Trace = TypeVar("Trace")


def save(
    path: str | os.PathLike[str],
    *,
    expert_names: Sequence[str],
    projections: Sequence[str],
    num_layers: int,
    columns: Sequence[ColumnTrace],
    meta: dict[str, Any],
) -> None:
    """Write the fields of a `RoutingTrace` to one .npz file, whatever the suffix of `path`."""
    arrays: Arrays = {}
    for index, column in enumerate(columns):
        for name in ("spans", *TOKEN_ARRAYS):
            arrays[f"{index}.{name}"] = getattr(column, name)
        for name in ROUTED_ARRAYS:
            # A constant router is stored once, not once per token.
            (arrays[f"{index}.{name}"],) = distinct(getattr(column, name))
        if column.reading is not None:
            for name in READING_ARRAYS:
                arrays[f"{index}.{name}"] = getattr(column.reading, name)
        if column.candidates is not None:
            arrays[f"{index}.candidates"] = column.candidates.probs
    header = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "expert_names": list(expert_names),
        "projections": list(projections),
        "num_layers": num_layers,
        "columns": [_column_header(column) for column in columns],
        "meta": meta,
    }
    # ASCII JSON: a lone surrogate in a token piece survives as its escape.
    encoded = np.frombuffer(json.dumps(header, allow_nan=False).encode("ascii"), np.uint8)
    # An open file, because numpy would append ".npz" to a bare path.
    with open(path, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, header=encoded, **arrays)


def load(path: str | os.PathLike[str], make: Callable[..., Trace]) -> Trace:
    """Read a file that `save` wrote. make: `RoutingTrace`, called with its fields by name.

    ValueError when the file is not a trace, is damaged, or has a newer format version.
    """
    path = Path(path)
    arrays = _read_arrays(path)
    header = _read_header(path, arrays)
    try:
        columns = tuple(
            _read_column(index, column, arrays) for index, column in enumerate(header["columns"])
        )
        return make(
            expert_names=tuple(header["expert_names"]),
            projections=tuple(header["projections"]),
            num_layers=header["num_layers"],
            columns=columns,
            meta=header["meta"],
        )
    except (KeyError, TypeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        message = f"{path}: the trace is inconsistent ({what}); save it again"
        raise ValueError(message) from error


def _read_arrays(path: Path) -> Arrays:
    """All arrays of a .npz, their checksums tested. ValueError when it is not one, or damaged."""
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            is_cut = file.read(2) == b"PK"
        if is_cut:
            raise ValueError(f"{path}: the file is truncated; save or download it again")
        raise _not_a_trace(path)
    try:
        # Checksums first: numpy fails in many ways on an array header with changed bytes.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        message = f"{path}: the file is damaged ({error}); save or download it again"
        raise ValueError(message) from error


def _read_header(path: Path, arrays: Arrays) -> dict[str, Any]:
    """The JSON header of a loaded file, its format and version checked."""
    try:
        header = json.loads(arrays["header"].tobytes())
        is_trace = header["format"] == FORMAT_NAME
    except (KeyError, TypeError, ValueError):
        is_trace = False
    if not is_trace:
        raise _not_a_trace(path)
    if header.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: trace format version {header.get('version')}, this program reads version "
            f"{FORMAT_VERSION}; update spectr-demo"
        )
    return header


def _not_a_trace(path: Path) -> ValueError:
    return ValueError(f"{path}: not a routing trace, needed an .npz that save() wrote")


def _column_header(column: ColumnTrace) -> dict[str, Any]:
    """What a column has besides arrays, and the shape that its constant arrays are spread to."""
    return {
        "label": column.label,
        "router": column.router,
        "tokens": list(column.tokens),
        "num_prompt": column.num_prompt,
        "routed_shape": list(column.experts.shape),
        "candidates": column.candidates and list(column.candidates.texts),
    }


def _read_column(index: int, header: dict[str, Any], arrays: Arrays) -> ColumnTrace:
    shape = tuple(header["routed_shape"])
    has_reading = f"{index}.lanes" in arrays
    reading = {name: arrays[f"{index}.{name}"] for name in READING_ARRAYS} if has_reading else {}
    return ColumnTrace(
        label=header["label"],
        router=header["router"],
        tokens=tuple(header["tokens"]),
        num_prompt=header["num_prompt"],
        spans=arrays[f"{index}.spans"],
        **{name: arrays[f"{index}.{name}"] for name in TOKEN_ARRAYS},
        **{name: np.broadcast_to(arrays[f"{index}.{name}"], shape) for name in ROUTED_ARRAYS},
        reading=Reading(**reading) if has_reading else None,
        candidates=Candidates(texts=tuple(map(tuple, texts)), probs=arrays[f"{index}.candidates"])
        if (texts := header.get("candidates")) is not None
        else None,
    )
