"""A base without its weights: its modules, and what each linear layer reads in a pass over text.

It is made from the base's configuration alone, on torch's meta device. So what does not fit is
found before any weight is fetched, and `preflight` and `load` look at the same thing.
"""

import copy
import json
import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D

from spectr_demo.base.decoder import decoder_of

logger = logging.getLogger(__name__)

NUM_ROWS, NUM_TOKENS = 2, 3  # of the pass


@dataclass(frozen=True, kw_only=True, eq=False)
class Skeleton:
    """A base's modules on the meta device.

    inputs: by the path of a linear layer, what it reads in a pass of `NUM_ROWS` texts of
        `NUM_TOKENS` tokens, each time that it runs. The layers are in the order in which they first
        run, and one tensor that several layers read is one object. A layer that is not there does
        not run. None where the model cannot be run without its weights.
    """

    model: PreTrainedModel
    inputs: Mapping[str, tuple[Tensor, ...]] | None

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """By path. A module that is reached by several has all of them."""
        return dict(self.model.named_modules(remove_duplicate=False))

    @cached_property
    def decoder(self) -> str:
        """Path of what runs between the embedding of tokens and the output embedding."""
        decoder = decoder_of(self.model)
        return next(path for path, module in self.modules.items() if module is decoder)

    @cached_property
    def renamings(self) -> list[Any]:
        """How transformers renames the tensors of older checkpoints of this architecture."""
        conversions = get_model_conversion_mapping(self.model)
        return [c for c in conversions if not isinstance(c, WeightConverter)]

    @cached_property
    def _first_paths(self) -> dict[nn.Module, str]:
        return {module: path for path, module in self.model.named_modules()}

    def first_path(self, path: str) -> str:
        """The name that a module at this path goes by, of all those that it has."""
        return self._first_paths[self.modules[path]]

    def inputs_of(self, path: str) -> tuple[Tensor, ...]:
        """What the linear layer at this path reads; nothing where that is not known."""
        return (self.inputs or {}).get(self.first_path(path), ())

    def is_idle(self, path: str) -> bool:
        """Whether this layer is known not to run when text is read."""
        return self.inputs is not None and not self.inputs_of(path)

    def is_in_decoder(self, path: str) -> bool:
        return not self.decoder or path.startswith(f"{self.decoder}.")


def skeleton_of(config: PretrainedConfig) -> Skeleton:
    """The skeleton of the causal language model that transformers makes of this configuration."""
    return _skeleton_of(_Key(config))


class _Key:
    """A configuration by what it says of the modules, as the key of a cache."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        modules = _of_modules(config.to_dict())
        self.content = type(config), json.dumps(modules, sort_keys=True, default=str)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.content == other.content

    def __hash__(self) -> int:
        return hash(self.content)


def _of_modules(values: dict[str, Any]) -> dict[str, Any]:
    """Without what loading the weights writes into a configuration."""
    return {
        key: _of_modules(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in ("_name_or_path", "dtype", "quantization_config", "transformers_version")
    }


@lru_cache(maxsize=2)
def _skeleton_of(key: _Key) -> Skeleton:
    config = copy.deepcopy(key.config)  # which dtype and experts are written into
    config._is_quantized = True  # as bases are loaded; it decides whether Jamba's `dt_proj` runs
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            trust_remote_code=False,
            dtype=torch.float32,
            # The one way through a mixture of experts that does not look at who is chosen.
            experts_implementation="batched_mm",
        )
    return Skeleton(model=model.eval(), inputs=_inputs(model))


def linear_shape(layer: nn.Module) -> tuple[int, int] | None:
    """`(D_in, D_out)` of a linear layer, None of any other module."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, Conv1D):  # GPT-2's name of a linear layer with a transposed weight
        return layer.nx, layer.nf
    return None


@torch.no_grad()
def _inputs(model: PreTrainedModel) -> dict[str, tuple[Tensor, ...]] | None:
    """See `Skeleton.inputs`."""
    layers = {path: layer for path, layer in model.named_modules() if linear_shape(layer)}
    errors = []
    with torch.device("meta"):
        ids = torch.zeros(NUM_ROWS, NUM_TOKENS, dtype=torch.long)
        # A mask that is made already, where the model takes one: to make it looks at values.
        for mask in (torch.zeros(NUM_ROWS, 1, NUM_TOKENS, NUM_TOKENS), None):
            found: dict[str, list[Tensor]] = defaultdict(list)
            hooks = [
                layer.register_forward_pre_hook(_note(found, path), with_kwargs=True)
                for path, layer in layers.items()
            ]
            try:
                model(input_ids=ids, attention_mask=mask, use_cache=False)
            except Exception as error:  # whatever another architecture's code says to no values
                errors.append(f"{type(error).__name__}: {error}")
            else:
                return {path: tuple(inputs) for path, inputs in found.items()}
            finally:
                for hook in hooks:
                    hook.remove()
    logger.warning(
        "%s cannot be run without its weights (%s): a layer that cannot be routed is found when it "
        "runs",
        *(type(model).__name__, errors[0]),
    )
    return None


def _note(found: dict[str, list[Tensor]], path: str) -> Any:
    def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        found[path].append(args[0] if args else next(iter(kwargs.values())))

    return hook
