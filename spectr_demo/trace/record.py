"""What the routers of one run decided: the record that charts and exports read. No torch.

A `RoutingTrace` holds one `ColumnTrace` for each column of a side-by-side run. Its methods are the
statistics that the charts draw; they are computed in `statistics`. Axes: `T` tokens, `L` layers,
`P` projections (linear layers routed in each decoder layer), `E` experts.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectr_demo.config import unknown_name
from spectr_demo.trace import file, statistics
from spectr_demo.trace.column import ColumnTrace, Part, distinct, is_json
from spectr_demo.trace.statistics import BestScores, DominantExperts


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingTrace:
    """A side-by-side run: the columns' routing, the names behind the ids, and the statistics.

    expert_names: E names, index = expert id. projections: P names, e.g. "q_proj".
    meta: JSON values: model, expert hashes, generation settings, seed, library versions.

    In every statistic a *share* is a mean weight over what was routed. So the shares of one token,
    layer or part sum to 1 where the router's weights do, and to 0 where nothing was routed.
    """

    expert_names: tuple[str, ...]
    projections: tuple[str, ...]
    num_layers: int
    columns: tuple[ColumnTrace, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong: list[str] = []
        for name in ("expert_names", "projections"):
            if repeated := _repeated(getattr(self, name)):
                wrong.append(f"{name} repeats {', '.join(repeated)}, needed unique names")
        if repeated := _repeated(self.labels):
            wrong.append(f"columns repeat {', '.join(repeated)}, needed unique labels")
        for column in self.columns:
            wrong += self._wrong_column(column)
        if not is_json(self.meta):
            wrong.append("meta has values that are not JSON; convert them to plain values")
        if wrong:
            raise ValueError("routing trace: " + "; ".join(wrong))

    def _wrong_column(self, column: ColumnTrace) -> list[str]:
        """Where a column does not fit the trace's layers, projections and experts."""
        wrong = []
        got, needed = column.experts.shape[1:3], (self.num_layers, len(self.projections))
        reading = column.reading
        if reading is not None and reading.standing.shape[1] != self.num_experts:
            wrong.append(
                f"column {column.label!r} has read {reading.standing.shape[1]} experts, the trace "
                f"names {self.num_experts}"
            )
        if got != needed:
            wrong.append(f"column {column.label!r} has (L, P) = {got}, needed {needed}")
        (experts,) = distinct(column.experts)
        if experts.size and experts.max() >= self.num_experts:
            wrong.append(
                f"column {column.label!r} uses expert {experts.max()}, "
                f"the trace names {self.num_experts}"
            )
        return wrong

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.expert_names)

    @property
    def labels(self) -> tuple[str, ...]:
        """The columns' labels, in order."""
        return tuple(column.label for column in self.columns)

    def column(self, label: str) -> ColumnTrace:
        """The column of this label; ValueError lists the labels when there is none."""
        for column in self.columns:
            if column.label == label:
                return column
        raise unknown_name("column", label, self.labels)

    def projection_index(self, projection: str) -> int:
        """The place of a projection on the P axis; ValueError lists them when unknown."""
        if projection not in self.projections:
            raise unknown_name("projection", projection, self.projections)
        return self.projections.index(projection)

    # Statistics

    def token_share(self, label: str) -> NDArray[np.float32]:
        """(T, E) float32: each token's mean weight per expert over its routed layers and
        projections. Rows of tokens that were not routed are 0.
        """
        return statistics.token_share(self.column(label), self.num_experts)

    def layer_share(self, label: str, part: Part = "all") -> NDArray[np.float32]:
        """(L, E) float32: each layer's mean weight per expert over the part's tokens and the
        projections that were routed. Layers without routing are 0.
        """
        return statistics.layer_share(self.column(label), self.num_experts, part)

    def share(self, label: str, part: Part = "all") -> NDArray[np.float32]:
        """(E,) float32: the mean of `token_share` over the part's tokens that were read. What is
        missing to 1 was left to the base. 0 where there are none (an empty answer).
        """
        return statistics.share(self.column(label), self.num_experts, part)

    def token_scores(self, label: str) -> NDArray[np.float32]:
        """(T, E) float32: each token's mean score per expert over the places that selected it, or
        the standing in its lane. NaN where there is none.
        """
        return statistics.token_scores(self.column(label), self.num_experts)

    def is_token_routed(self, label: str) -> NDArray[np.bool_]:
        """(T,) bool: whether any layer used any expert for the token."""
        return statistics.is_token_routed(self.column(label))

    def is_token_read(self, label: str) -> NDArray[np.bool_]:
        """(T,) bool: whether any expert, or the base alone, served the token."""
        return statistics.is_token_read(self.column(label))

    def dominant_tokens(self, label: str) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
        """Each token's expert of largest share and its lead over the second.

        Returns (T,) int16 expert ids, `NOT_ROUTED` where the token was not routed, and (T,)
        float32 margins >= 0. Experts of equal share are ranked by score, with a margin of 0.
        """
        return statistics.dominant_tokens(self.column(label), self.num_experts)

    def dominant_cells(self, label: str, projection: str | None = None) -> DominantExperts:
        """The dominant expert of every (token, layer): in one projection, or over all of them."""
        index = None if projection is None else self.projection_index(projection)
        return statistics.dominant_cells(self.column(label), self.num_experts, index)

    def best_scores(self, label: str) -> BestScores | None:
        """The expert of best score in every (token, layer), and its lead; None where the router
        computes no scores.
        """
        return statistics.best_scores(self.column(label), self.num_experts)

    # The file, a .npz.

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace to one .npz file, whatever the suffix of `path`."""
        file.save(path, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RoutingTrace":
        """Read a trace that `save` wrote.

        ValueError when the file is not a trace, is damaged, or has a newer format version.
        """
        return file.load(path, cls)


def _repeated(names: Sequence[str]) -> list[str]:
    """The names that stand there more than once, in order of the alphabet."""
    return sorted({name for name in names if names.count(name) > 1})


def mean_logprob(trace: RoutingTrace, label: str) -> float:
    """Mean log-probability of a column's answer tokens under its own model, in nats."""
    return statistics.mean_logprob(trace.column(label))
