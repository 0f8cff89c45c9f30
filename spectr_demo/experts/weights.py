"""A safetensors file of a stranger: its header first, then its bytes, never more than fits.

Only the header is read before the file is known to be whole and of a bearable size. The numbers are
then looked through a piece at a time.
"""

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spectr_demo.base.memory import available_memory
from spectr_demo.experts.messages import first, shown

MOST_HEADER_BYTES = 20_000_000
MOST_TENSORS = 100_000  # a mixture's experts in all layers of the largest models
MOST_NAME = 500  # characters of a tensor's name
MEMORY_SHARE = 0.5  # of the free memory, that a file may have
_LENGTH_BYTES = 8
_BYTES_AT_ONCE = 1 << 23
# As safetensors names them: what is computed with.
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

MAPPED = {"F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8}  # in libraries on disk


class WeightsError(ValueError):
    """Why a file cannot be used: `what` is the matter, and what to do, its `remedy`."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}; {remedy}")


class TensorInfo(NamedTuple):
    """kind: of its numbers, as safetensors names it. start, stop: its bytes in the file."""

    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """A file whose header is sound. tensors: in the order of their bytes, which fill the file."""

    path: Path
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def opened(cls, path: Path) -> "WeightsFile":
        """Read the header alone. Raises WeightsError."""
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
                if length > size:
                    raise ValueError(f"a header of {length} bytes in a file of {size}")
                if length > MOST_HEADER_BYTES:
                    raise WeightsError(
                        f"{shown(path)} has a header of {length} bytes, at most "
                        f"{MOST_HEADER_BYTES} are read",
                        "save the adapter again",
                    )
                header = parse_json(file.read(length))
            header.pop("__metadata__", None)
            if len(header) > MOST_TENSORS:
                raise WeightsError(
                    f"{shown(path)} has {len(header)} tensors, at most {MOST_TENSORS} are read",
                    "save the adapter again",
                )
            with safe_open(path, "pt"):  # which checks the rest of the header
                pass
        except WeightsError:
            raise
        except (SafetensorError, ValueError, AttributeError) as error:
            raise WeightsError(
                f"{shown(path)} is corrupt or truncated ({shown(error)})", "download it again"
            ) from None
        begin = _LENGTH_BYTES + length
        tensors = {
            name: TensorInfo(
                entry["dtype"],
                tuple(entry["shape"]),
                *(begin + place for place in entry["data_offsets"]),
            )
            for name, entry in header.items()
        }
        _check_names(tensors)
        return cls(
            path=path,
            tensors=dict(sorted(tensors.items(), key=lambda item: item[1].start)),
        )

    def check_room(self) -> None:
        """Raises WeightsError where the file is too large to be held beside what is there."""
        size, free = self.path.stat().st_size, available_memory()
        if size > MEMORY_SHARE * free:
            raise WeightsError(
                f"{shown(self.path)} has {size / 1e9:.1f} GB, of {free / 1e9:.1f} GB of free "
                f"memory at most {MEMORY_SHARE:.0%} are taken for it",
                "save the adapter with a lower rank, or use a machine with more memory",
            )

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def look_through(self, digest: Any) -> list[str]:
        """The tensors that hold NaN or infinite values. Reads the file once, a few MB at a time.

        digest: of hashlib, updated with the whole file.
        """
        infinite = []
        with self.path.open("rb") as file:
            begin = min((tensor.start for tensor in self.tensors.values()), default=None)
            digest.update(file.read() if begin is None else file.read(begin))
            for name, tensor in self.tensors.items():
                dtype, is_finite = FLOATS.get(tensor.kind), True
                for start in range(tensor.start, tensor.stop, _BYTES_AT_ONCE):
                    data = bytearray(file.read(min(_BYTES_AT_ONCE, tensor.stop - start)))
                    digest.update(data)
                    is_finite = is_finite and (dtype is None or _is_finite(data, dtype))
                if not is_finite:
                    infinite.append(name)
        return infinite

    def mapped(self) -> dict[str, Tensor]:
        """All tensors, mapped: what is not used is not read.

        `safetensors` maps too, but touches each tensor, and a system that reads 8 MB ahead then
        reads most of the file. Raises ValueError for a kind of numbers that libraries have not.
        """
        with self.path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        tensors = {}
        for name, tensor in self.tensors.items():
            if (dtype := MAPPED.get(tensor.kind)) is None:
                raise ValueError(f"{shown(name)} is of {shown(tensor.kind)}")
            values = torch.frombuffer(
                memory, dtype=dtype, count=math.prod(tensor.shape), offset=tensor.start
            )
            tensors[name] = values.view(tensor.shape)
        return tensors

    def read(self, names: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Some tensors, by name. names: with their shapes. Those in float8 are widened: nothing is
        computed in it. Raises WeightsError where the file is no longer what it was."""
        try:
            with safe_open(self.path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightsError(
                f"{shown(self.path)} cannot be read ({shown(error)})", "download it again"
            ) from None
        if changed := [n for n, tensor in tensors.items() if tuple(tensor.shape) != names[n]]:
            raise WeightsError(
                f"{shown(self.path)} changed while it was read, at {first(changed, 'tensors')}",
                "load it again",
            )
        return {
            name: tensor.float() if tensor.itemsize == 1 else tensor
            for name, tensor in tensors.items()
        }


def parse_json(content: bytes) -> dict[str, Any]:
    """The object of a file. Raises ValueError for what is none, nested without end, or has one key
    twice, of which one would silently win."""
    try:
        values = json.loads(content, object_pairs_hook=_once_each)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(values, dict):
        raise ValueError(f"it is a {type(values).__name__}")
    return values


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it has {shown(twice)!r} twice")
    return values


def _check_names(names: Mapping[str, Any]) -> None:
    for name in names:
        if len(name) > MOST_NAME or not name.isprintable():
            raise WeightsError(
                f"the name of a tensor ({shown(name)}) has {len(name)} characters, at most "
                f"{MOST_NAME} that can be printed were needed",
                "save the adapter again",
            )


def _is_finite(data: bytearray, dtype: torch.dtype) -> bool:
    numbers = torch.frombuffer(data, dtype=dtype)
    return bool((numbers.float() if dtype.itemsize == 1 else numbers).isfinite().all())
