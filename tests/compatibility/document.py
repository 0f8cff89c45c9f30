"""Writes docs/compatibility.md from the table that the tests here go through.

    python -m tests.compatibility.document

test_document.py fails where the page differs from what this writes.
"""

import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from benchmarks.speed_tables import markdown
from tests.compatibility.adapters import EQUAL, KINDS, REFUSED
from tests.compatibility.bases import NOT_IN_PEFT, Base, bases, left_out

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"

HEAD = """# Which bases and adapters fit

`python -m tests.compatibility.document` writes this page from the table in `tests/compatibility`.
The tests go through all of its rows, with tiny bases and random weights.
Versions: transformers {transformers}, PEFT {peft}.

A row ends in one of two ways. It equals PEFT, or it ends in an error of one line. *Equal* means, in
float32:

- The logits differ from PEFT's by less than 0.0001 of the largest one.
- The text that is generated is PEFT's.
- The trace has the log-probabilities that PEFT gives when it reads the finished text.
- The shares count every decision: all layers of the adapter, all tokens.

Every base runs with `base`, `single`, `spectr` and `spectr-context`. The first two are compared
with PEFT. `spectr` is compared with its definition, computed on PEFT's model. `spectr-context` gets
a message of two requests, and each answer is compared with PEFT. `preflight` says what loading
says. How to load your own: [own_experts.md](own_experts.md).
"""

BASES = """
## Bases

These are {number} kinds that transformers lists as causal language models: all decoders, and `bert`
for the encoders. *Has* is what makes one special. An adapter on all linear layers has
`target_modules="all-linear"`. Where it does not fit, one on the layers in the last column does.

"""

ROWS = """
## Texts of different lengths

The answers to several requests of one message are texts of different lengths, side by side. A few
bases cannot do that. A run of several requests then ends in an error. On `rwkv` a run of several
columns does too.

"""

OTHERS = """
## Kinds without a row

transformers lists them as causal language models too.

"""

ADAPTERS = """
## Adapters that equal PEFT

Tried on {kinds}.

"""

ERRORS = """
## Adapters that are refused

The error is one line, and begins with the expert's name. "..." stands for what depends on the base.
What PEFT makes for some of these bases only is tried on those.

"""

_FUSED = re.compile(r"qkv|query_key_value|c_attn|gate_up_proj")
_SPECIAL = {
    "sliding_attention": "sliding window",
    "chunked_attention": "attention in chunks",
    "conv": "convolutions",
    "linear_attention": "layers with a state in place of keys and values",
    "hybrid": "layers with a state beside keys and values",
    "hybrid_sliding": "layers with a state beside keys and values",
    "indexed_attention": "attention to chosen tokens",
    "heavily_compressed_attention": "compressed keys and values",
}
_SETTINGS = {
    "kv_lora_rank": "latent attention",
    "num_kv_shared_layers": "keys and values shared between layers",
    "alibi": "ALiBi",
}


def special(base: Base) -> list[str]:
    """What makes a base special, read from its configuration and its modules."""
    config = base.config()
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    kinds = [*(getattr(config, "layer_types", None) or [])]
    if not kinds and getattr(config, "sliding_window", None):
        kinds = ["sliding_attention"]
    modules = dict(model.named_modules())
    values = config.to_dict()
    found = {
        "tied embeddings": _is_tied(model),
        "transposed linear layers": any(isinstance(m, Conv1D) for m in modules.values()),
        "several projections in one layer": any(_FUSED.search(path) for path in modules),
        "mixture of experts": any(".experts" in path for path in modules),
        "capped logits": any(v for k, v in values.items() if re.search("soft_?cap", k)),
        "scaled logits": any(v for k, v in values.items() if re.search("logits?_scal", k)),
        **{what: kind in kinds for kind, what in _SPECIAL.items()},
        **{what: bool(values.get(name)) for name, what in _SETTINGS.items()},
    }
    return [what for what, is_there in found.items() if is_there]


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _base_row(base: Base) -> list[str]:
    has, targets = ", ".join(special(base)) or "-", "-"
    if not isinstance(base.targets, str):
        targets = ", ".join(f"`{target}`" for target in base.targets)
    if base.refused:
        end = f"the base is refused: {base.refused}"
    elif base.all_linear in ("", NOT_IN_PEFT):
        end = base.all_linear or "equal"
    else:
        end = f"refused: {base.all_linear}"
    return [f"`{base.kind}`", has, end, targets]


def _left_out_rows() -> Iterator[list[str]]:
    reasons: dict[str, list[str]] = {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if reason := left_out(kind):
            reasons.setdefault(reason, []).append(f"`{kind}`")
    for reason, kinds in reasons.items():
        yield [reason, ", ".join(kinds)]


def document() -> str:
    """The page."""
    rows = bases()
    versions = {name: version(name) for name in ("transformers", "peft")}
    kinds = ", ".join(f"`{kind}`" for kind in KINDS)
    return "".join(
        (
            HEAD.format(**versions),
            BASES.format(number=len(rows)),
            markdown(
                ["base", "has", "adapter on all linear layers", "else on"],
                map(_base_row, rows),
            ),
            ROWS,
            markdown(["base", "error"], [[f"`{b.kind}`", b.rows] for b in rows if b.rows]),
            OTHERS,
            markdown(["why", "kinds"], _left_out_rows()),
            ADAPTERS.format(kinds=kinds),
            "".join(f"- {variant.name}\n" for variant in EQUAL),
            ERRORS,
            markdown(["adapter", "error"], [[v.name, v.error] for v in REFUSED]),
        )
    )


if __name__ == "__main__":
    PAGE.write_text(document(), encoding="utf-8")
