"""The routed model in EleutherAI's lm-evaluation-harness, under the name `spectr`.

The harness pads on the left to generate, and on the right, without a mask, to read likelihoods.
Padding on the right changes nothing: no token sees what follows it. A router that reads the request
must not see the continuation. The harness does not mark where that begins, so the contexts' lengths
are kept here. It takes each context for one request, since the harness asks one thing at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

from torch import Tensor

from spectr_demo.config import DEFAULT_ROUTER, RouterConfig
from spectr_demo.engine.layers import routed
from spectr_demo.engine.model import SpectrModel, load
from spectr_demo.routing.routers import parse_router

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(
        f"lm-evaluation-harness cannot be imported ({error}); "
        "run: pip install -r requirements-eval.txt, or spectr-demo[eval]"
    ) from error


@register_model("spectr")
class SpectrLM(HFLM):
    """The harness's model of transformers, with every forward pass routed by one router."""

    def __init__(
        self,
        base: str | SpectrModel | None = None,
        experts: str | None = None,
        router: str | RouterConfig = DEFAULT_ROUTER,
        device: str | None = None,
        **options: Any,
    ) -> None:
        """base: Hub id or folder, None as in `load`, or a loaded engine, which has its experts.

        experts: Hub ids or folders, separated by semicolons; None as in `load`.
        router: as `parse_router` takes it, such as `spectr` or `single:sql`.
        device: the harness always names one; the base stays where `load` puts it.
        options: those of `HFLM` that apply to a loaded model, such as batch_size and max_length.
        Raises ValueError for an unknown router, and what `load` raises.
        """
        if isinstance(base, SpectrModel):
            self.engine = base
        else:
            self.engine = load(base, experts.split(";") if experts else None)
        self.router = parse_router(router, self.engine.library.names)
        engine = self.engine
        super().__init__(pretrained=engine.model, tokenizer=engine.tokenizer, **options)
        self._num_prompt: dict[tuple[int, ...], int] = {}

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], *args: Any, **options: Any
    ) -> list[tuple[float, bool]]:
        """The harness's own, which reads context and continuation but for the last token."""
        self._num_prompt = {}
        for _, context, continuation in requests:
            read = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
            num = len(read) - len(continuation) + 1
            self._num_prompt[read] = max(num, self._num_prompt.get(read, 0))
        return list(super()._loglikelihood_tokens(requests, *args, **options))

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Logits (R, T, V) of token ids (R, T), which are padded on the right."""
        rows = inps.tolist()
        contexts = [row[: self._context_length(row)] for row in rows]
        plan = self.engine.plan([self.router] * len(rows), contexts)
        with routed(plan):
            return super()._model_call(inps, attn_mask, labels)

    def _context_length(self, row: list[int]) -> int:
        """Of a text padded with zeros; all of it where it is none of the requests'."""
        for length in range(len(row), 0, -1):
            if (num := self._num_prompt.get(tuple(row[:length]))) is not None:
                return num
            if row[length - 1] != 0:
                break
        return len(row)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **options: Any
    ) -> Tensor:
        """Token ids (R, T + N) from prompts (R, T), which are padded on the left.

        Raises ValueError for beams and several answers a prompt: a row has the plan of its prompt.
        """
        rows_of = {key: options.get(key) or 1 for key in ("num_beams", "num_return_sequences")}
        if any(number != 1 for number in rows_of.values()):
            raise ValueError(
                f"gen_kwargs {rows_of}: a routed model answers each prompt once; leave both at 1"
            )
        mask = options["attention_mask"].bool()
        prompts = [row[is_text].tolist() for row, is_text in zip(context, mask, strict=True)]
        plan = self.engine.plan([self.router] * len(prompts), prompts)
        with routed(plan):
            return super()._model_generate(context, max_length, stop, **options)


def run(arguments: Sequence[str]) -> None:
    """lm_eval's own command line, to which `--model spectr` is then known."""
    with patch.object(sys, "argv", ["lm-eval", *arguments]):  # the one place it reads
        cli_evaluate()
