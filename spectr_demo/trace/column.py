"""The routing of one column of a run, token by token: plain arrays, checked when they come in.

Axes: `T` tokens, `L` layers, `P` projections (linear layers routed in each decoder layer), `K`
selected experts, `E` experts.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

NOT_ROUTED = -1

Part = Literal["prompt", "answer", "all"]
PARTS: tuple[Part, ...] = ("prompt", "answer", "all")

# The arrays of a column and their dtypes.
ROUTED_ARRAYS = {"experts": "int16", "weights": "float32", "scores": "float32"}  # (T, L, P, K)
TOKEN_ARRAYS = {  # (T,)
    "token_ids": "int32",
    "logprob": "float32",
    "entropy": "float32",
    "kl": "float32",
}


READING_ARRAYS = {"lanes": "int16", "standing": "float32", "certainty": "float32"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """What a router found that reads the requests of a prompt before they are answered.

    Each request is read and answered in a lane of its own; there are S of them.

    lanes: (T,) int16, the lane of each token, prompt and answer; -1 for blanks between requests.
    standing: (S, E) float32, by which the experts were chosen: how far each stands out, in standard
        deviations over ordinary prompts. certainty: (S, L, E) float32 in [-1, 1], the evidence of
        each layer (the mean over its projections), NaN where a layer does not have the expert.
    """

    lanes: NDArray[np.int16]
    standing: NDArray[np.float32]
    certainty: NDArray[np.float32]

    def wrong(self, T: int, L: int) -> list[str]:
        """What does not fit T tokens and L layers."""
        S, E = self.standing.shape if np.ndim(self.standing) == 2 else (0, 0)
        shapes = {"lanes": (T,), "standing": (S, E), "certainty": (S, L, E)}
        wrong = []
        for name, dtype in READING_ARRAYS.items():
            wrong += _wrong_array(name, getattr(self, name), dtype, shapes[name])
        if not wrong and not (self.lanes.min() >= -1 and self.lanes.max() < S):
            wrong.append(
                f"lanes has {self.lanes.min()} to {self.lanes.max()}, needed -1 to {S - 1}"
            )
        return wrong


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """The likeliest tokens at each place: the column's own, and the bare base's on the same text.

    texts: T tuples of 2 N texts, the column's N before the base's; "" where token t was not drawn.
    probs: (T, 2, N) float32, falling.
    """

    texts: tuple[tuple[str, ...], ...]
    probs: NDArray[np.float32]

    def wrong(self, T: int) -> list[str]:
        """What does not fit T tokens."""
        N = self.probs.shape[-1] if np.ndim(self.probs) == 3 else 0
        wrong = _wrong_array("probs of candidates", self.probs, "float32", (T, 2, N))
        if not wrong and [len(row) for row in self.texts] != [2 * N] * T:
            wrong.append(f"candidates has not {T} times {2 * N} texts")
        return wrong


@dataclass(frozen=True, kw_only=True, eq=False)
class ColumnTrace:
    """The routing of one column (one row of the batch), token by token.

    label: the column's name, unique in its trace, e.g. "spectr" or "single:sql".
    router: the router's settings as JSON values (name, top_k, weighting, temperature, ...).
    token_ids: (T,) int32. tokens: T pieces of text; joined they are the whole text, with the
        chat template. spans: (T, 2) int32, characters [start, end) of each token in that text.
    num_prompt: tokens[:num_prompt] are the prompt, the rest is the answer.
    experts: (T, L, P, K) int16, the selected experts; `NOT_ROUTED` where there is none (the base
        model, an absent projection, and tokens that were never read: the last generated one, and
        blanks between requests that were read one by one).
    weights: (T, L, P, K) float32, >= 0, and 0 where not routed.
    scores: (T, L, P, K) float32, NaN where the router computes none or nothing was routed.
    logprob, entropy, kl: (T,) float32 in nats, NaN where undefined (token 0, such blanks, a run in
        progress).
        logprob[t] is that of token t given the tokens before it; entropy[t] and kl[t] are of
        the distribution that token t was drawn from, kl being KL(routed || base).
    candidates: what might have stood in each token's place; None for a run in progress.
    reading: of a router that reads the requests first, else None.

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
    reading: Reading | None = None
    candidates: Candidates | None = None

    def __post_init__(self) -> None:
        T = len(self.tokens)
        wrong: list[str] = []
        if not self.label:
            wrong.append("label is empty; give the column a name")
        if T == 0:
            wrong.append("tokens is empty; a trace needs at least one token")
        wrong += _wrong_array("spans", self.spans, "int32", (T, 2))
        for name, dtype in TOKEN_ARRAYS.items():
            wrong += _wrong_array(name, getattr(self, name), dtype, (T,))
        routed_shape = np.shape(self.experts)
        if len(routed_shape) != 4:
            wrong.append(f"experts has shape {routed_shape}, needed (T, L, P, K)")
        else:
            for name, dtype in ROUTED_ARRAYS.items():
                shape = (T, *routed_shape[1:])
                wrong += _wrong_array(name, getattr(self, name), dtype, shape)
            if self.reading is not None:
                wrong += self.reading.wrong(T, routed_shape[1])
        if self.candidates is not None:
            wrong += self.candidates.wrong(T)
        if not 0 <= self.num_prompt <= T:
            wrong.append(f"num_prompt is {self.num_prompt}, needed 0 to {T} (the tokens)")
        if not wrong:
            wrong += self._wrong_values()
        if not is_json(self.router):
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
        experts, weights = distinct(self.experts, self.weights)
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
    def text(self) -> str:
        """The whole text, chat template included."""
        return "".join(self.tokens)

    @property
    def is_routed(self) -> bool:
        """Whether any expert was used anywhere: False for the base model alone."""
        (experts,) = distinct(self.experts)
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


def distinct(*arrays: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """Cut the (T, L, P, K) arrays to length 1 along each of T, L, P in which all are constant.

    Constant means stride 0 (`np.broadcast_to`). K is left alone: slots are summed, not averaged,
    so dropping repeated ones would change a result.
    """
    is_constant = [all(a.strides[axis] == 0 for a in arrays) for axis in range(3)]
    cut = tuple(slice(0, 1) if constant else slice(None) for constant in is_constant)
    return tuple(array[cut] for array in arrays)


def is_json(value: object) -> bool:
    """Whether JSON can hold a value: plain types, and no NaN."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _wrong_array(name: str, array: NDArray[Any], dtype: str, shape: tuple[int, ...]) -> list[str]:
    """What is wrong with an array's type, dtype and shape; nothing where it fits."""
    if not isinstance(array, np.ndarray):
        return [f"{name} is a {type(array).__name__}, needed a numpy array"]
    wrong = []
    if array.dtype != dtype:
        wrong.append(f"{name} has dtype {array.dtype}, needed {dtype}")
    if array.shape != shape:
        wrong.append(f"{name} has shape {array.shape}, needed {shape}")
    return wrong
