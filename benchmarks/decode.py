"""Decode speed with 8 and 32 experts: the bare base, PEFT, and this project, in one run.

    python benchmarks/decode.py [--quick] [--json FILE]

Each case has read the same prompt and decodes token by token with a growing cache; the ratio is to
the bare base as `load_base` gives it, with or without PEFT's adapters. `torch's layers` is that
base with plain `nn.Linear` where the loader has made it faster (float32, `cpu/linear.py`).
Experts beyond the shipped ones are random, of the same shapes and size.
"""

import gc
import sys
import tempfile
from pathlib import Path

import torch
from peft import ArrowConfig, PeftModel, create_arrow_model
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from benchmarks.common import (
    PROMPT,
    Decoding,
    arguments,
    decoding,
    decoding_rows,
    expert_folders,
    load_library,
    report,
    routed_decoding,
)
from spectr_demo.base.loading import LoadedBase, load_base
from spectr_demo.cpu.linear import TokenLinear
from spectr_demo.engine.model import SpectrModel

ROUTERS = ("base", "single", "uniform", "arrow", "spectr", "spectr-paper", "spectr-context", "lag")


def cases(bare: LoadedBase, num_experts: int, folder: Path) -> dict[str, Decoding]:
    experts = expert_folders(num_experts, folder)
    plain, one, many, ours = (load_base(None) for _ in range(4))
    for layer in plain.model.modules():
        if isinstance(layer, TokenLinear):
            layer.__class__ = nn.Linear
    peft_one = PeftModel.from_pretrained(one.model, experts[0]).eval()
    arrow = create_arrow_model(many.model, experts, ArrowConfig(top_k=3)).eval()
    model = SpectrModel(ours, load_library(experts, ours, folder))
    prompt = model.encode(PROMPT)
    names = {"single": f"single:{model.library.names[0]}"}
    theirs = {
        "bare base": bare.model,
        "torch's layers": plain.model,
        "PEFT, one adapter": peft_one,
        "PEFT Arrow": arrow,
    }
    return {
        **{
            name: decoding(their, torch.tensor([prompt], device=bare.device))
            for name, their in theirs.items()
        },
        **{r: routed_decoding(model, [names.get(r, r)], prompt) for r in ROUTERS},
    }


def main() -> None:
    options = arguments(__doc__)
    bare = load_base(None)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for num_experts in (8,) if options.quick else (8, 32):
            todo = cases(bare, num_experts, Path(folder))
            results += decoding_rows(todo, options.quick, experts=num_experts)
            del todo
            gc.collect()
    report("python benchmarks/decode.py", results, options.json, bare)


if __name__ == "__main__":
    main()
