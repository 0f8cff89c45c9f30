"""One run of the stress tests on the tiny model, which several tests look at."""

from typing import Any

import pytest

from tests.conftest import BuildModel
from tests.evaluation.robustness.samples import run_stress


@pytest.fixture(scope="session")
def stressed(build_model: BuildModel, expert_folders: list[str]) -> dict[str, Any]:
    return run_stress(build_model(expert_folders))
