"""The file of a trace: what is read is what was written, and what else is refused."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectr_demo.trace import Reading, RoutingTrace
from tests.trace_samples import EXPERTS, WEIGHTS, make_column, make_trace, sample_trace


def assert_same_trace(got: RoutingTrace, expected: RoutingTrace) -> None:
    """Equal in every field, NaN equal to NaN."""
    assert got.expert_names == expected.expert_names
    assert got.projections == expected.projections
    assert got.num_layers == expected.num_layers
    assert got.meta == expected.meta
    assert got.labels == expected.labels
    for new, old in zip(got.columns, expected.columns, strict=True):
        assert (new.reading is None) == (old.reading is None)
        of_reading = [{} if c.reading is None else vars(c.reading) for c in (new, old)]
        for name, value in (vars(old) | of_reading[1]).items():
            if name == "reading":
                continue
            got_value = of_reading[0].get(name, getattr(new, name, None))
            if isinstance(value, np.ndarray):
                assert got_value.dtype == value.dtype, name
                np.testing.assert_array_equal(got_value, value, err_msg=name)
            else:
                assert got_value == value, name


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    trace = sample_trace(120)
    path = tmp_path / "run.trace"
    trace.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["run.trace"]
    assert_same_trace(RoutingTrace.load(path), trace)


def test_what_a_router_read_is_kept(tmp_path: Path) -> None:
    reading = Reading(
        lanes=np.array([0, -1, 0], np.int16),
        standing=np.array([[1, 2, 3]], np.float32),
        certainty=np.full((1, 2, 3), np.nan, np.float32),
    )
    trace = make_trace(make_column(EXPERTS, WEIGHTS, reading=reading))
    trace.save(tmp_path / "run.npz")
    assert_same_trace(RoutingTrace.load(tmp_path / "run.npz"), trace)


def test_constant_routers_stay_small_in_the_file_and_after_loading(tmp_path: Path) -> None:
    trace = sample_trace(50)
    trace.save(tmp_path / "run.npz")
    with np.load(tmp_path / "run.npz", allow_pickle=False) as file:
        assert file[f"{trace.labels.index('uniform')}.experts"].shape == (1, 1, 1, 4)
        assert all(file[name].dtype != object for name in file.files)
    loaded = RoutingTrace.load(tmp_path / "run.npz").column("uniform")
    assert loaded.experts.strides[:3] == (0, 0, 0)


def test_load_refuses_what_is_not_a_trace(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(ValueError, match=r"notes\.txt: not a routing trace"):
        RoutingTrace.load(text)
    other = tmp_path / "other.npz"
    np.savez(other, weights=np.ones(3))
    with pytest.raises(ValueError, match=r"other\.npz: not a routing trace"):
        RoutingTrace.load(other)
    with pytest.raises(FileNotFoundError):
        RoutingTrace.load(tmp_path / "missing.npz")


def test_load_reports_truncated_and_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    sample_trace(20).save(path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        member = max(archive.infolist(), key=lambda info: info.compress_size)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        RoutingTrace.load(path)
    # Bytes changed inside the largest array, the file's directory left intact.
    at = member.header_offset + 200
    path.write_bytes(whole[:at] + bytes(50) + whole[at + 50 :])
    with pytest.raises(ValueError, match="damaged"):
        RoutingTrace.load(path)


def _rewrite(path: Path, change: Any) -> None:
    """Save the trace at `path` again with `change(header, arrays)` applied."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    header = json.loads(arrays.pop("header").tobytes())
    change(header, arrays)
    np.savez(path, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)


def test_load_refuses_a_newer_format(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    sample_trace(20).save(path)
    _rewrite(path, lambda header, arrays: header.update(version=2))
    with pytest.raises(ValueError, match="version 2, this program reads version 1; update"):
        RoutingTrace.load(path)


def test_load_refuses_a_trace_with_parts_missing(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    sample_trace(20).save(path)
    _rewrite(path, lambda header, arrays: arrays.pop("3.kl"))
    with pytest.raises(ValueError, match=r"inconsistent \('3\.kl' is missing\)"):
        RoutingTrace.load(path)
