"""Two ways to add what few of many experts give: copies of their factors, or a product with all.

    python benchmarks/copies.py [--quick] [--json FILE]

One token of each row, at one layer of 3,072 inputs and outputs, with random experts of rank 8: on a
GPU where there is one, else on the CPU, both in torch. `ExpertBank.copying_pays` follows these
figures. --quick: narrow layers, to see that the script works.
"""

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from benchmarks.common import arguments, report
from spectr_demo.engine.plan import RoutingPlan
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.routers import parse_router

RANK = 8
NUM_EXPERTS = (8, 32, 128, 512, 1024, 2048, 4096)


def random_bank(num_experts: int, size: int, device: torch.device) -> ExpertBank:
    """One layer, as wide as it is high, in the dtype that banks have on this device."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    factors = [torch.randn(num_experts * RANK, size, device=device, dtype=dtype) for _ in range(2)]
    return ExpertBank(
        paths=("layers.0.q_proj",),
        expert_ids=torch.arange(num_experts),
        A=factors[0],
        B=(factors[1],),
        singular_values=torch.ones(1, num_experts, RANK, device=device),
    )


def microseconds(bank: ExpertBank, num_rows: int, router: str, *, is_copied: bool) -> float:
    """Of one token: project, choose, and add to one layer."""
    names = [f"e{e}" for e in range(bank.num_experts)]
    plan = RoutingPlan([parse_router(router, names)] * num_rows, names)
    x = torch.randn(num_rows, 1, bank.A.shape[1], device=bank.A.device, dtype=bank.A.dtype)
    y = torch.zeros_like(x)

    def pays(bank: ExpertBank, num_chosen: int, num_tokens: int) -> bool:
        return is_copied and num_chosen < bank.num_experts

    with patch.object(ExpertBank, "copying_pays", pays), torch.inference_mode():
        timer = Timer(
            "plan.mix(bank, x).add_(y, 0)",
            globals={"plan": plan, "bank": bank, "x": x, "y": y},
            num_threads=torch.get_num_threads(),
        )
        return 1e6 * timer.blocked_autorange(min_run_time=0.05).median


def main() -> None:
    options = arguments(__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, numbers = (64, NUM_EXPERTS[:2]) if options.quick else (3072, NUM_EXPERTS)
    results: list[dict[str, Any]] = []
    for num_experts in numbers:
        bank = random_bank(num_experts, size, device)
        for router in ("spectr", "lag"):
            for num_rows in (1, 4):
                times = {
                    name: microseconds(bank, num_rows, router, is_copied=is_copied)
                    for name, is_copied in (("all_us", False), ("copies_us", True))
                }
                facts = {"device": device.type, "case": router, "experts": num_experts}
                results.append({**facts, "rows": num_rows, **times})
    report("python benchmarks/copies.py", results, options.json)


if __name__ == "__main__":
    main()
