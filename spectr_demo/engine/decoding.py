"""What a base needs for one more token of R rows, and how rows join and leave between two tokens.

transformers' own `generate` prepares a text and hands over (`custom_generate`). From there on each
call of `Decoding.read` is one pass of its loop, so that other rows may join between two of them.

Axes: R rows, T tokens, V vocabulary, H heads, D numbers of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache, DynamicLayer

from spectr_demo.engine.batches import cache_layers

_POSITIONS = "position_ids"  # (..., R, T + 1); some bases take none


@dataclass(eq=False)
class Decoding:
    """R rows between two tokens.

    ids: (R, T) int64, padded on the left. options: what transformers hands from token to token,
    keys and values among it. logits: (R, V) float32 of the next token, of the rows that there were
    when the last one was read.
    """

    model: Any
    ids: Tensor
    options: dict[str, Any]
    logits: Tensor

    @classmethod
    def begun(
        cls, model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Cache | None, **config: Any
    ) -> "Decoding":
        """Reads texts ids (R, T), padded on the left. mask: (R, T), 0 for padding. cache: where
        keys and values go; None is one that grows. config: of `GenerationConfig`."""
        generate: Any = model.generate
        begun: Decoding = generate(
            ids,
            attention_mask=mask,
            **({} if cache is None else {"past_key_values": cache}),
            generation_config=GenerationConfig(
                use_cache=True, do_sample=False, disable_compile=True, **config
            ),
            custom_generate=_begin,
        )
        return begun

    def read(self, tokens: Tensor) -> None:
        """Reads one more token of each row, (R,) int64."""
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        inputs = self.model.prepare_inputs_for_generation(
            self.ids, next_sequence_length=1 if self.options["use_cache"] else None, **self.options
        )
        with self.model._optimize_model_for_decode():
            self._take(self.model(**inputs, return_dict=True))

    def _take(self, output: Any) -> None:
        self.options = self.model._update_model_kwargs_for_generation(output, self.options)
        self.logits = output.logits[:, -1].to(torch.float32, copy=True)  # and let go of all others

    def join(self, other: "Decoding") -> None:
        """Takes in the rows of another one, behind its own; see `rows_can_join`."""
        width = max(self.ids.shape[1], other.ids.shape[1])
        own, new = (width - each.ids.shape[1] for each in (self, other))

        def joined(a: Tensor, b: Tensor) -> Tensor:
            return torch.cat([pad(a, (own, 0)), pad(b, (new, 0))], dim=-2)

        self._mask = joined(self._mask, other._mask)
        self.ids = joined(self.ids, other.ids)
        if _POSITIONS in self.options:
            positions = self.options[_POSITIONS], other.options[_POSITIONS]
            self.options[_POSITIONS] = joined(*positions)
        for layer, its in zip(self._layers, other._layers, strict=True):
            layer.keys, layer.values = (
                torch.cat([pad(a, (0, 0, own, 0)), pad(b, (0, 0, new, 0))])
                for a, b in ((layer.keys, its.keys), (layer.values, its.values))
            )

    def keep(self, rows: Sequence[int]) -> None:
        """Leaves all other rows out, and what was padding for these alone."""
        at = torch.tensor(rows, device=self.ids.device)
        mask = self._mask[at]
        start = int(mask.any(0).int().argmax())  # the first token of the longest
        self.ids, self._mask = self.ids[at, start:], mask[:, start:]
        if _POSITIONS in self.options:
            self.options[_POSITIONS] = self.options[_POSITIONS][..., at, start:]
        for layer in self._layers:
            layer.keys, layer.values = layer.keys[at, :, start:], layer.values[at, :, start:]

    @property
    def _mask(self) -> Tensor:
        """(R, T + 1) int64, 0 for padding: of all tokens, and of the next one."""
        mask: Tensor | None = self.options["attention_mask"]
        if mask is None:  # transformers leaves out one that says nothing
            mask = self.ids.new_ones(len(self.ids), self.ids.shape[1] + 1)
        return mask

    @_mask.setter
    def _mask(self, mask: Tensor) -> None:
        self.options["attention_mask"] = None if mask.all() else mask

    @property
    def _layers(self) -> Sequence[Any]:
        layers: Sequence[Any] = self.options["past_key_values"].layers
        return layers


def _begin(
    model: Any,
    ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **options: Any,
) -> Decoding:
    """As transformers' own loop begins."""
    output = model._prefill(ids, generation_config, options)
    decoding = Decoding(model, ids, options, output.logits)
    decoding._take(output)
    return decoding


def rows_can_join(model: PreTrainedModel) -> bool:
    """Whether the rows of a base can be joined by others at any token: it keeps plain keys and
    values alone, and how it reads a token does not depend on the longest text of the batch."""
    layers = cache_layers(model)
    return layers == {DynamicLayer} and not _rotates_by_length(model)


def _rotates_by_length(model: PreTrainedModel) -> bool:
    """Some rotary embeddings have other frequencies once a text is long."""
    found = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [found, *(each for each in found.values() if isinstance(each, dict))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)
