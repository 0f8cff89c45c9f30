"""A Ray of two cores, on this machine alone."""

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import serve_model

__all__ = ["serve_model"]

TOKEN = secrets.token_hex(32)  # Ray keeps the first one that a process had


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Ray, connected. Its processes share one cache, which is not that of the tests."""
    ray = pytest.importorskip("ray", reason="needs requirements-ray.txt")
    folder = tempfile.mkdtemp(prefix="ray-")  # short: sockets lie in it
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("RAY_AUTH_TOKEN", TOKEN)  # else it writes one to ~/.ray
        environment.setenv("SPECTR_CACHE", str(tmp_path_factory.mktemp("cache")))
        environment.setenv("OMP_NUM_THREADS", "1")
        ray.init(
            num_cpus=2,
            object_store_memory=100 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
        )
        yield ray
        ray.shutdown()
    shutil.rmtree(Path(folder), ignore_errors=True)
