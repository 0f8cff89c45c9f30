"""What a base can do with several texts at once: go on after one beginning, and run rows.

A base with attention alone can do both. It keeps keys and values of each token, and a mask leaves
padding out. Recurrent layers keep a state of all tokens instead. In some architectures it cannot be
gone on from with several tokens, or takes in what pads a row, or mixes rows up.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from spectr_demo.base.decoder import decoder_of
from spectr_demo.base.memory import execution_device
from spectr_demo.base.prompts import pad_left
from spectr_demo.engine.layers import routed
from spectr_demo.engine.plan import Plan

# A `DummyLayer` keeps nothing: its layer has no attention, or reads the keys of another one.
_OF_ATTENTION = {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}
_NUM_TOKENS, _NUM_PADDING = 6, 2  # of texts that are tried out side by side
_NUM_STEPS = 3
_MOST_KEPT = 256  # tokens of a beginning
_TOLERANCE = {torch.float32: 1e-3}  # of probabilities, summed over the vocabulary
_TOLERANCE_16_BIT = 0.2

_cache_layers: WeakKeyDictionary[PreTrainedModel, frozenset[type] | None] = WeakKeyDictionary()
_last_begun: WeakKeyDictionary[PreTrainedModel, tuple[tuple[int, ...], Any]] = WeakKeyDictionary()
# Whether rows of one length (False) and padded ones (True) are independent.
_are_independent: WeakKeyDictionary[PreTrainedModel, dict[bool, bool]] = WeakKeyDictionary()


def has_attention_alone(model: PreTrainedModel) -> bool:
    """Whether all that a base keeps of a text is keys and values of its tokens."""
    layers = cache_layers(model)
    return layers is not None and layers <= _OF_ATTENTION


@torch.inference_mode()
def cache_layers(model: PreTrainedModel) -> frozenset[type] | None:
    """Of what kinds the layers of a base's cache are; None where that is one of its own, or none.
    A token is read to find out, once."""
    if model not in _cache_layers:
        token = torch.zeros(1, 1, dtype=torch.long, device=_device(model))
        with routed(None):
            output = decoder_of(model)(input_ids=token, use_cache=True)
        cache: Any = getattr(output, "past_key_values", None)
        is_plain = type(cache) is DynamicCache
        _cache_layers[model] = frozenset(map(type, cache.layers)) if is_plain else None
    return _cache_layers[model]


@torch.inference_mode()
def read_after(
    model: PreTrainedModel,
    beginning: Sequence[int],
    batches: Sequence[tuple[Tensor, Plan | None]],
    *,
    is_kept: bool = False,
) -> Iterator[Tensor]:
    """Read rows of token ids (R, T), each row after the same beginning and under a plan.

    Gives the last hidden states (R, B + T, D) of each batch, those of the beginning's B tokens too.
    These are read once, under no plan, if the base has attention alone. Else they are read in each
    row, and the plan sees them. is_kept: the beginning is a chat template's. Texts that come later
    have it too, and what the base makes of it is kept.
    """
    first = torch.tensor([list(beginning)], dtype=torch.long)
    if not beginning or not has_attention_alone(model):
        for ids, plan in batches:
            rows = torch.cat([first.expand(len(ids), -1), ids], dim=1)
            yield _read(model, rows, plan, use_cache=False).last_hidden_state
        return
    begun = _kept(model, beginning) if is_kept else _read(model, first, None, use_cache=True)
    for ids, plan in batches:
        hidden = begun.last_hidden_state.expand(len(ids), -1, -1)
        if ids.shape[1] == 0:
            yield hidden
            continue
        cache = copy.deepcopy(begun.past_key_values)
        cache.batch_repeat_interleave(len(ids))
        rest = _read(model, ids, plan, past_key_values=cache, use_cache=True)
        yield torch.cat([hidden, rest.last_hidden_state], dim=1)


def _kept(model: PreTrainedModel, beginning: Sequence[int]) -> Any:
    """What the base makes of the last beginning; nobody may write into it."""
    ids = tuple(beginning)
    known, begun = _last_begun.get(model, ((), None))
    if known != ids:
        begun = _read(model, torch.tensor([ids]), None, use_cache=True)
        if len(ids) <= _MOST_KEPT:
            _last_begun[model] = ids, begun
    return begun


def _read(model: PreTrainedModel, ids: Tensor, plan: Plan | None, **options: Any) -> Any:
    with routed(plan):
        return decoder_of(model)(input_ids=ids.to(_device(model)), **options)


def check_rows(model: PreTrainedModel, lengths: Sequence[int]) -> None:
    """Raises ValueError where texts of these lengths, in tokens, cannot be continued side by side.

    Of a base with more than attention this is tried out, once. It takes some passes over a few
    tokens.
    """
    if len(lengths) == 1 or has_attention_alone(model):
        return
    known = _are_independent.setdefault(model, {})
    is_padded = len(set(lengths)) > 1
    for with_padding in {False, is_padded}:
        if with_padding not in known:
            known[with_padding] = _try_rows(model, with_padding)
    if not known[False]:
        raise ValueError(
            f"{type(model).__name__} mixes up the rows of a batch, and {len(lengths)} rows were to "
            "be run: run one column at a time, and ask for one thing at a time"
        )
    if is_padded and not known[True]:
        raise ValueError(
            f"texts of {min(lengths)} to {max(lengths)} tokens were to be run side by side, and "
            f"{type(model).__name__} takes in what pads the shorter ones: ask for one thing at a "
            "time"
        )


@torch.inference_mode()
def _try_rows(model: PreTrainedModel, with_padding: bool) -> bool:
    """Whether two rows are continued side by side as each is alone."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(vocabulary, (2, _NUM_TOKENS), generator=generator).tolist()
    rows = [first, second[_NUM_PADDING:] if with_padding else second]
    together = _next_probabilities(model, rows)
    alone = torch.cat([_next_probabilities(model, [row]) for row in rows])
    difference = (together - alone).abs().sum(-1).max()
    return bool(difference <= _TOLERANCE.get(model.dtype, _TOLERANCE_16_BIT))


def _next_probabilities(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """(R, S, V) of S tokens, each after the same ones in all rows."""
    ids, mask = (part.to(_device(model)) for part in pad_left(rows))
    watch = _Watch(model.generation_config)
    with routed(None):
        model.generate(
            ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=_NUM_STEPS, do_sample=False, use_cache=True, pad_token_id=0
            ),
            logits_processor=LogitsProcessorList([watch]),
        )
    return torch.stack(watch.probabilities, dim=1)


class _Watch(LogitsProcessor):
    """Keeps what is likely next, and has other tokens come in all rows, none that ends them."""

    def __init__(self, settings: GenerationConfig | None) -> None:
        end = None if settings is None else settings.eos_token_id
        ends = end if isinstance(end, list) else [end]
        self.probabilities: list[Tensor] = []
        self._tokens = [i for i in range(_NUM_STEPS + len(ends)) if i not in ends]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self._tokens[len(self.probabilities)]
        self.probabilities.append(scores.float().softmax(-1))
        return torch.full_like(scores, -torch.inf).index_fill(
            1, torch.tensor([token], device=scores.device), 0
        )


def _device(model: PreTrainedModel) -> torch.device:
    return execution_device(model.get_input_embeddings())
