"""How much memory is free: the machine's, a container's, a GPU's."""

from pathlib import Path

import pytest
import torch

from spectr_demo.base.memory import available_memory, free_memory


def test_available_memory_is_that_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"memory.max": "3000\n", "memory.current": "1000\n"}
    monkeypatch.setattr(Path, "read_text", lambda path: files[path.name])
    assert available_memory() == 2000
    files["memory.max"] = "max\n"
    assert available_memory() > 2000


def test_free_memory_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7000, 8000))
    monkeypatch.setattr("spectr_demo.base.memory.available_memory", lambda: 2000)
    assert free_memory(torch.device("cuda")) == 7000
    assert free_memory(torch.device("cpu")) == 2000
