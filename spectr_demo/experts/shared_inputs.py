"""Which linear layers read the same input: found from the model, not from a list of names."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedModel

from spectr_demo.experts.skeleton import skeleton_of


class Group(NamedTuple):
    """Layers that read one and the same tensor, in the order in which they run.

    num_runs: how often they run in a pass. Each time they read one tensor.
    """

    paths: tuple[str, ...]
    num_runs: int


def shared_inputs(model: PreTrainedModel, paths: Sequence[str]) -> list[Group]:
    """The layers in groups that share their inputs, in the order in which they first run.

    paths: of linear layers in the model. A layer that does not run over text stands alone. In a
    model that cannot be run without its weights every layer stands alone. Routing is then the same,
    with one product for each layer.
    """
    read = skeleton_of(model.config).inputs or {}
    wanted = set(paths)
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for path, inputs in read.items():
        if path in wanted:
            groups[tuple(map(id, inputs))].append(path)
    found = [Group(tuple(group), len(inputs)) for inputs, group in groups.items()]
    return [*found, *(Group((path,), 1) for path in paths if path not in read)]
