"""A record beside an adapter is read as a whole or not at all."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from spectr_demo.config import ASSETS
from spectr_demo.engine.model import SpectrModel
from spectr_demo.ui.records import training_record


@pytest.mark.parametrize("missing", ["task", "metric", "example", "scores"])
def test_a_record_without_a_part_is_none(
    routed_model: SpectrModel, tmp_path: Path, missing: str
) -> None:
    file = tmp_path / "scores.json"
    shutil.copy(ASSETS / "experts" / "sql" / "scores.json", file)
    adapter = replace(routed_model.library.adapters[0], source=str(tmp_path))
    record = training_record(adapter)
    assert record is not None
    assert record["task"] == "sql"
    del record[missing]
    file.write_text(json.dumps(record))
    assert training_record(adapter) is None
