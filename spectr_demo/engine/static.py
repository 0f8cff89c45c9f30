"""One token at fixed addresses, so that a GPU runs all its kernels as one CUDA graph.

Decoding a few rows is bound by the launch of kernels, thousands for each token. A graph of them is
launched once. It reads and writes the same memory each time: the inputs are copied in, the cache
has room for all tokens from the start, and what a run records goes to buffers (`recorder.py`).
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel
from transformers.cache_utils import StaticCache, StaticLayer, StaticSlidingWindowLayer

from spectr_demo.engine.batches import has_attention_alone
from spectr_demo.engine.plan import RoutingPlan

logger = logging.getLogger(__name__)

_step: ContextVar["TokenStep | None"] = ContextVar("token_step", default=None)


class TokenStep:
    """The model's `forward` for one more token of each row of one run."""

    def __init__(self, forward: Callable[..., Any], plan: RoutingPlan) -> None:
        self._forward = forward
        self._plan = plan
        self._inputs: list[Any] = []
        self._output: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._has_failed = False

    def __call__(self, **inputs: Any) -> Any:
        """The first call runs as usual, which also compiles kernels. The second is captured."""
        values, form = tree_flatten(inputs)
        if not self._inputs:
            self._inputs = [v.clone() if isinstance(v, Tensor) else v for v in values]
            return self._run(form)
        for kept, value in zip(self._inputs, values, strict=True):
            if isinstance(kept, Tensor):
                kept.copy_(value)
        if self._has_failed or not inputs["input_ids"].is_cuda:
            return self._run(form)
        if self._graph is None:
            self._capture(form)
            if self._graph is None:
                return self._run(form)
        else:
            self._plan.begin_pass(inputs["input_ids"])  # whose hooks a graph does not run
        self._graph.replay()
        return self._output

    def _run(self, form: Any) -> Any:
        return self._forward(**tree_unflatten(self._inputs, form))

    def _capture(self, form: Any) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Another thread may serve another user meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._output = self._run(form)
        except RuntimeError as error:  # a base of which some part waits for the host
            logger.warning("tokens run without a CUDA graph: %s", error)
            self._has_failed = True
            if self._plan.recorder is not None:
                self._plan.recorder.forget_token()
            return
        self._graph = graph


class StepHook:
    """Has one more token be read by the `TokenStep` of the run that goes on, where it has one."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model
        self._own = vars(model).get("forward")  # accelerate's, where weights are spread
        forward = model.forward

        @wraps(forward)
        def forward_or_step(*args: Any, **kwargs: Any) -> Any:
            step, ids = _step.get(), kwargs.get("input_ids")
            is_token = ids is not None and ids.shape[1] == 1 and not args
            return step(**kwargs) if step and is_token else forward(*args, **kwargs)

        self._model.forward = forward_or_step

    def remove(self) -> None:
        del self._model.forward
        if self._own is not None:
            self._model.forward = self._own


@contextmanager
def token_step(
    model: PreTrainedModel, plan: RoutingPlan, device: torch.device, num_tokens: int
) -> Iterator[StaticCache | None]:
    """Inside, tokens of this thread's run are read at fixed addresses, if the plan is static on
    this device and the base can do it.

    num_tokens: of the longest row, with all that is to be generated. Gives the cache that they
    need; None for a cache that grows.
    """
    cache = static_cache(model, num_tokens) if plan.is_static(device) else None
    if cache is None:
        yield None
        return
    forward: Any = model.forward
    token = _step.set(TokenStep(forward.__wrapped__, plan))
    try:
        yield cache
    finally:
        _step.reset(token)


def static_cache(model: PreTrainedModel, num_tokens: int) -> StaticCache | None:
    """Room for so many tokens of each row; None where a base is spread over devices, its layers
    need another kind of cache, or move their tokens as they are read."""
    is_spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    if is_spread or not (model._can_compile_fullgraph and has_attention_alone(model)):
        return None
    cache = StaticCache(model.config.get_text_config(), max_cache_len=num_tokens)
    for layer in cache.layers:
        # Past its window a layer moves its tokens by what Python has counted.
        is_full = isinstance(layer, StaticSlidingWindowLayer) and layer.max_cache_len < num_tokens
        if is_full or not isinstance(layer, StaticLayer):
            return None
    return cache
