"""Whose experts a visitor has: those of all, or a library that they changed for themselves.

All of a request uses one snapshot, from its first check to its last token. What one visitor changes
nobody else has. It is freed when their page is closed, or was left alone for an hour.
"""

import hmac
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from spectr_demo.base.memory import free_memory
from spectr_demo.charts.text import counted
from spectr_demo.config import owner_token
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.snapshot import Snapshot
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.experts.preflight import Candidate
from spectr_demo.ui.visitors import visitor

MOST_VISITORS = 16  # with experts of their own, or one that they look at
MOST_ADDED = 4  # experts of one visitor
IDLE_SECONDS = 3600
MEMORY_SHARE = 0.1  # of the free memory: what one visitor's library may take
_MOST_PAGES = 10_000  # of which is known what they show
T = TypeVar("T")


def is_owner(token: str) -> bool:
    """Whether this is the owner's token; nobody is the owner where there is none."""
    expected = owner_token()
    return bool(expected) and hmac.compare_digest(expected.encode(), token.encode())


@dataclass(kw_only=True, eq=False)
class _Own:
    """A visitor's own. model: None before the first change. begun_with: the library of all, from
    which it was made. candidate: what the visitor looked at last, and may add."""

    used: float
    model: SpectrModel | None = None
    begun_with: Callable[[], Snapshot | None] = lambda: None
    candidate: Candidate | None = None
    changing: threading.Lock = field(default_factory=threading.Lock)


class Libraries:
    """Those of one page. The visitor is the one whose handler asks."""

    def __init__(
        self,
        model: SpectrModel,
        *,
        is_fixed: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """model: of all. is_fixed: no library changes, since the model runs in a process of its
        own, which would not hear of it."""
        self.shared, self.is_fixed = model, is_fixed
        self._clock = clock
        self._lock = threading.Lock()
        self._own: dict[str, _Own] = {}
        # By visitor, the library that the page shows; a page that is new shows that of its making.
        self._made_with = weakref.ref(model.snapshot)
        self._shown: OrderedDict[str, weakref.ref[Snapshot]] = OrderedDict()

    # What a visitor has

    @property
    def model(self) -> SpectrModel:
        """The model, with the visitor's own library if there is one."""
        own = self._mine
        return own.model if own is not None and own.model is not None else self.shared

    @property
    def _mine(self) -> _Own | None:
        with self._lock:
            own = self._own.get(visitor().name)
            if own is not None:
                own.used = self._clock()
            return own

    def bound(self, run: Callable[..., T], snapshot: Snapshot) -> Callable[..., T]:
        """The same runs, with these experts."""
        return run if self.is_fixed else partial(run, snapshot=snapshot)

    @property
    def is_own(self) -> bool:
        return self.model is not self.shared

    @property
    def is_behind(self) -> bool:
        """Whether the experts of all have changed since the visitor made a library of them."""
        own = self._mine
        is_old = own is not None and own.begun_with() is not self.shared.snapshot
        return self.is_own and is_old

    def news(self) -> SpectrModel | None:
        """The visitor's model where their page shows another library, once."""
        model, name = self.model, visitor().name
        with self._lock:
            shown = self._shown.pop(name, self._made_with)
            self._shown[name] = weakref.ref(model.snapshot)
            if len(self._shown) > _MOST_PAGES:
                self._shown.popitem(last=False)
        return None if shown() is model.snapshot else model

    # What a visitor does

    @property
    def candidate(self) -> Candidate | None:
        own = self._mine
        return own.candidate if own is not None else None

    def propose(self, candidate: Candidate) -> None:
        """Keep what the visitor looked at. Raises ValueError where there is no room."""
        self._room().candidate = candidate

    def change(self, change: Callable[[SpectrModel], Any], *, for_all: bool) -> None:
        """Change the library of all, or the visitor's own, and keep nothing of a change that fails.

        Raises ValueError where there is no room, and what the change raises.
        """
        if for_all:
            change(self.shared)
            return
        own = self._room()
        with own.changing:
            model, begun_with = own.model, own.begun_with
            if model is None:
                _check_memory(self.shared)
                model = self.shared.variant()
                begun_with = weakref.ref(model.snapshot)
            change(model)
            own.model, own.begun_with = model, begun_with

    def add(self, *, for_all: bool) -> str:
        """Add what the visitor looked at; gives its name."""
        adapter = self._looked_at.adapter
        if not for_all:
            of_all = {(each.name, each.sha256) for each in self.shared.adapters}
            added = [a for a in self.model.adapters if (a.name, a.sha256) not in of_all]
            if len(added) >= MOST_ADDED:
                raise ValueError(
                    f"you have added {counted(len(added), 'expert')}, which is as many as one "
                    "visitor may: remove one of them first"
                )
        self.change(lambda model: model.add(adapter), for_all=for_all)
        self._forget_candidate()
        return adapter.name

    def replace(self, name: str, *, for_all: bool) -> None:
        """Put what the visitor looked at in an expert's place."""
        adapter = self._looked_at.adapter
        self.change(lambda model: model.replace(name, adapter), for_all=for_all)
        self._forget_candidate()

    def take_that_of_all(self) -> None:
        """Give up the visitor's own library."""
        with self._lock:
            self._own.pop(visitor().name, None)

    def leave(self) -> None:
        """The visitor's page is closed."""
        self.take_that_of_all()
        with self._lock:
            self._shown.pop(visitor().name, None)

    @property
    def _looked_at(self) -> Candidate:
        candidate = self.candidate
        if candidate is None:
            raise ValueError("there is no adapter to add: look at one first")
        return candidate

    def _forget_candidate(self) -> None:
        own = self._mine
        if own is not None:
            own.candidate = None

    def _room(self) -> _Own:
        with self._lock:
            name, now = visitor().name, self._clock()
            own = self._own.get(name)
            if own is None:
                for other in [n for n, o in self._own.items() if now - o.used > IDLE_SECONDS]:
                    del self._own[other]
                if len(self._own) >= MOST_VISITORS:
                    raise ValueError(
                        f"{counted(len(self._own), 'visitor')} have experts of their own here, "
                        "which is as many as this server keeps: try again later"
                    )
                own = self._own[name] = _Own(used=now)
            own.used = now
            return own


def _check_memory(model: SpectrModel) -> None:
    """A library that changes is made anew, whole."""
    size, most = num_bytes(model.library), MEMORY_SHARE * free_memory(model.base.device)
    if size > most:
        raise ValueError(
            f"the library has {size / 1e6:,.0f} MB, and a visitor's own may have "
            f"{most / 1e6:,.0f} MB here: it can only be changed for all"
        )


def num_bytes(library: ExpertLibrary) -> int:
    """Of its stacked factors."""
    return sum(each.nbytes for bank in library.banks if not bank.run for each in (bank.A, *bank.B))
