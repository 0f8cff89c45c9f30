"""What the experts' layers hear while the bare base reads prompts, for evaluations of routers that
read the request (`routing/detection.py`).

Axes: R prompts, T tokens, N tokens of all prompts that count, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spectr_demo.engine.layers import routed
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.reading import Listening, Requests
from spectr_demo.routing.bank import ExpertBank

# A bank, and the inputs (N, D_in) that its layers share.
Hear = Callable[[ExpertBank, Tensor], None]


class _Listener(Listening):
    def __init__(self, counts: Tensor, hear: Hear) -> None:
        self._counts = counts
        self._hear = hear

    def listen(self, bank: ExpertBank, x: Tensor) -> None:
        self._hear(bank, x[self._counts.to(x.device)])


def requests_of(engine: SpectrModel, prompts: Sequence[Sequence[int]]) -> Requests:
    """Token ids of prompts as the engine's reader takes them, each for one request."""
    own = []
    for ids in prompts:
        start, stop = engine.template.request(ids)
        own.append(ids[start:stop])
    return Requests.of(own, engine.template.closing)


@torch.inference_mode()
def listen(engine: SpectrModel, requests: Requests, hear: Hear) -> None:
    """The base reads the requests in one pass; each bank hears its inputs once."""
    num_rows, opening = len(requests.ids), torch.tensor(engine.template.opening, dtype=torch.long)
    # Padding is on the right, where no token sees it.
    ids = torch.cat([opening.expand(num_rows, -1), requests.ids], dim=1)
    is_opening = requests.counts.new_zeros(num_rows, len(opening))
    counts = torch.cat([is_opening, requests.counts], dim=1)
    with routed(_Listener(counts, hear)):
        engine.model.get_decoder()(input_ids=ids.to(engine.base.device), use_cache=False)


def late_means(requests: Requests, values: Tensor) -> Tensor:
    """(R, ...) from values (N, ...) of the tokens: late ones count most."""
    weights = requests.late.to(values).view(-1, *[1] * (values.dim() - 1))
    means = values.new_zeros(len(requests.ids), *values.shape[1:])
    return means.index_add_(0, requests.owners.to(values.device), values * weights)
