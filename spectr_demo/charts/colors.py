"""The colour of every expert, the same in all charts of a trace.

Up to twelve experts have a colour each; of a larger library, the twelve that were used most. Grey
always means that no expert leads, or that none was used.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectr_demo.trace import RoutingTrace

# The first seven are Okabe & Ito's (2008) without black, which a dark page would swallow. The other
# five were picked one by one from an sRGB grid as the colour farthest, in OKLab, from all before it
# and from grey, over normal vision and simulated protanopia, deuteranopia and tritanopia
# (Machado et al. 2009). `tests/charts/test_colors.py` measures the distances.
PALETTE = (
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#960000",
    "#96F0F0",
    "#1E0FE1",
    "#782D69",
    "#B44BFF",
)
GREY = "#8C8C8C"
OTHERS_COLOR = "#5B6675"
BASE_NAME = "base model only"
TIE_NAME = "tie (equal weights)"
OTHERS_NAME = "others"


def expert_colors(expert_names: Sequence[str]) -> dict[str, str]:
    """One "#RRGGBB" colour per expert, in order; they repeat after twelve.

    Of a larger library at most twelve experts are drawn by name: see `trace_colors`.
    """
    return {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(expert_names)}


def trace_colors(trace: RoutingTrace) -> dict[str, str]:
    """The colour of every expert in the charts of this trace.

    Up to twelve experts: those of `expert_colors`. Beyond, the twelve with the largest share over
    all columns have a colour each and the rest share that of "others".
    """
    groups = groups_of(trace)
    return {
        name: groups.colors[slot]
        for name, slot in zip(trace.expert_names, groups.slots, strict=True)
    }


@dataclass(frozen=True, kw_only=True)
class Groups:
    """What is drawn by name: each expert, or the twelve largest and "others".

    names, colors: S entries. slots: (E,) the entry of each expert.
    """

    names: tuple[str, ...]
    colors: tuple[str, ...]
    slots: NDArray[np.intp]

    def reduce(self, share: NDArray[Any]) -> NDArray[Any]:
        """Sum (..., E) shares to (..., S)."""
        membership = self.slots[:, None] == np.arange(len(self.names))
        return share @ membership.astype(share.dtype)

    def slot_of(self, expert: NDArray[np.int16]) -> NDArray[np.intp]:
        """The entry of each expert id; meaningless where it is NOT_ROUTED."""
        if not len(self.slots):
            return np.zeros(expert.shape, np.intp)
        return self.slots[np.maximum(expert, 0)]


def groups_of(trace: RoutingTrace) -> Groups:
    """Which experts the charts name: all of up to twelve, else the twelve largest of the trace."""
    E = trace.num_experts
    if len(PALETTE) >= E:
        colors = expert_colors(trace.expert_names)
        return Groups(
            names=tuple(colors), colors=tuple(colors.values()), slots=np.arange(E, dtype=np.intp)
        )
    total = sum((trace.share(label) for label in trace.labels), np.zeros(E, np.float32))
    # A stable sort, so that equal shares go to the lower ids; then back to the library's order.
    shown = np.sort(np.argsort(-total, kind="stable")[: len(PALETTE)])
    slots = np.full(E, len(shown), np.intp)
    slots[shown] = np.arange(len(shown))
    colors = expert_colors([trace.expert_names[index] for index in shown])
    return Groups(
        names=(*colors, f"{OTHERS_NAME} ({E - len(shown)})"),
        colors=(*colors.values(), OTHERS_COLOR),
        slots=slots,
    )


def rgba(color: str, alpha: float) -> str:
    """A "#RRGGBB" with an opacity of 0 to 1, as CSS writes it."""
    red, green, blue = _channels(color)
    return f"rgba({red},{green},{blue},{alpha:.2f})"


def _channels(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)
