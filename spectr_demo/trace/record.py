"""What the routers of one run decided, as plain arrays: the record that charts and exports read.

Torch ends here. A `RoutingTrace` holds one `ColumnTrace` per column of a side-by-side run; its
methods are the statistics that the charts draw. Axes: `T` tokens, `L` layers, `P` projections
(linear layers routed in each decoder layer), `K` selected experts, `E` experts.
"""

import difflib
import json
import os
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

NOT_ROUTED = -1
FORMAT_NAME = "spectr-routing-trace"
FORMAT_VERSION = 1

Part = Literal["prompt", "answer", "all"]
PARTS: tuple[Part, ...] = ("prompt", "answer", "all")

_ROUTED_ARRAYS = {"experts": "int16", "weights": "float32", "scores": "float32"}
_TOKEN_ARRAYS = {
    "token_ids": "int32",
    "logprob": "float32",
    "entropy": "float32",
    "kl": "float32",
}
# Cells of a (T, L, E) table worked on at once: 32 MB of float64, whatever E is.
_CELLS_PER_CHUNK = 4_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class ColumnTrace:
    """The routing of one column (one row of the batch), token by token.

    label: the column's name, unique in its trace, e.g. "spectr" or "single:sql".
    router: the router's settings as JSON values (name, top_k, weighting, temperature, ...).
    token_ids: (T,) int32. tokens: T pieces of text; joined they are the whole text, with the
        chat template. spans: (T, 2) int32, characters [start, end) of each token in that text.
    num_prompt: tokens[:num_prompt] are the prompt, the rest is the answer.
    experts: (T, L, P, K) int16, the selected experts; `NOT_ROUTED` where there is none (the base
        model, an absent projection, the last generated token, which was never read).
    weights: (T, L, P, K) float32, >= 0, and 0 where not routed.
    scores: (T, L, P, K) float32, NaN where the router computes none or nothing was routed.
    logprob, entropy, kl: (T,) float32 in nats, NaN where undefined (token 0, a run in progress).
        logprob[t] is that of token t given the tokens before it; entropy[t] and kl[t] are of
        the distribution that token t was drawn from, kl being KL(routed || base).

    The routed arrays may be broadcast views with stride 0 (a constant router over a thousand
    experts); the statistics and `RoutingTrace.save` work on the distinct part only.
    """

    label: str
    router: dict[str, Any]
    token_ids: NDArray[np.int32]
    tokens: tuple[str, ...]
    spans: NDArray[np.int32]
    num_prompt: int
    experts: NDArray[np.int16]
    weights: NDArray[np.float32]
    scores: NDArray[np.float32]
    logprob: NDArray[np.float32]
    entropy: NDArray[np.float32]
    kl: NDArray[np.float32]

    def __post_init__(self) -> None:
        T = len(self.tokens)
        wrong: list[str] = []
        if not self.label:
            wrong.append("label is empty; give the column a name")
        if T == 0:
            wrong.append("tokens is empty; a trace needs at least one token")
        wrong += _wrong_array("spans", self.spans, "int32", (T, 2))
        for name, dtype in _TOKEN_ARRAYS.items():
            wrong += _wrong_array(name, getattr(self, name), dtype, (T,))
        routed_shape = np.shape(self.experts)
        if len(routed_shape) != 4:
            wrong.append(f"experts has shape {routed_shape}, needed (T, L, P, K)")
        else:
            for name, dtype in _ROUTED_ARRAYS.items():
                shape = (T, *routed_shape[1:])
                wrong += _wrong_array(name, getattr(self, name), dtype, shape)
        if not 0 <= self.num_prompt <= T:
            wrong.append(f"num_prompt is {self.num_prompt}, needed 0 to {T} (the tokens)")
        if not wrong:
            wrong += self._wrong_values()
        if not _is_json(self.router):
            wrong.append("router has values that are not JSON; pass the settings as plain values")
        if wrong:
            raise ValueError(f"column {self.label!r}: " + "; ".join(wrong))

    def _wrong_values(self) -> list[str]:
        """Problems with values, once all shapes are known to be right."""
        wrong = []
        length = len(self.text)
        start, end = self.spans[:, 0], self.spans[:, 1]
        if bool((start < 0).any() or (end < start).any() or (end > length).any()):
            wrong.append(f"spans leave the text, needed 0 <= start <= end <= {length}")
        experts, weights = _distinct(self.experts, self.weights)
        if not np.isfinite(weights).all() or (weights < 0).any():
            wrong.append("weights has negative or non-finite values, needed finite and >= 0")
        if experts.size and experts.min() < NOT_ROUTED:
            wrong.append(f"experts has {experts.min()}, needed expert ids or NOT_ROUTED (-1)")
        if ((experts == NOT_ROUTED) & (weights != 0)).any():
            wrong.append("weights is not 0 where experts is NOT_ROUTED; set it to 0 there")
        return wrong

    @property
    def num_tokens(self) -> int:
        """T, prompt and answer together."""
        return len(self.tokens)

    @property
    def num_selected(self) -> int:
        """K, the slots per token, layer and projection."""
        return self.experts.shape[3]

    @property
    def text(self) -> str:
        """The whole text, chat template included."""
        return "".join(self.tokens)

    @property
    def is_routed(self) -> bool:
        """Whether any expert was used anywhere: False for the base model alone."""
        (experts,) = _distinct(self.experts)
        return bool((experts != NOT_ROUTED).any())

    def part_slice(self, part: Part) -> slice:
        """The tokens of the prompt, of the answer, or all, as a slice over T."""
        if part == "prompt":
            return slice(0, self.num_prompt)
        if part == "answer":
            return slice(self.num_prompt, self.num_tokens)
        if part == "all":
            return slice(0, self.num_tokens)
        raise ValueError(f"part is {part!r}, needed one of {', '.join(PARTS)}")


@dataclass(frozen=True, kw_only=True, eq=False)
class DominantExperts:
    """The expert of largest weight per token and layer, in one projection or over all.

    expert: (T, L) int16, `NOT_ROUTED` where no expert was used.
    weight: (T, L) float32, its weight there (the mean over the routed projections).
    score: (T, L) float32, its score there (the mean over the projections that selected it), NaN
        where the router computes none.
    is_tied: (T, L) bool, another expert has the same weight: none dominates.
    """

    expert: NDArray[np.int16]
    weight: NDArray[np.float32]
    score: NDArray[np.float32]
    is_tied: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingTrace:
    """A side-by-side run: the columns' routing, the names behind the ids, and the statistics.

    expert_names: E names, index = expert id. projections: P names, e.g. "q_proj".
    meta: JSON values: model, expert hashes, generation settings, seed, library versions.

    In every statistic a *share* is a mean weight over what was routed, so the shares of one
    token, layer or part sum to 1 where the router's weights do, and to 0 where nothing was routed.
    """

    expert_names: tuple[str, ...]
    projections: tuple[str, ...]
    num_layers: int
    columns: tuple[ColumnTrace, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong: list[str] = []
        for name in ("expert_names", "projections"):
            values = getattr(self, name)
            repeated = sorted({value for value in values if values.count(value) > 1})
            if repeated:
                wrong.append(f"{name} repeats {', '.join(repeated)}, needed unique names")
        labels = [column.label for column in self.columns]
        repeated = sorted({label for label in labels if labels.count(label) > 1})
        if repeated:
            wrong.append(f"columns repeat {', '.join(repeated)}, needed unique labels")
        for column in self.columns:
            got, needed = column.experts.shape[1:3], (self.num_layers, len(self.projections))
            if got != needed:
                wrong.append(f"column {column.label!r} has (L, P) = {got}, needed {needed}")
            (experts,) = _distinct(column.experts)
            if experts.size and experts.max() >= len(self.expert_names):
                wrong.append(
                    f"column {column.label!r} uses expert {experts.max()}, "
                    f"the trace names {len(self.expert_names)}"
                )
        if not _is_json(self.meta):
            wrong.append("meta has values that are not JSON; convert them to plain values")
        if wrong:
            raise ValueError("routing trace: " + "; ".join(wrong))

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
        raise ValueError(_unknown("column", label, self.labels))

    def projection_index(self, projection: str) -> int:
        """The place of a projection on the P axis; ValueError lists them when unknown."""
        if projection not in self.projections:
            raise ValueError(_unknown("projection", projection, self.projections))
        return self.projections.index(projection)

    # Statistics

    def token_share(self, label: str) -> NDArray[np.float32]:
        """(T, E) float32: each token's mean weight per expert over its routed layers and
        projections. Rows of tokens that were not routed are 0.
        """
        column = self.column(label)
        share = _mean_weights(column.experts, column.weights, axis=0, num_experts=self.num_experts)
        return np.broadcast_to(share, (column.num_tokens, self.num_experts))

    def layer_share(self, label: str, part: Part = "all") -> NDArray[np.float32]:
        """(L, E) float32: each layer's mean weight per expert over the part's tokens and the
        projections that were routed. Layers without routing are 0.
        """
        column = self.column(label)
        where = column.part_slice(part)
        share = _mean_weights(
            column.experts[where], column.weights[where], axis=1, num_experts=self.num_experts
        )
        return np.broadcast_to(share, (self.num_layers, self.num_experts))

    def share(self, label: str, part: Part = "all") -> NDArray[np.float32]:
        """(E,) float32: the mean of `token_share` over the part's routed tokens; 0 when there are
        none (the base model, an empty answer).
        """
        column = self.column(label)
        share = self.token_share(label)[column.part_slice(part)]
        is_routed = self.is_token_routed(label)[column.part_slice(part)]
        return share[is_routed].sum(axis=0) / np.float32(max(1, is_routed.sum()))

    def is_token_routed(self, label: str) -> NDArray[np.bool_]:
        """(T,) bool: whether any layer used any expert for the token."""
        column = self.column(label)
        (experts,) = _distinct(column.experts)
        is_routed = (experts != NOT_ROUTED).any(axis=(1, 2, 3))
        return np.broadcast_to(is_routed, (column.num_tokens,))

    def smoothed_share(self, label: str, window: int) -> NDArray[np.float32]:
        """(T, E) float32: `token_share` averaged over the routed ones of `window` tokens around
        each token (fewer at both ends). An even window reaches one token further back.
        """
        if window < 1:
            raise ValueError(f"window is {window} tokens, needed at least 1")
        share, is_routed = self.token_share(label), self.is_token_routed(label)
        T = len(share)
        start = np.maximum(np.arange(T) - window // 2, 0)
        end = np.minimum(np.arange(T) + (window + 1) // 2, T)
        # Prefix sums in float64: their differences stay exact to float32.
        total = np.concatenate([np.zeros((1, share.shape[1])), share.cumsum(axis=0, dtype=float)])
        count = np.concatenate([[0], is_routed.cumsum()])
        mean = (total[end] - total[start]) / np.maximum(count[end] - count[start], 1)[:, None]
        return np.clip(mean, 0.0, None).astype(np.float32)

    def dominant_tokens(self, label: str) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
        """Each token's expert of largest share and its lead over the second.

        Returns (T,) int16 expert ids, `NOT_ROUTED` where the token was not routed, and (T,)
        float32 margins >= 0 (0: tied, the id is then the lowest of the tied ones).
        """
        share = self.token_share(label)
        first, margin = _first_and_margin(share)
        expert = np.where(self.is_token_routed(label), first, NOT_ROUTED)
        return expert.astype(np.int16), margin.astype(np.float32)

    def dominant_cells(self, label: str, projection: str | None = None) -> DominantExperts:
        """The dominant expert of every (token, layer): in one projection, or over all of them."""
        column = self.column(label)
        arrays: list[NDArray[Any]] = [column.experts, column.weights, column.scores]
        if projection is not None:
            index = self.projection_index(projection)
            arrays = [array[:, :, index : index + 1] for array in arrays]
        experts, weights, scores = _distinct(*arrays)
        T, L = experts.shape[:2]
        dominant = np.full((T, L), NOT_ROUTED, np.int16)
        weight = np.zeros((T, L), np.float32)
        is_tied = np.zeros((T, L), np.bool_)
        step = max(1, _CELLS_PER_CHUNK // max(1, L * self.num_experts))
        for start in range(0, T, step):
            rows = slice(start, start + step)
            total, count = _weight_sums(
                experts[rows], weights[rows], axes=(0, 1), num_experts=self.num_experts
            )
            share = total / np.maximum(count, 1)[..., None]
            first, margin = _first_and_margin(share)
            dominant[rows] = np.where(count > 0, first, NOT_ROUTED)
            weight[rows] = np.take_along_axis(share, first[..., None], axis=-1)[..., 0]
            is_tied[rows] = (margin <= 1e-6) & (count > 0)
        has_score = (experts == dominant[..., None, None]) & np.isfinite(scores)
        num_scores = has_score.sum(axis=(2, 3))
        score_sum = np.where(has_score, scores, 0.0).sum(axis=(2, 3), dtype=np.float64)
        score = np.where(num_scores > 0, score_sum / np.maximum(num_scores, 1), np.nan)
        full = (column.num_tokens, self.num_layers)
        return DominantExperts(
            expert=np.broadcast_to(dominant, full),
            weight=np.broadcast_to(weight, full),
            score=np.broadcast_to(score.astype(np.float32), full),
            is_tied=np.broadcast_to(is_tied, full),
        )

    # File format: a .npz of arrays and a JSON header (UTF-8 bytes), no pickle.

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace to one .npz file, whatever the suffix of `path`."""
        arrays: dict[str, NDArray[Any]] = {}
        headers = []
        for index, column in enumerate(self.columns):
            for name in ("spans", *_TOKEN_ARRAYS):
                arrays[f"{index}.{name}"] = getattr(column, name)
            for name in _ROUTED_ARRAYS:
                # A constant router is stored once, not once per token.
                (arrays[f"{index}.{name}"],) = _distinct(getattr(column, name))
            headers.append(
                {
                    "label": column.label,
                    "router": column.router,
                    "tokens": list(column.tokens),
                    "num_prompt": column.num_prompt,
                    "routed_shape": list(column.experts.shape),
                }
            )
        header = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "expert_names": list(self.expert_names),
            "projections": list(self.projections),
            "num_layers": self.num_layers,
            "columns": headers,
            "meta": self.meta,
        }
        # ASCII JSON: a lone surrogate in a token piece survives as its escape.
        encoded = np.frombuffer(json.dumps(header, allow_nan=False).encode("ascii"), np.uint8)
        # An open file, because numpy would append ".npz" to a bare path.
        with open(path, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, header=encoded, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RoutingTrace":
        """Read a trace that `save` wrote.

        ValueError when the file is not a trace, is damaged, or has a newer format version.
        """
        path = Path(path)
        if not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                is_cut = file.read(2) == b"PK"
            if is_cut:
                raise ValueError(f"{path}: the file is truncated; save or download it again")
            raise ValueError(f"{path}: not a routing trace, needed an .npz that save() wrote")
        try:
            # Checksums first: numpy fails in many ways on an array header with changed bytes.
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"bad checksum of {damaged}")
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
            message = f"{path}: the file is damaged ({error}); save or download it again"
            raise ValueError(message) from error
        header = _read_header(path, arrays)
        try:
            columns = tuple(
                _read_column(index, column, arrays)
                for index, column in enumerate(header["columns"])
            )
            return cls(
                expert_names=tuple(header["expert_names"]),
                projections=tuple(header["projections"]),
                num_layers=header["num_layers"],
                columns=columns,
                meta=header["meta"],
            )
        except (KeyError, TypeError, ValueError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            message = f"{path}: the trace is inconsistent ({what}); save it again"
            raise ValueError(message) from error


def _read_header(path: Path, arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """The JSON header of a loaded file, its format and version checked."""
    try:
        header = json.loads(arrays["header"].tobytes())
        is_trace = header["format"] == FORMAT_NAME
    except (KeyError, TypeError, ValueError):
        is_trace = False
    if not is_trace:
        raise ValueError(f"{path}: not a routing trace, needed an .npz that save() wrote")
    if header.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: trace format version {header.get('version')}, this program reads version "
            f"{FORMAT_VERSION}; update spectr-demo"
        )
    return header


def _read_column(
    index: int, header: dict[str, Any], arrays: dict[str, NDArray[Any]]
) -> ColumnTrace:
    shape = tuple(header["routed_shape"])
    return ColumnTrace(
        label=header["label"],
        router=header["router"],
        tokens=tuple(header["tokens"]),
        num_prompt=header["num_prompt"],
        spans=arrays[f"{index}.spans"],
        **{name: arrays[f"{index}.{name}"] for name in _TOKEN_ARRAYS},
        **{name: np.broadcast_to(arrays[f"{index}.{name}"], shape) for name in _ROUTED_ARRAYS},
    )


def _distinct(*arrays: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """Cut the (T, L, P, K) arrays to length 1 along each of T, L, P in which all are constant.

    Constant means stride 0 (`np.broadcast_to`). K is left alone: slots are summed, not averaged,
    so dropping repeated ones would change a result.
    """
    is_constant = [all(a.strides[axis] == 0 for a in arrays) for axis in range(3)]
    cut = tuple(slice(0, 1) if constant else slice(None) for constant in is_constant)
    return tuple(array[cut] for array in arrays)


def _weight_sums(
    experts: NDArray[np.int16],
    weights: NDArray[np.float32],
    *,
    axes: tuple[int, ...],
    num_experts: int,
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Sum the weights per expert over all axes but `axes` (of T, L, P; K is always summed).

    Returns (*kept, E) sums and (*kept,) counts of the (token, layer, projection) cells in which
    any expert was used.
    """
    kept = tuple(experts.shape[axis] for axis in axes)
    cell = np.zeros((1,) * 4, np.intp)
    for axis in axes:
        place = np.arange(experts.shape[axis]).reshape([-1 if a == axis else 1 for a in range(4)])
        cell = cell * experts.shape[axis] + place
    is_selected = experts != NOT_ROUTED
    # Slots that are not routed weigh 0: any valid id will do for them.
    key = cell * num_experts + np.where(is_selected, experts, 0)
    size = int(np.prod(kept)) * num_experts
    total: NDArray[np.float64] = np.bincount(
        key.ravel(), weights=weights.ravel(), minlength=size
    ).astype(np.float64, copy=False)
    summed = tuple(axis for axis in range(3) if axis not in axes)
    count: NDArray[np.intp] = np.count_nonzero(is_selected.any(axis=3), axis=summed)
    return total.reshape(*kept, num_experts), count


def _mean_weights(
    experts: NDArray[np.int16], weights: NDArray[np.float32], *, axis: int, num_experts: int
) -> NDArray[np.float32]:
    """(n, E) float32 mean weights over the routed cells; n is 1 where the axis is constant."""
    experts, weights = _distinct(experts, weights)
    total, count = _weight_sums(experts, weights, axes=(axis,), num_experts=num_experts)
    return (total / np.maximum(count, 1)[:, None]).astype(np.float32)


def _first_and_margin(share: NDArray[Any]) -> tuple[NDArray[np.intp], NDArray[Any]]:
    """The index of the largest value on the last axis, and its lead over the second largest."""
    if share.shape[-1] == 0:
        return np.zeros(share.shape[:-1], np.intp), np.zeros(share.shape[:-1])
    first = share.argmax(axis=-1)
    largest = np.take_along_axis(share, first[..., None], axis=-1)[..., 0]
    if share.shape[-1] == 1:
        return first, largest
    second = np.partition(share, -2, axis=-1)[..., -2]
    return first, largest - second


def _wrong_array(name: str, array: NDArray[Any], dtype: str, shape: tuple[int, ...]) -> list[str]:
    if not isinstance(array, np.ndarray):
        return [f"{name} is a {type(array).__name__}, needed a numpy array"]
    wrong = []
    if array.dtype != dtype:
        wrong.append(f"{name} has dtype {array.dtype}, needed {dtype}")
    if array.shape != shape:
        wrong.append(f"{name} has shape {array.shape}, needed {shape}")
    return wrong


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _unknown(kind: str, name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{kind} {name!r} is not in the trace, which has {', '.join(known) or 'none'}{hint}"


def mean_logprob(trace: RoutingTrace, label: str) -> float:
    """Mean log-probability of a column's answer tokens under its own model, in nats."""
    column = trace.column(label)
    return float(np.mean(column.logprob[column.num_prompt :]))
