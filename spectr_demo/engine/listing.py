"""Which experts a model has, as plain values: a model in another process can have the same."""

from collections.abc import Iterable
from dataclasses import dataclass

from spectr_demo.experts.adapters import Adapter, local_folder


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One expert. source: Hub id or a folder's full path. sha256: as `Adapter` has it."""

    name: str
    source: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Listing:
    """All experts of a model in their order, and the names of those that no run has."""

    experts: tuple[Listed, ...]
    disabled: tuple[str, ...]

    @classmethod
    def of(cls, adapters: Iterable[Adapter], disabled: Iterable[str]) -> "Listing":
        listed = tuple(
            Listed(name=a.name, source=_from_anywhere(a.source), sha256=a.sha256) for a in adapters
        )
        return cls(experts=listed, disabled=tuple(disabled))

    @property
    def sources(self) -> list[str]:
        """The experts as `load` takes them."""
        return [f"{expert.name}={expert.source}" for expert in self.experts]


def _from_anywhere(source: str) -> str:
    folder = local_folder(source)
    return source if folder is None else str(folder.resolve())
