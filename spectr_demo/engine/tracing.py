"""From a run's recorder to its `RoutingTrace`: the last place that has tensors."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectr_demo.base.prompts import shared_length, token_pieces
from spectr_demo.engine.batches import read_after
from spectr_demo.engine.head import logits_of
from spectr_demo.engine.plan import RoutingPlan
from spectr_demo.engine.reading import Lane
from spectr_demo.engine.recorder import Recorder
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.routing.routers import ROUTERS
from spectr_demo.trace import NOT_ROUTED, Candidates, ColumnTrace, Reading, RoutingTrace

# Of 64 positions the logits are computed at once, since that reads the head. Their distributions
# are compared a few at a time: 8 x 49,152 float32 stay in the cache, which is six times as fast.
_POSITIONS_AT_ONCE, _COMPARED_AT_ONCE = 64, 8

_NUM_CANDIDATES = 3

# Log-probability, entropy and KL (T,), and ids and probabilities (T, 2, N) of the likeliest tokens,
# the row's own before the base's. Entry t is what token t was drawn from.
TokenStatistics = tuple[NDArray[Any], ...]
# What each of them has for a token that was not drawn.
_UNKNOWN = (np.nan, np.nan, np.nan, -1, 0)
Place = tuple[int, int]  # a row of the batch, and a token of it


@dataclass(eq=False)
class Row:
    """One row of a run's batch: a lane of a column, and what is generated in it. has_end: whether
    its last token is an end token. clock: the times of its first and its last token. fault: why it
    had to end before its next token. weights: of the experts that it uses, by name; None where they
    change with its tokens."""

    column: int
    lane: Lane
    answer: list[int] = field(default_factory=list)
    is_finished: bool = False
    has_end: bool = False
    fault: str = ""
    clock: list[float] = field(default_factory=list)
    weights: dict[str, float] | None = None

    @property
    def token_ids(self) -> list[int]:
        """Prompt and answer."""
        return [*self.lane.ids, *self.answer]


def build_trace(
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    library: ExpertLibrary,
    plan: RoutingPlan,
    labels: Sequence[str],
    prompt_ids: Sequence[int],
    rows: Sequence[Row],
    meta: dict[str, Any],
    is_complete: bool,
) -> RoutingTrace:
    """The trace of a run that has ended, or of one still going.

    rows: of the plan, in its order; their answers are cut after the end token. Where not complete,
    the pass of the base over the answers is left out, and log-probability, entropy and KL are NaN.
    """
    recorder = plan.recorder
    assert recorder is not None
    if is_complete:
        statistics = _token_statistics(model, plan, recorder, rows)
    else:
        statistics = [_unknown_statistics(len(row.token_ids)) for row in rows]
    columns = []
    for column, label in enumerate(labels):
        numbers = [i for i, row in enumerate(rows) if row.column == column]
        places = _places(prompt_ids, rows, numbers)
        token_ids = [*prompt_ids, *(token for i in numbers for token in rows[i].answer)]
        pieces = _with_line_ends(token_pieces(tokenizer, token_ids), rows, places)
        ends = np.cumsum([len(piece) for piece in pieces])
        routing = {row: _routing(library, plan, row, rows[row]) for row in numbers}
        experts, weights, scores = _in_order(routing, places, (NOT_ROUTED, 0, np.nan))
        of_rows = {row: statistics[row] for row in numbers}
        logprob, entropy, kl, likeliest, probs = _in_order(of_rows, places, _UNKNOWN)
        columns.append(
            ColumnTrace(
                label=label,
                router=plan.routers[numbers[0]].to_json(),
                token_ids=np.array(token_ids, np.int32),
                tokens=tuple(pieces),
                spans=np.stack([ends - [len(piece) for piece in pieces], ends], 1).astype(np.int32),
                num_prompt=len(prompt_ids),
                experts=experts,
                weights=weights,
                scores=scores,
                logprob=logprob,
                entropy=entropy,
                kl=kl,
                candidates=_candidates(tokenizer, likeliest, probs) if is_complete else None,
                reading=_reading(library, {row: rows[row].lane for row in numbers}, places),
            )
        )
    return RoutingTrace(
        expert_names=library.names,
        projections=library.projections,
        num_layers=library.num_layers,
        columns=tuple(columns),
        meta=meta,
    )


def _places(
    prompt_ids: Sequence[int], rows: Sequence[Row], numbers: Sequence[int]
) -> list[Place | None]:
    """Where each token of a column was read or written; None for blanks between two lanes.

    What lanes have in common is taken from the first one before the request, and from the last one
    after it.
    """
    first, last = rows[numbers[0]].lane, rows[numbers[-1]].lane
    places: list[Place | None] = [(numbers[0], t) for t in range(first.start)]
    for row in numbers:
        lane = rows[row].lane
        places += [None] * (lane.start - len(places))
        places += [(row, first.start + t) for t in range(lane.stop - lane.start)]
    closing = len(prompt_ids) - last.stop
    places += [(numbers[-1], len(last.ids) - closing + t) for t in range(closing)]
    for row in numbers:
        num = len(rows[row].lane.ids)
        places += [(row, num + t) for t in range(len(rows[row].answer))]
    return places


def _with_line_ends(
    pieces: list[str], rows: Sequence[Row], places: Sequence[Place | None]
) -> list[str]:
    """Answers of different lanes are different lines: an end token between them is written as a
    line end."""
    out = list(pieces)
    for i, (place, following) in enumerate(itertools.pairwise(places)):
        if place is None or following is None:
            continue
        row, t = place
        is_last = t == len(rows[row].token_ids) - 1
        if following[0] != row and is_last:
            out[i] = "\n" if rows[row].has_end else f"{pieces[i]}\n"
    return out


def _in_order(
    arrays: Mapping[int, tuple[NDArray[Any], ...]],
    places: Sequence[Place | None],
    unread: Sequence[float],
) -> tuple[NDArray[Any], ...]:
    """The arrays (T_row, ...) of some rows, token by token as `places` has them.

    unread: what each array has for a token that no lane read. One row alone is taken as it is,
    since it may be a view of one token.
    """
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    out = []
    for kind, value in zip(zip(*arrays.values(), strict=True), unread, strict=True):
        of_row = dict(zip(arrays, kind, strict=True))
        joined = np.full((len(places), *kind[0].shape[1:]), value, kind[0].dtype)
        for i, place in enumerate(places):
            if place is not None:
                joined[i] = of_row[place[0]][place[1]]
        out.append(joined)
    return tuple(out)


def _reading(
    library: ExpertLibrary, lanes: Mapping[int, Lane], places: Sequence[Place | None]
) -> Reading | None:
    """What the lanes of a column's rows were chosen by; None where its router reads no request."""
    standing = [lane.standing for lane in lanes.values() if lane.standing is not None]
    if not standing:
        return None
    shape = (len(lanes), library.num_layers, len(library.names))
    total, num = np.zeros((2, *shape), np.float32)
    for bank in library.banks:
        layers = library.places(bank)[0]
        for number, lane in enumerate(lanes.values()):
            place: Any = (number, layers[:, None], bank.expert_ids.numpy())
            np.add.at(total, place, lane.by_layer[bank].numpy())
            np.add.at(num, place, 1)
    number_of = {row: number for number, row in enumerate(lanes)}
    return Reading(
        lanes=np.array(
            [-1 if place is None else number_of[place[0]] for place in places], np.int16
        ),
        standing=np.stack([each.numpy() for each in standing]),
        certainty=np.divide(total, num, out=np.full_like(total, np.nan), where=num > 0),
    )


def _routing(
    library: ExpertLibrary, plan: RoutingPlan, number: int, row: Row
) -> tuple[NDArray[np.int16], NDArray[np.float32], NDArray[np.float32]]:
    """Experts, weights and scores (T, L, P, K) of a row."""
    router, num_tokens = plan.routers[number], len(row.token_ids)
    if number in plan.num_chosen:
        assert plan.recorder is not None
        num_chosen, num_padding = plan.num_chosen[number], plan.num_padding[number]
        return plan.recorder.routing(library, number, num_tokens, num_chosen, num_padding)
    # Constant weights: one row of arrays, seen by every token through a broadcast view.
    places = (1, library.num_layers, len(library.projections))
    weights = np.zeros((*places, len(library.names)), np.float32)
    scores = np.full_like(weights, np.nan)
    for bank in library.banks:
        constant = plan.constant.of(bank)[number, 0, 0].cpu().numpy()
        layers, projections = (places[:, None] for places in library.places(bank))
        weights[0, layers, projections, bank.expert_ids.numpy()] = constant
        if bank in row.lane.by_layer:
            certainty = row.lane.by_layer[bank].numpy()
            scores[0, layers, projections, bank.expert_ids.numpy()] = certainty
    used = np.flatnonzero(weights.any(axis=(0, 1, 2)))
    weights, scores = weights[..., used], scores[..., used]
    experts = np.where(weights > 0, used, NOT_ROUTED).astype(np.int16)
    scores = np.where(weights > 0, scores, np.nan)
    if ROUTERS[router.name].reads_request:  # in each lane it may choose other experts, or none
        free = [(0, 0)] * 3 + [(0, (router.top_k or 0) - len(used))]
        experts = np.pad(experts, free, constant_values=NOT_ROUTED)
        weights = np.pad(weights, free)
        scores = np.pad(scores, free, constant_values=np.nan)
    shape = (num_tokens, *weights.shape[1:])
    return (
        np.broadcast_to(experts, shape),
        np.broadcast_to(weights, shape),
        np.broadcast_to(scores, shape),
    )


def _token_statistics(
    model: PreTrainedModel, plan: RoutingPlan, recorder: Recorder, rows: Sequence[Row]
) -> list[TokenStatistics]:
    """Per row: log-probability, entropy and KL(routed || base) of each token, in nats.

    All of the model's own distribution, before temperature. The routed side reuses the hidden
    states of the run; the base reads all rows in one teacher-forced pass without experts, and what
    they begin with alike only once. A base column needs no second reading.
    """
    hidden = recorder.hidden()
    routed_hidden = [hidden[i, plan.num_padding[i] :] for i in range(len(rows))]
    others = [i for i, router in enumerate(plan.routers) if router.name != "base"]
    base_hidden = {i: routed_hidden[i] for i in range(len(rows)) if i not in others}
    if others:
        read = _read_as_base(model, [rows[i].token_ids for i in others])
        base_hidden.update(zip(others, read, strict=True))
    return [
        _compare(
            model,
            torch.tensor(row.token_ids, device=hidden.device),
            routed_hidden[i],
            base_hidden[i],
        )
        for i, row in enumerate(rows)
    ]


def _read_as_base(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> Tensor:
    """The base's last hidden states on these texts: (R, T, D), rows padded on the right.

    The last token of a text predicts nothing and is not read. Padding needs no mask: attention is
    causal, and padded places are not used.
    """
    texts = [list(text[:-1]) for text in texts]
    num_shared = min(shared_length(texts[0], text) for text in texts)
    width = max(map(len, texts)) - num_shared
    padded = torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        padded[row, : len(text) - num_shared] = torch.tensor(text[num_shared:])
    return next(read_after(model, texts[0][:num_shared], [(padded, None)]))


def _unknown_statistics(num_tokens: int) -> TokenStatistics:
    shapes = *[(num_tokens,)] * 3, *[(num_tokens, 2, _NUM_CANDIDATES)] * 2
    dtypes = *[np.float32] * 3, np.int32, np.float32
    parts = zip(shapes, _UNKNOWN, dtypes, strict=True)
    return tuple(np.full(shape, value, dtype) for shape, value, dtype in parts)


def _candidates(
    tokenizer: PreTrainedTokenizerBase, ids: NDArray[np.int32], probs: NDArray[np.float32]
) -> Candidates:
    """Texts of ids (T, 2, N); of -1 there is none."""
    texts = {
        token: str(tokenizer.decode([token])) for token in np.unique(ids).tolist() if token >= 0
    }
    pieces = tuple(
        tuple(texts.get(i, "") for i in row) for row in ids.reshape(len(ids), -1).tolist()
    )
    return Candidates(texts=pieces, probs=probs)


def _compare(
    model: PreTrainedModel, token_ids: Tensor, hidden: Tensor, base_hidden: Tensor
) -> TokenStatistics:
    """token_ids (T,), hidden states (>= T - 1, D). Entry t is what token t was drawn from."""
    is_base = hidden.data_ptr() == base_hidden.data_ptr()
    T = len(token_ids) - 1
    texts = hidden[:T], base_hidden[:T], token_ids[1:]
    parts: list[tuple[Tensor, ...]] = []
    for read, base, drawn in zip(*(part.split(_POSITIONS_AT_ONCE) for part in texts), strict=True):
        logits = logits_of(model, read)
        base_logits = logits if is_base else logits_of(model, base)
        some = (part.split(_COMPARED_AT_ONCE) for part in (logits, base_logits, drawn))
        parts += [_statistics(*each) for each in zip(*some, strict=True)]
    found = _unknown_statistics(len(token_ids))
    for into, values in zip(found, zip(*parts, strict=True), strict=True):
        into[1:] = torch.cat(values).cpu().numpy()
    return found


def _statistics(logits: Tensor, base_logits: Tensor, drawn: Tensor) -> tuple[Tensor, ...]:
    """What `TokenStatistics` has of the drawn tokens (T,), from logits (T, V)."""
    logprobs = logits.log_softmax(-1, dtype=torch.float32)
    base_logprobs = base_logits.log_softmax(-1, dtype=torch.float32)
    likeliest = [each.topk(_NUM_CANDIDATES, dim=-1) for each in (logprobs, base_logprobs)]
    probs = logprobs.exp()
    logprob = logprobs.gather(-1, drawn[:, None])[:, 0]
    entropy = -torch.linalg.vecdot(probs, logprobs)
    logprobs -= base_logprobs
    kl = torch.linalg.vecdot(probs, logprobs).clamp(min=0)
    ids, values = (torch.stack([each[i] for each in likeliest], dim=1) for i in (1, 0))
    return logprob, entropy, kl, ids, values.exp()


def output_logprobs(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(T, V) float32 log-probabilities from hidden states (T, D), as the model's own head computes
    them."""
    return logits_of(model, hidden).log_softmax(-1, dtype=torch.float32)
