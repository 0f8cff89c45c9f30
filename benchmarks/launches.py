"""How many kernels a GPU launches for one token, and for a prompt; counted without a GPU.

    python benchmarks/launches.py [--quick] [--json FILE]

The path of a GPU is taken on a CPU, in the shapes of SmolLM2-135M with ten experts of rank 8 on all
of its 210 layers. What torch dispatches is counted, without views and other operators that launch
nothing. An operator of `spectr_demo/gpu/` is one launch. A linear layer of the base is one, as
bitsandbytes' product of 4-bit weights with one token is.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from benchmarks.common import arguments, report
from benchmarks.random_models import SHAPES, random_base, random_library, random_plan
from spectr_demo.engine.layers import attach_, detach_, follow, routed
from spectr_demo.engine.plan import RoutingPlan
from spectr_demo.engine.recorder import Recorder
from spectr_demo.engine.static import static_cache
from spectr_demo.gpu import operators

NUM_EXPERTS, PROMPT, SLOTS = 10, 64, 4
ROUTERS = (
    *("single:e0", "uniform", "spectr", "spectr-paper", "spectr-calibrated", "arrow", "lag"),
    *("norm", "spectr-context"),
)
# They make tensors without computing anything: the names of those that are no views.
_NO_LAUNCH = {"empty", "empty_strided", "empty_like", "new_empty", "lift_fresh", "alias", "detach"}
_NO_LAUNCH |= {"_unsafe_view", "view", "sym_size"}


class Launches(TorchDispatchMode):
    """Counts operators that launch a kernel, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if not function.is_view and name not in _NO_LAUNCH:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@torch.inference_mode()
def launches(model: PreTrainedModel, plan: RoutingPlan | None, num_rows: int) -> dict[str, int]:
    """Of a prompt, and of one token after it."""
    cache = static_cache(model, PROMPT + SLOTS)
    counts = {}
    for what, num_tokens in {"prompt": PROMPT, "warm-up": 1, "token": 1}.items():
        ids = torch.zeros(num_rows, num_tokens, dtype=torch.long)
        with routed(plan), Launches() as counted:
            model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        counts[what] = counted.counts.total()
    return counts


def count(shape: str, row_counts: Sequence[int] = (1, 4)) -> list[dict[str, Any]]:
    """A row for each router, number of rows, and whether it is recorded."""
    model = random_base(SHAPES[shape], torch.device("cpu"))
    library = random_library(model, NUM_EXPERTS)
    found = []
    with patch.object(operators, "serve", lambda device: True):
        for num_rows in row_counts:
            bare = launches(model, None, num_rows)
            attach_(model, library)
            hooks = follow(model)
            for router in ROUTERS:
                for recorder in (None, Recorder(SLOTS)):
                    plan = random_plan(library, router, num_rows, recorder)
                    counts = launches(model, plan, num_rows)
                    found.append(_row(router, num_rows, recorder, counts, bare))
            for hook in hooks:
                hook.remove()
            detach_(model)
    return found


def _row(
    router: str,
    num_rows: int,
    recorder: Recorder | None,
    counts: Mapping[str, int],
    bare: Mapping[str, int],
) -> dict[str, Any]:
    row: dict[str, Any] = {"router": router, "rows": num_rows, "recorded": recorder is not None}
    for what in ("token", "prompt"):
        row |= {
            what: counts[what],
            f"{what}, base": bare[what],
            f"{what}, times": counts[what] / bare[what],
        }
    return row


def main() -> None:
    options = arguments(__doc__)
    found = count("tiny" if options.quick else "SmolLM2-135M")
    report("python benchmarks/launches.py", found, options.json)


if __name__ == "__main__":
    main()
