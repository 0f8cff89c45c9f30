"""Decode speed after prompts of several lengths, with 8 experts; attention grows with the text.

    python benchmarks/sequence_length.py [--quick] [--json FILE]

Each case has read the same prompt and decodes token by token with a growing cache; the ratio is to
the bare base after the same prompt.
"""

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from benchmarks.common import (
    arguments,
    decoding,
    decoding_rows,
    expert_folders,
    load_library,
    repeated_prompt,
    report,
    routed_decoding,
)
from spectr_demo.base.loading import load_base
from spectr_demo.engine.model import SpectrModel

ROUTERS = ("base", "spectr-paper", "spectr-context")


def main() -> None:
    options = arguments(__doc__)
    bare, ours = load_base(None), load_base(None)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        model = SpectrModel(ours, load_library(expert_folders(8, Path(folder)), ours, Path(folder)))
        for num_tokens in (64, 512) if options.quick else (64, 512, 2048, 4096):
            ids = repeated_prompt(bare, num_tokens)
            cases = {
                "bare base": decoding(bare.model, torch.tensor([ids], device=bare.device)),
                **{router: routed_decoding(model, [router], ids) for router in ROUTERS},
            }
            results += decoding_rows(cases, options.quick, prompt=num_tokens)
    report("python benchmarks/sequence_length.py", results, options.json, bare)


if __name__ == "__main__":
    main()
