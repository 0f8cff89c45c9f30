"""A run as the browser keeps it: the same run comes back, and nothing else is taken."""

import io
import json
import zipfile
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from spectr_demo.config import Intervention
from spectr_demo.engine.model import SpectrModel
from spectr_demo.ui import saved
from spectr_demo.ui.run import Frame
from spectr_demo.ui.saved import SavedRun
from tests.ui.conftest import form_of


@pytest.fixture
def run(routed_model: SpectrModel) -> SavedRun:
    form = form_of(prompt="paint <b>it</b> 🟥", columns=["base", "spectr"], seed=3)
    routers = form.routers(routed_model.library.names)
    routers[1] = replace(
        routers[1], intervention=Intervention(kind="ban", expert="red", layers=(0, 1))
    )
    step = routed_model.compare(form.prompt, routers, max_new_tokens=6)
    frame = Frame(
        columns=step.columns,
        routers=tuple(routers),
        status="finished",
        trace=step.trace,
        why="the expert that fits",
    )
    return SavedRun(form=form, frame=frame)


def test_a_run_comes_back(run: SavedRun) -> None:
    again = SavedRun.from_bytes(run.to_bytes())
    assert again.form == run.form
    assert replace(again.frame, trace=None) == replace(run.frame, trace=None)
    assert again.trace.meta == run.trace.meta
    np.testing.assert_array_equal(again.trace.columns[1].experts, run.trace.columns[1].experts)
    np.testing.assert_allclose(
        again.trace.columns[1].scores, run.trace.columns[1].scores, rtol=2**-8
    )
    assert again.trace.columns[1].candidates is not None


def header(data: bytes, change: Any) -> bytes:
    """The file with another header."""
    with np.load(io.BytesIO(data)) as file:
        arrays = {name: file[name] for name in file.files}
    told = json.loads(arrays["header"].tobytes())
    change(told)
    arrays["header"] = np.frombuffer(json.dumps(told).encode(), np.uint8)
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: told["meta"].pop("saved"), "cannot be read"),
        (lambda told: told["meta"]["saved"].pop("form"), "cannot be read"),
        (lambda told: told["meta"]["saved"]["form"].update(columns=5), "Sequence"),
        (lambda told: told["meta"]["saved"]["form"].update(prompt=None), "valid string"),
        (lambda told: told["meta"]["saved"]["form"].pop("seed"), "required"),
        (lambda told: told["meta"]["saved"].update(status="waiting"), "status is 'waiting'"),
        (lambda told: told["meta"]["saved"]["columns"].pop(), "answers are not those"),
        (lambda told: told["meta"]["saved"]["routers"].pop(), "a router for each column"),
        (lambda told: told["meta"]["saved"]["routers"][0].update(top_k=-1), "top_k"),
        (lambda told: told["meta"]["saved"]["columns"][0].update(text=["x"]), "valid string"),
        (lambda told: told["meta"].update(saved=7), "cannot be read"),
        (lambda told: told["columns"][1].update(routed_shape=[1 << 40, 2, 7, 1]), "inconsistent"),
    ],
)
def test_another_header_is_refused(run: SavedRun, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SavedRun.from_bytes(header(run.to_bytes(), change))


def test_what_is_no_run_is_refused(run: SavedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    data = run.to_bytes()
    with pytest.raises(ValueError, match="it is no"):
        SavedRun.from_bytes(b"hello")
    with pytest.raises(ValueError, match=r"damaged|truncated|it is no"):
        SavedRun.from_bytes(data[: len(data) // 2])
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    with pytest.raises(ValueError, match="the run"):
        SavedRun.from_bytes(empty.getvalue())
    monkeypatch.setattr(saved, "MAX_CELLS", 10)
    with pytest.raises(ValueError, match="more tokens, layers or experts"):
        SavedRun.from_bytes(data)
    monkeypatch.setattr(saved, "MAX_UNPACKED", 1000)
    with pytest.raises(ValueError, match="unpacks to"):
        SavedRun.from_bytes(data)
    monkeypatch.setattr(saved, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="the page reads up to"):
        SavedRun.from_bytes(data)


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    out = io.BytesIO()
    with (
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("header.npy", "w", force_zip64=True) as file,
    ):
        for _ in range(500):
            file.write(bytes(1_000_000))
    assert len(out.getvalue()) < saved.MAX_BYTES
    with pytest.raises(ValueError, match="unpacks to 500 MB"):
        SavedRun.from_bytes(out.getvalue())
