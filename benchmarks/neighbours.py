"""How often a column's greedy text changes with the company it runs in, by dtype.

    python benchmarks/neighbours.py [--num-tokens 24]

Exact arithmetic would give the same text alone and in a batch of four; kernels for another batch
size round differently, and a near tie between two tokens then falls the other way.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from spectr_demo.base.loading import load_base
from spectr_demo.config import shipped_experts
from spectr_demo.engine.model import SpectrModel
from spectr_demo.experts.library import load_experts
from spectr_demo.ui.examples import EXAMPLES


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-tokens", type=int, default=24)
    num_tokens = parser.parse_args().num_tokens
    for dtype in (torch.float32, torch.bfloat16):
        base = load_base(None, dtype=dtype)
        model = SpectrModel(base, load_experts(shipped_experts(), base.model))
        changed = total = 0
        for example in EXAMPLES:
            if not example.experts:
                continue
            columns = ["base", f"single:{example.experts[0]}", "uniform", "spectr"]
            options = {"record": False, "max_new_tokens": num_tokens}
            together = model.compare(example.prompt, columns, **options)
            for column, output in zip(columns, together.columns, strict=True):
                alone = model.compare(example.prompt, [column], **options).columns[0]
                changed += alone.text != output.text
                total += 1
        print(f"{dtype}, {base.quantization}: {changed} of {total} texts changed", flush=True)


if __name__ == "__main__":
    main()
