"""Decode speed by the experts' rank, with 8 experts: the bare base, PEFT's one adapter, and ours.

    python benchmarks/rank.py [--quick] [--json FILE]

Each case has read the same prompt and decodes token by token with a growing cache; the ratio is to
the bare base. Experts are random, but for the shipped ones at their rank of 8.
"""

import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from benchmarks.common import (
    PROMPT,
    arguments,
    decoding,
    decoding_rows,
    expert_folders,
    load_library,
    report,
    routed_decoding,
)
from spectr_demo.base.loading import load_base
from spectr_demo.engine.model import SpectrModel


def main() -> None:
    options = arguments(__doc__)
    bare, one, ours = (load_base(None) for _ in range(3))
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in (4, 64) if options.quick else (4, 8, 16, 32, 64):
            experts = expert_folders(8, Path(folder), rank)
            peft = PeftModel.from_pretrained(one.model, experts[0]).eval()
            model = SpectrModel(ours, load_library(experts, ours, Path(folder)))
            ids = model.encode(PROMPT)
            prompt = torch.tensor([ids], device=bare.device)
            single = f"single:{model.library.names[0]}"
            cases = {
                "bare base": decoding(bare.model, prompt),
                "PEFT, one adapter": decoding(peft, prompt),
                "single": routed_decoding(model, [single], ids),
                "spectr-paper": routed_decoding(model, ["spectr-paper"], ids),
            }
            results += decoding_rows(cases, options.quick, rank=rank)
            peft.unload()
            model.detach()
    report("python benchmarks/rank.py", results, options.json, bare)


if __name__ == "__main__":
    main()
