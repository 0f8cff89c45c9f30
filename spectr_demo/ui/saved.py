"""A run and the form that it answers, as one file, which the visitor's browser keeps.

The file is the trace's own .npz; its header has the answers and the form. What comes back from a
browser may be anything: it is bounded before it is unpacked, and every value is checked.
"""

import io
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from spectr_demo.config import RouterConfig
from spectr_demo.engine.run import ColumnOutput
from spectr_demo.trace import RoutingTrace
from spectr_demo.ui.run import Form, Frame

MAX_BYTES = 3_000_000  # a run of six columns with 512 tokens each has about 2
MAX_UNPACKED = 400_000_000
MAX_CELLS = 2**28  # of the places (T, L, P, K) of a column, which a small file can claim

_COLUMNS = TypeAdapter(tuple[ColumnOutput, ...])
_ROUTERS = TypeAdapter(tuple[RouterConfig, ...])
_FORM = TypeAdapter(Form)


def frame_to_json(frame: Frame) -> dict[str, Any]:
    """A frame without its trace."""
    return {
        "columns": [asdict(column) for column in frame.columns],
        "routers": [router.to_json() for router in frame.routers],
        "status": frame.status,
        "why": frame.why,
    }


def frame_from_json(header: Mapping[str, Any], trace: RoutingTrace) -> Frame:
    """What `frame_to_json` wrote, with its trace. Raises KeyError or ValueError for another."""
    return Frame(
        columns=_COLUMNS.validate_python(header["columns"]),
        routers=_ROUTERS.validate_python(header["routers"]),
        status=header.get("status", "finished"),
        why=header["why"],
        trace=trace,
    )


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A run that is over. frame: its last one, with a trace. form: the one that it answers."""

    form: Form
    frame: Frame

    @property
    def trace(self) -> RoutingTrace:
        assert self.frame.trace is not None
        return self.frame.trace

    def to_bytes(self) -> bytes:
        header = {"form": asdict(self.form), **frame_to_json(self.frame)}
        trace = compact(self.trace)
        trace = replace(trace, meta=trace.meta | {"saved": header})
        with TemporaryDirectory() as folder:
            path = Path(folder) / "run.npz"
            trace.save(path)
            return path.read_bytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> "SavedRun":
        """Raises ValueError for what `to_bytes` did not write."""
        _check_size(data)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "run.npz"
            path.write_bytes(data)
            try:
                trace = RoutingTrace.load(path)
            except ValueError as error:
                raise ValueError(str(error).replace(f"{path}", "the run")) from error
        if any(column.experts.size > MAX_CELLS for column in trace.columns):
            raise ValueError("the run claims more tokens, layers or experts than a page can show")
        meta = dict(trace.meta)
        header = meta.pop("saved", None)
        trace = replace(trace, meta=meta)
        try:
            if header["status"] not in ("finished", "stopped"):
                raise ValueError(f"its status is {header['status']!r:.40}")
            frame = frame_from_json(header, trace)
            form = _FORM.validate_python(header["form"])
            if tuple(column.label for column in frame.columns) != trace.labels:
                raise ValueError("its answers are not those of its trace")
            if len(frame.routers) != len(frame.columns):
                raise ValueError("it has not a router for each column")
        except (ValidationError, KeyError, TypeError, ValueError) as error:
            what = (
                "; ".join(each["msg"] for each in error.errors())
                if isinstance(error, ValidationError)
                else error
            )
            raise ValueError(f"the run cannot be read ({what}); run it again") from error
        return cls(form=form, frame=frame)


def _check_size(data: bytes) -> None:
    """Before anything is unpacked."""
    if len(data) > MAX_BYTES:
        raise ValueError(
            f"the run has {len(data) / 1e6:.1f} MB; the page reads up to {MAX_BYTES / 1e6:.0f}"
        )
    try:
        unpacked = sum(each.file_size for each in zipfile.ZipFile(io.BytesIO(data)).infolist())
    except zipfile.BadZipFile as error:
        raise ValueError("the run cannot be read (it is no .npz file); run it again") from error
    if unpacked > MAX_UNPACKED:
        raise ValueError(
            f"the run unpacks to {unpacked / 1e6:.0f} MB; the page reads up to "
            f"{MAX_UNPACKED / 1e6:.0f}"
        )


def compact(trace: RoutingTrace) -> RoutingTrace:
    """The trace with scores of two to three digits, as charts show them: a third of the file."""
    columns = tuple(replace(c, scores=_rounded(c.scores)) for c in trace.columns)
    return replace(trace, columns=columns)


def _rounded(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """To the 8 leading bits (bfloat16); a broadcast view stays one."""
    if 0 in scores.strides:
        return scores
    bits = np.ascontiguousarray(scores).view(np.uint32)
    return ((bits + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)
