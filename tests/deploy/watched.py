"""A replica that says what it does, and takes its time where the test asks for it."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch

from spectr_demo import replicas
from spectr_demo.base.loading import load_base
from spectr_demo.engine import model as engine_model
from spectr_demo.engine.run import Step
from spectr_demo.replicas import APP, Edition, Engine, ReplicatedModel, replicated

# Rounded to 16 bits, a text could change with those beside it in the batch.
load_exactly = partial(load_base, dtype=torch.float32)
LATE, SLOW = "late", "slow"  # prompts: the first token takes a while, or each one does
LATE_SECONDS, SLOW_SECONDS = 5.0, 0.1


@dataclass(frozen=True)
class Seen:
    """pid: of the replica. num_going: runs that go on there. num_begun, num_steps: so far."""

    pid: int
    num_going: int
    num_begun: int
    num_steps: int
    experts: tuple[str, ...]


def said(prompt: Any) -> str:
    """The message, alone or the last of a chat."""
    return str(prompt if isinstance(prompt, str) else prompt[-1]["content"])


@contextmanager
def watched(base: str, experts: list[str], **settings: Any) -> Iterator[ReplicatedModel]:
    """Replicas of `WatchedEngine`, until the block ends. settings: of `replicated`."""
    from ray import serve

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(replicas, "Engine", WatchedEngine)
        patched.setattr(engine_model, "load_base", load_exactly)
        yield replicated(base, experts, **settings)
    serve.delete(APP)


class WatchedEngine(Engine):
    num_going = num_begun = num_steps = 0

    def __init__(self, *args: Any) -> None:
        with patch.object(replicas, "load_base", load_exactly):
            super().__init__(*args)

    async def steps(self, edition: Edition, *asked: Any, **options: Any) -> AsyncIterator[Step]:
        self.num_begun += 1
        self.num_going += 1
        run = super().steps(edition, *asked, **options)
        try:
            if said(asked[0]) == LATE:
                await asyncio.sleep(LATE_SECONDS)
            async for step in run:
                self.num_steps += 1
                if said(asked[0]) == SLOW:
                    await asyncio.sleep(SLOW_SECONDS)
                yield step
        finally:
            await run.aclose()  # type: ignore[attr-defined]
            self.num_going -= 1

    async def seen(self) -> Seen:
        return Seen(
            pid=os.getpid(),
            num_going=self.num_going,
            num_begun=self.num_begun,
            num_steps=self.num_steps,
            experts=self.model.library.names,
        )
