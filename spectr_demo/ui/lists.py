"""What on the page tells which experts there are, and is shown anew when they change."""

from collections.abc import Callable, Sequence
from typing import Any

from spectr_demo.engine.model import SpectrModel

Updates = dict[Any, Any]  # component -> its new value
Show = Callable[[SpectrModel], Updates]


class ExpertLists:
    """The components that name experts. Each part of the page adds its own as it is laid out."""

    def __init__(self) -> None:
        self.components: list[Any] = []
        self._shows: list[Show] = []

    def add(self, components: Sequence[Any], show: Show) -> None:
        """show: what these components show of a model."""
        self.components += components
        self._shows.append(show)

    def of(self, model: SpectrModel) -> Updates:
        """What all of them show of a model."""
        return {part: new for show in self._shows for part, new in show(model).items()}
