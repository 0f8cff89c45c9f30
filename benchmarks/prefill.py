"""Reading a long prompt with 8 experts: the bare base, PEFT, and this project, in one run.

    python benchmarks/prefill.py [--quick] [--json FILE]

Each case reads the same tokens at once, without a cache; the ratio is to the bare base.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import ArrowConfig, PeftModel, create_arrow_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from benchmarks.common import arguments, expert_folders, repeated_prompt, report, rows, seconds
from spectr_demo.base.loading import load_base
from spectr_demo.engine.layers import routed
from spectr_demo.engine.model import SpectrModel
from spectr_demo.experts.library import load_experts
from spectr_demo.routing.routers import parse_router

ROUTERS = ("single", "uniform", "arrow", "spectr", "spectr-paper", "spectr-context")


def main() -> None:
    options = arguments(__doc__)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        experts = expert_folders(8, Path(folder))
        bare, one, many, ours = (load_base(None) for _ in range(4))
        peft_one = PeftModel.from_pretrained(one.model, experts[0]).eval()
        arrow = create_arrow_model(many.model, experts, ArrowConfig(top_k=3)).eval()
        model = SpectrModel(ours, load_experts(experts, ours.model))
        for num_tokens in (100,) if options.quick else (100, 1000):
            ids = repeated_prompt(bare, num_tokens)
            input_ids = torch.tensor([ids], device=bare.device)

            def theirs(model: Any, input_ids: torch.Tensor = input_ids) -> Callable[[], None]:
                @torch.inference_mode()
                def run() -> None:
                    model(input_ids=input_ids, use_cache=False, logits_to_keep=1)

                return run

            def own(router: str, ids: list[int] = ids) -> Callable[[], None]:
                name = router.replace("single", f"single:{model.library.names[0]}")
                config = parse_router(name, model.library.names)
                read = theirs(model.model)

                def run() -> None:
                    with routed(model.plan([config], [ids])):
                        read()

                return run

            cases = {
                "bare base": theirs(bare.model),
                "PEFT, one adapter": theirs(peft_one),
                "PEFT Arrow": theirs(arrow),
                **{router: own(router) for router in ROUTERS},
            }
            times = seconds(cases, 3 if options.quick else 5)
            results += rows(times, "bare base", tokens=num_tokens, experts=8)
    report("python benchmarks/prefill.py", results, options.json, bare)


if __name__ == "__main__":
    main()
