"""An engine whose experts have the names of tasks, and the smallest evaluation of it."""

from dataclasses import replace

import pytest

from spectr_demo.evaluation.evaluate import Settings
from spectr_demo.evaluation.tasks import TASKS, Split
from tests.conftest import BuildModel, SaveExpert

SETTINGS = Settings(num_examples=2, num_pairs=2, num_offdomain=2, num_ordinary=0, stress_texts=0)


@pytest.fixture
def build_engine(
    build_model: BuildModel, save_expert: SaveExpert, monkeypatch: pytest.MonkeyPatch
) -> BuildModel:
    """Random experts under the names of two tasks, of which few examples are left."""
    for name in ("sql", "chords"):
        split = TASKS[name].build(0)
        few = Split(train=split.train[:4], heldout=split.heldout[:12])
        task = replace(TASKS[name], build=lambda seed, few=few: few, max_new_tokens=4)
        monkeypatch.setitem(TASKS, name, task)
    folders = [save_expert(name, seed=seed) for seed, name in enumerate(["sql", "chords", "other"])]
    return lambda: build_model(folders)
