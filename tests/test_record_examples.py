"""The script that records the examples."""

import importlib.util
from pathlib import Path

import pytest

from spectr_demo.engine.model import SpectrModel
from spectr_demo.ui import recorded
from tests.ui.conftest import FRANCE

SCRIPT = Path(__file__).parent.parent / "scripts" / "record_examples.py"


def test_all_recordings_are_made_anew(
    routed_model: SpectrModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = importlib.util.spec_from_file_location("record_examples", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "load", lambda experts: routed_model)
    monkeypatch.setattr(script, "EXAMPLES", (FRANCE,))
    monkeypatch.setattr(recorded, "FOLDER", tmp_path)
    (tmp_path / "of-an-example-that-is-gone.npz").touch()
    script.main()
    (file,) = tmp_path.glob("*.npz")
    recording = recorded.load(file)
    assert recorded.find(FRANCE, routed_model) is recording
    assert recording.date
    assert recording.commit
    assert f"{FRANCE.key}: " in capsys.readouterr().out
