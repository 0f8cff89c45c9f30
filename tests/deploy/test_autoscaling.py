"""Replicas that start while runs wait."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest

from spectr_demo.engine.model import load
from spectr_demo.replicas import ReplicatedModel
from tests.deploy.test_replicas import COLUMNS, MANY, seen, texts, wait_for
from tests.deploy.watched import SLOW, watched

pytestmark = pytest.mark.slow


@pytest.fixture
def front(ray: Any, base_folder: str, expert_folders: list[str]) -> Iterator[ReplicatedModel]:
    with watched(base_folder, expert_folders, least=1, most=2) as front:
        yield front


def test_a_second_replica_starts_while_runs_wait(
    front: ReplicatedModel, base_folder: str, expert_folders: list[str]
) -> None:
    (first,) = seen(front)
    front.disable("blue")  # what the new one must have, too
    runs_each = front.most_runs // 2
    is_over = threading.Event()

    def visit() -> None:
        while not is_over.is_set():
            with closing(front.stream(SLOW, ["base"], MANY)) as run:  # type: ignore[type-var]
                for _ in run:
                    if is_over.is_set():
                        return

    with ThreadPoolExecutor(2 * runs_each) as visitors:
        visits = [visitors.submit(visit) for _ in range(2 * runs_each)]
        try:
            wait_for(lambda: len(seen(front)) == 2)
            wait_for(lambda: all(replica.num_steps for replica in seen(front)))
        finally:
            is_over.set()
    for each in visits:
        each.result()  # none ended in an error
    assert first.pid in {replica.pid for replica in seen(front)}
    assert {replica.experts for replica in seen(front)} == {("red", "green")}
    assert texts(front, "Hello", COLUMNS) == texts(load(base_folder, expert_folders[:2]), "Hello")
