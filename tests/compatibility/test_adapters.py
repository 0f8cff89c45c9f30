"""Every kind of adapter of the table on a few bases: equal to PEFT, or the error that is due."""

import copy
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.testing import assert_close
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from spectr_demo.base.loading import LoadedBase, load_base
from spectr_demo.engine.layers import routed
from spectr_demo.engine.model import SpectrModel
from spectr_demo.experts.adapters import AdapterError
from spectr_demo.experts.library import load_experts
from spectr_demo.experts.preflight import preflight
from spectr_demo.routing.routers import parse_router
from tests.compatibility.adapters import KINDS, Variant, save_adapter, variants
from tests.compatibility.bases import Base, bases
from tests.compatibility.conftest import save_base
from tests.compatibility.reference import same_base

IDS = [5, 17, 42, 101, 7, 33, 250, 64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Host:
    """A base without experts, as it was saved, as it is loaded here, and as PEFT gets it. names: of
    its linear layers."""

    plain: PreTrainedModel
    folder: str
    ours: LoadedBase
    theirs: PreTrainedModel
    names: list[str]


@pytest.fixture(
    scope="module",
    params=[base for base in bases() if base.kind in KINDS],
    ids=lambda base: base.kind,
)
def host(
    request: pytest.FixtureRequest,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Host:
    base: Base = request.param
    plain = base.model()
    folder = save_base(plain, tokenizer, tmp_path_factory.mktemp(base.kind))
    ours = load_base(folder)
    layers = [
        path.rpartition(".")[2]
        for path, module in plain.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and path != "lm_head"
    ]
    names = list(dict.fromkeys(layers))
    return Host(plain=plain, folder=folder, ours=ours, theirs=same_base(ours.model), names=names)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", variants(), ids=lambda variant: variant.name)
def test_adapter(host: Host, variant: Variant, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "red", tmp_path / "red"
    save_adapter(host.plain, variant.config(host.names), ours)
    if variant.is_renamed:
        theirs = shutil.copytree(ours, tmp_path / "theirs")
    if variant.edit:
        variant.edit(ours)
    problems = preflight(host.folder, str(ours)).problems
    if variant.error:
        expected = re.escape(f"expert 'red': {variant.error}").replace(r"\.\.\.", ".*")
        with pytest.raises(AdapterError) as caught:
            load_experts(str(ours), host.ours.model)
        (problem,) = caught.value.problems
        assert re.fullmatch(expected, problem), problem
        assert problems == (problem,)
        return
    assert problems == ()
    peft = PeftModel.from_pretrained(copy.deepcopy(host.theirs), str(theirs)).eval()
    model = SpectrModel(host.ours, load_experts(str(ours), host.ours.model))
    try:
        for router in ("single:red", "spectr"):
            plan = model.plan([parse_router(router, ("red",))], [IDS])
            with torch.no_grad(), routed(plan):
                logits = model.model(torch.tensor([IDS])).logits
            with torch.no_grad():
                expected = peft(torch.tensor([IDS])).logits
            assert_close(logits, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
    finally:
        model.detach()
