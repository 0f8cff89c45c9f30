"""A base of the table with two random experts on it, here and in PEFT."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from spectr_demo.base.generic import generic_prompts
from spectr_demo.engine import reading
from spectr_demo.engine.model import SpectrModel, load
from spectr_demo.experts import preflight
from tests.compatibility.adapters import save_adapter
from tests.compatibility.bases import Base
from tests.compatibility.reference import Reference, same_base

EXPERTS = ("red", "green")
NUM_PROMPTS = 6


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A base with its experts. plain: the base as it was saved. folder: where. experts: theirs."""

    base: Base
    plain: PreTrainedModel
    folder: str
    experts: Sequence[str]
    model: SpectrModel
    reference: Reference


@pytest.fixture(autouse=True, scope="package")
def in_float32() -> Iterator[None]:
    """Bases are loaded as on a CPU without a kernel for 4-bit products, to be compared exactly.
    They are the tests' tiny base by name, of whose ordinary prompts a few will do."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("spectr_demo.base.loading", preflight.__name__):
            patch.setattr(f"{module}.choose_compute_dtype", lambda device: torch.float32)
        patch.setattr("spectr_demo.base.loading._fingerprint", lambda *_: "tiny")
        patch.setattr(reading, "generic_prompts", lambda base: generic_prompts(base)[:NUM_PROMPTS])
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def case(
    request: pytest.FixtureRequest,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    """Of the base that is the parameter."""
    base: Base = request.param
    place = tmp_path_factory.mktemp(base.kind)
    plain = base.model()
    folder, experts = save_base(plain, tokenizer, place), [str(place / name) for name in EXPERTS]
    targets = base.targets if isinstance(base.targets, str) else list(base.targets)
    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    for seed, expert in enumerate(experts):
        save_adapter(plain, config, Path(expert), seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECTR_CACHE", str(place / "cache"))
        model = load(folder, experts)
    return Case(
        base=base,
        plain=plain,
        folder=folder,
        experts=experts,
        model=model,
        reference=Reference(same_base(model.model), experts, EXPERTS),
    )


def save_base(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, place: Path) -> str:
    """The folder with the base, as `save_pretrained` writes it."""
    folder = place / "base"
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
