"""Every kind of adapter of the table on a few bases: equal to PEFT, or the error that is due."""

import copy
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from spectr_demo.base.loading import LoadedBase, load_base
from spectr_demo.engine.layers import routed
from spectr_demo.engine.model import SpectrModel
from spectr_demo.experts.adapters import AdapterError
from spectr_demo.experts.library import load_experts
from spectr_demo.experts.preflight import preflight
from spectr_demo.routing.routers import parse_router
from tests.compatibility.adapters import EQUAL, KINDS, REFUSED, Variant, save_adapter, write
from tests.compatibility.bases import bases
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


def variants_of_bases(variants: Sequence[Variant]) -> pytest.MarkDecorator:
    """Each on the bases for which PEFT makes it."""
    cases = [(kind, variant) for kind in KINDS for variant in variants if kind in variant.kinds]
    ids = [f"{kind}-{variant.name}" for kind, variant in cases]
    return pytest.mark.parametrize(("host", "variant"), cases, indirect=["host"], ids=ids)


@pytest.fixture(scope="module")
def host(
    request: pytest.FixtureRequest,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Host:
    base = next(base for base in bases() if base.kind == request.param)
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
@variants_of_bases([*EQUAL, *REFUSED])
def test_adapter(host: Host, variant: Variant, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "red", tmp_path / "red"
    save_adapter(host.plain, variant.config(host.names), ours)
    if variant.is_renamed:
        theirs = shutil.copytree(ours, tmp_path / "theirs")
    if variant.edit:
        variant.edit(ours)
    problems = preflight(host.folder, str(ours)).problems
    if variant.error:
        pattern = re.escape(f"expert 'red': {variant.error}").replace(r"\.\.\.", ".*")
        with pytest.raises(AdapterError) as caught:
            load_experts(str(ours), host.ours.model)
        (problem,) = caught.value.problems
        assert re.fullmatch(pattern, problem), problem
        assert problems == (problem,)
        return
    assert problems == ()
    expected = logits_in_peft(host, theirs)
    for router in ("single:red", "spectr"):
        assert difference(logits(host, ours, router), expected) < 1e-4


MADE_BY_PEFT = [v for v in REFUSED if v.error.startswith("it uses") and not v.edit]


@pytest.mark.filterwarnings("ignore")
@variants_of_bases(MADE_BY_PEFT)
def test_what_is_refused_is_another_adapter_to_peft(
    host: Host, variant: Variant, tmp_path: Path
) -> None:
    """Its factors are no plain adapter's, or would give other logits as such."""
    plain = tmp_path / "red"
    save_adapter(host.plain, variant.config(host.names), plain)
    theirs = shutil.copytree(plain, tmp_path / "theirs")
    unset = dict.fromkeys(variant.own_settings(host.names).keys() - {"target_modules"})
    write(**unset)(plain)
    try:
        found = logits(host, plain, "single:red")
    except AdapterError:
        assert not variant.is_plain_here
        return
    is_same = difference(found, logits_in_peft(host, theirs)) < 1e-4
    assert is_same == variant.is_plain_here


def logits(host: Host, adapter: Path, router: str) -> Tensor:
    model = SpectrModel(host.ours, load_experts(str(adapter), host.ours.model))
    try:
        plan = model.plan([parse_router(router, ("red",))], [IDS])
        with torch.no_grad(), routed(plan):
            return model.model(torch.tensor([IDS])).logits
    finally:
        model.detach()


def logits_in_peft(host: Host, adapter: Path) -> Tensor:
    peft = PeftModel.from_pretrained(copy.deepcopy(host.theirs), str(adapter)).eval()
    with torch.no_grad():
        return peft(torch.tensor([IDS])).logits


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest one of logits, as a part of the largest logit."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
