"""From a run's recorder to its `RoutingTrace`: the last place that has tensors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectr_demo.engine.layers import routed
from spectr_demo.engine.plan import RoutingPlan
from spectr_demo.engine.recorder import Recorder
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.routing.routers import ROUTERS
from spectr_demo.trace import NOT_ROUTED, ColumnTrace, RoutingTrace

# Of 64 positions the logits are computed at once, since that reads the head. Their distributions
# are compared a few at a time: 8 x 49,152 float32 stay in the cache, which is six times as fast.
_POSITIONS_AT_ONCE, _COMPARED_AT_ONCE = 64, 8

TokenStatistics = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]


def token_pieces(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds; pieces join to the whole text, special tokens included.

    A character spread over several tokens belongs to the last of them; the others are empty.
    """

    def decode(first: int, last: int) -> str:
        return str(tokenizer.decode(list(token_ids[first:last]), skip_special_tokens=False))

    pieces = []
    context = done = 0  # text before `done` is out; decoding starts at `context` to keep spaces
    for end in range(1, len(token_ids) + 1):
        before, text = decode(context, done), decode(context, end)
        is_whole = not text.endswith("�") or end == len(token_ids)
        pieces.append(text[len(before) :] if is_whole else "")
        if is_whole:
            context, done = done, end
    return pieces


def build_trace(
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    library: ExpertLibrary,
    plan: RoutingPlan,
    labels: Sequence[str],
    prompt_ids: Sequence[int],
    answers: Sequence[Sequence[int]],
    meta: dict[str, Any],
    is_complete: bool,
) -> RoutingTrace:
    """The trace of a run that has ended, or of one still going.

    answers: token ids of each column, cut after its end token. Where not complete, the pass of the
    base over the answers is left out, and log-probability, entropy and KL are NaN.
    """
    recorder = plan.recorder
    assert recorder is not None
    statistics: list[TokenStatistics]
    if is_complete:
        statistics = _token_statistics(model, plan, recorder, prompt_ids, answers)
    else:
        lengths = [len(prompt_ids) + len(answer) for answer in answers]
        statistics = [_unknown_statistics(T) for T in lengths]
    columns = []
    for row, (label, answer) in enumerate(zip(labels, answers, strict=True)):
        token_ids = [*prompt_ids, *answer]
        pieces = token_pieces(tokenizer, token_ids)
        ends = np.cumsum([len(piece) for piece in pieces])
        experts, weights, scores = _routing(library, plan, row, len(token_ids))
        logprob, entropy, kl = statistics[row]
        columns.append(
            ColumnTrace(
                label=label,
                router=plan.routers[row].to_json(),
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
            )
        )
    return RoutingTrace(
        expert_names=library.names,
        projections=library.projections,
        num_layers=library.num_layers,
        columns=tuple(columns),
        meta=meta,
    )


def _routing(
    library: ExpertLibrary, plan: RoutingPlan, row: int, num_tokens: int
) -> tuple[NDArray[np.int16], NDArray[np.float32], NDArray[np.float32]]:
    router = plan.routers[row]
    if ROUTERS[router.name].score is not None:
        assert plan.recorder is not None and router.top_k is not None
        return plan.recorder.routing(library, row, num_tokens, router.top_k)
    # Constant weights: one row of arrays, seen by every token through a broadcast view.
    places = (1, library.num_layers, len(library.projections))
    weights = np.zeros((*places, len(library.names)), np.float32)
    for bank in library.banks:
        constant = plan.constant.of(bank)[row, 0, 0].cpu().numpy()
        layers, projections = (places[:, None] for places in library.places(bank))
        weights[0, layers, projections, bank.expert_ids.numpy()] = constant
    used = np.flatnonzero(weights.any(axis=(0, 1, 2)))
    weights = weights[..., used]
    experts = np.where(weights > 0, used, NOT_ROUTED).astype(np.int16)
    shape = (num_tokens, *weights.shape[1:])
    scores = np.full((1, 1, 1, 1), np.nan, np.float32)
    return (
        np.broadcast_to(experts, shape),
        np.broadcast_to(weights, shape),
        np.broadcast_to(scores, shape),
    )


def _token_statistics(
    model: PreTrainedModel,
    plan: RoutingPlan,
    recorder: Recorder,
    prompt_ids: Sequence[int],
    answers: Sequence[Sequence[int]],
) -> list[TokenStatistics]:
    """Per column: log-probability, entropy and KL(routed || base) of each token, in nats.

    All of the model's own distribution, before temperature. The routed side reuses the hidden
    states of the run; the base reads all columns in one teacher-forced pass without experts, and
    the prompt they share only once. A base column needs no second reading.
    """
    hidden = recorder.hidden()
    others = [row for row, router in enumerate(plan.routers) if router.name != "base"]
    base_hidden = {row: hidden[row] for row in range(len(answers)) if row not in others}
    if others:
        read = _read_as_base(model, prompt_ids, [answers[row] for row in others])
        base_hidden.update(zip(others, read, strict=True))
    statistics = []
    for row, answer in enumerate(answers):
        token_ids = torch.tensor([*prompt_ids, *answer], device=hidden.device)
        statistics.append(_compare(model, token_ids, hidden[row], base_hidden[row]))
    return statistics


def _read_as_base(
    model: PreTrainedModel, prompt_ids: Sequence[int], answers: Sequence[Sequence[int]]
) -> Tensor:
    """The base's last hidden states on these texts: (R, T, D), rows padded on the right.

    Padding needs no mask: attention is causal, and padded places are not used.
    """
    decoder, device = model.get_decoder(), model.device
    with routed(None):
        if len(answers) == 1:
            text = torch.tensor([[*prompt_ids, *answers[0][:-1]]], device=device)
            return decoder(input_ids=text, use_cache=False).last_hidden_state
        prompt = decoder(input_ids=torch.tensor([prompt_ids], device=device), use_cache=True)
        hidden = prompt.last_hidden_state.expand(len(answers), -1, -1)
        width = max(map(len, answers)) - 1  # the last token predicts nothing
        if width < 1:
            return hidden
        cache = prompt.past_key_values
        cache.batch_repeat_interleave(len(answers))
        padded = torch.zeros(len(answers), width, dtype=torch.long)
        for row, answer in enumerate(answers):
            read = torch.tensor(answer[:-1], dtype=torch.long)
            padded[row, : len(read)] = read
        rest = decoder(input_ids=padded.to(device), past_key_values=cache, use_cache=True)
    return torch.cat([hidden, rest.last_hidden_state], dim=1)


def _unknown_statistics(num_tokens: int) -> TokenStatistics:
    unknown = np.full(num_tokens, np.nan, np.float32)
    return unknown, unknown, unknown


def _compare(
    model: PreTrainedModel, token_ids: Tensor, hidden: Tensor, base_hidden: Tensor
) -> TokenStatistics:
    """token_ids (T,), hidden states (>= T - 1, D). Entry t is what token t was drawn from."""
    is_base = hidden.data_ptr() == base_hidden.data_ptr()
    T = len(token_ids) - 1
    texts = hidden[:T], base_hidden[:T], token_ids[1:]
    parts: list[Tensor] = []
    for read, base, drawn in zip(*(part.split(_POSITIONS_AT_ONCE) for part in texts), strict=True):
        logits = _logits(model, read)
        base_logits = logits if is_base else _logits(model, base)
        some = (part.split(_COMPARED_AT_ONCE) for part in (logits, base_logits, drawn))
        parts += [_statistics(*each) for each in zip(*some, strict=True)]
    columns = np.full((3, len(token_ids)), np.nan, np.float32)
    columns[:, 1:] = torch.cat(parts, dim=1).cpu().numpy()
    return columns[0], columns[1], columns[2]


def _statistics(logits: Tensor, base_logits: Tensor, drawn: Tensor) -> Tensor:
    """(3, T): log-probability of the drawn tokens (T,), entropy and KL from logits (T, V)."""
    logprobs = logits.log_softmax(-1, dtype=torch.float32)
    probs = logprobs.exp()
    logprob = logprobs.gather(-1, drawn[:, None])[:, 0]
    entropy = -torch.linalg.vecdot(probs, logprobs)
    logprobs -= base_logits.log_softmax(-1, dtype=torch.float32)
    kl = torch.linalg.vecdot(probs, logprobs).clamp(min=0)
    return torch.stack([logprob, entropy, kl])


def output_logprobs(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(T, V) float32 log-probabilities from hidden states (T, D), as the model's own head computes
    them."""
    return _logits(model, hidden).log_softmax(-1, dtype=torch.float32)


def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    logits = model.get_output_embeddings()(hidden)
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    if scale != 1:
        logits = logits.float() * scale
    if cap:
        logits = cap * torch.tanh(logits.float() / cap)
    return logits
