"""Which linear layers read the same input: found from the model, not from a list of names."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

logger = logging.getLogger(__name__)


def shared_inputs(model: PreTrainedModel, paths: Sequence[str]) -> list[tuple[str, ...]]:
    """The layers in groups that read one and the same tensor, in the order in which they run.

    paths: of linear layers in the model. A copy of the model without weights reads one token, so
    nothing is computed. A layer that does not run there stands alone. In a model that cannot be run
    so, every layer stands alone, and a warning says why. Routing is then the same, with one product
    for each layer.
    """
    try:
        groups = _groups(model, paths)
    except Exception as error:  # whatever another architecture's code says to a tensor without data
        logger.warning(
            "%s cannot be read without its weights (%s: %s): no layers share their input here, so "
            "routing takes a product for each layer",
            *(type(model).__name__, type(error).__name__, error),
        )
        groups = []
    found = {path for group in groups for path in group}
    return [*groups, *((path,) for path in paths if path not in found)]


@torch.no_grad()
def _groups(model: PreTrainedModel, paths: Sequence[str]) -> list[tuple[str, ...]]:
    inputs: list[Tensor] = []  # kept, so that no two have one id
    groups: dict[int, list[str]] = defaultdict(list)

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs.append(args[0])
            groups[id(args[0])].append(path)

        return hook

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model.config)
        for path in paths:
            skeleton.get_submodule(path).register_forward_pre_hook(note(path))
        # A mask that is made already: making one looks at values, which are not there.
        mask = torch.zeros(1, 1, 1, 1)
        token = torch.zeros(1, 1, dtype=torch.long)
        skeleton.get_decoder()(input_ids=token, attention_mask=mask, use_cache=False)
    return [tuple(group) for group in groups.values()]
