"""A batch of four rows, each with an adapter of its own: PEFT's mixed batches, and this project.

    python benchmarks/mixed_adapters.py [--quick] [--json FILE]

Each case has read the same prompt in every row, and decodes token by token with a growing cache.
Seconds are for a token of the whole batch; the ratio is to four rows of the bare base.
"""

import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

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
from spectr_demo.base.loading import load_base
from spectr_demo.engine.model import SpectrModel


def mixed_batch(peft: PeftModel, prompt: Tensor, names: list[str]) -> Decoding:
    """PEFT tells its layers the names by hooks. They are set once for all tokens, as its `generate`
    does; a call of the model with `adapter_names` would set them again for each."""
    with peft._enable_peft_forward_hooks(adapter_names=names):
        decode_hooked = decoding(peft.base_model, prompt)

    def decode(num_tokens: int) -> None:
        with peft._enable_peft_forward_hooks(adapter_names=names):
            decode_hooked(num_tokens)

    return decode


def main() -> None:
    options = arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        experts = expert_folders(4, Path(folder))
        bare, theirs, ours = (load_base(None) for _ in range(3))
        model = SpectrModel(ours, load_library(experts, ours, Path(folder)))
        names = list(model.library.names)
        peft = PeftModel.from_pretrained(theirs.model, experts[0], adapter_name=names[0])
        for name, expert in zip(names[1:], experts[1:], strict=True):
            peft.load_adapter(expert, adapter_name=name)
        ids = model.encode(PROMPT)
        prompt = torch.tensor([ids] * len(names), device=bare.device)
        cases = {
            "bare base": decoding(bare.model, prompt),
            "PEFT": mixed_batch(peft.eval(), prompt, names),
            "base": routed_decoding(model, ["base"] * len(names), ids),
            "single": routed_decoding(model, [f"single:{name}" for name in names], ids),
        }
        results = decoding_rows(cases, options.quick, rows=len(names))
    report("python benchmarks/mixed_adapters.py", results, options.json, bare)


if __name__ == "__main__":
    main()
