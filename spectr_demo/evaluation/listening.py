"""What the experts' layers hear while the bare base reads prompts, for evaluations of routers that
read the request (`routing/detection.py`).

Axes: R prompts, T tokens, N tokens of all prompts that count, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.reading import Listening, Requests
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.detection import mean_of_tokens

# A bank, and the inputs (N, D_in) that its layers share.
Hear = Callable[[ExpertBank, Tensor], None]


class _Listener(Listening):
    def __init__(self, requests: Requests, hear: Hear) -> None:
        self._requests = requests
        self._hear = hear

    def listen(self, bank: ExpertBank, x: Tensor) -> None:
        self._hear(bank, self._requests.counted(x))


def listen(engine: SpectrModel, requests: Requests, hear: Hear) -> None:
    """The base reads the requests in one pass; each bank hears its inputs once."""
    engine.reader.read(engine.template.opening, [(requests, _Listener(requests, hear))])


def late_means(requests: Requests, values: Tensor) -> Tensor:
    """(R, ...) from values (N, ...) of the tokens: late ones count most."""
    return mean_of_tokens(values, requests.late, requests.owners, len(requests.ids))
