"""Every base of the table with every kind of router: equal to PEFT, or the error that is due."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from spectr_demo.config import RouterConfig
from spectr_demo.engine import reading
from spectr_demo.engine.layers import routed
from spectr_demo.engine.model import SpectrModel, load
from spectr_demo.experts.adapters import AdapterError
from spectr_demo.experts.preflight import preflight
from spectr_demo.routing.routers import parse_router
from spectr_demo.trace import ColumnTrace, RoutingTrace
from tests.compatibility.adapters import save_adapter
from tests.compatibility.bases import NOT_IN_PEFT, Base, bases
from tests.compatibility.conftest import EXPERTS, Case, save_base
from tests.compatibility.reference import Decisions
from tests.conftest import IN_CONTEXT

TEXT = "Run the backup at 02:30 every Monday."
MESSAGE = "Run the backup at 02:30.\nThen count the files, and say how many there are."
NUM_TOKENS = 4

ROUTED = [base for base in bases() if not base.refused]
LIMITED = [base for base in ROUTED if base.all_linear]
REFUSED = [base for base in bases() if base.refused]


def kind(base: Base) -> str:
    return base.kind


every_base = pytest.mark.parametrize("case", ROUTED, indirect=True, ids=kind)


def run(
    model: SpectrModel, columns: Sequence[str | RouterConfig], text: str = TEXT
) -> RoutingTrace:
    trace = model.compare(text, columns, max_new_tokens=NUM_TOKENS).trace
    assert trace is not None
    return trace


def logits_of(case: Case, router: str, ids: Sequence[int]) -> Tensor:
    """(T, V) of a text that is read all at once."""
    plan = case.model.plan([parse_router(router, EXPERTS)], [ids])
    with torch.no_grad(), routed(plan):
        return case.model.model(torch.tensor([ids])).logits[0]


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=0)


def logprob_of(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """Of each token but the first, from logits (T, V) of the text."""
    return logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def assert_as_in_peft(case: Case, column: ColumnTrace, expert: str | None) -> None:
    """The text is PEFT's, and the trace has the log-probabilities of PEFT when it reads it."""
    ids = column.token_ids.tolist()
    prompt, answer = ids[: column.num_prompt], ids[column.num_prompt :]
    assert answer == case.reference.answer(prompt, expert, NUM_TOKENS)
    logprob = logprob_of(case.reference.logits(ids, expert), ids)
    np.testing.assert_allclose(column.logprob[1:], logprob, atol=case.base.drift)


def decisions(case: Case, trace: RoutingTrace, label: str) -> Decisions:
    """Whom each layer chose for the tokens that were read."""
    library, experts = case.model.library, trace.column(label).experts
    cells = {
        (path, bank.run): (int(layer), int(projection))
        for bank in library.banks
        for path, layer, projection in zip(bank.paths, *library.places(bank), strict=True)
    }
    assert len(set(cells.values())) == len(cells), "each layer has a cell of its own"
    return {run: experts[:-1, layer, p, 0] for run, (layer, p) in cells.items()}


@every_base
def test_base(case: Case) -> None:
    ids = case.model.encode(TEXT)
    assert_same(logits_of(case, "base", ids), case.reference.logits(ids, None))
    assert_as_in_peft(case, run(case.model, ["base"]).column("base"), None)


@every_base
def test_single(case: Case) -> None:
    ids = case.model.encode(TEXT)
    for name in EXPERTS:
        assert_same(logits_of(case, f"single:{name}", ids), case.reference.logits(ids, name))
    trace = run(case.model, ["single:green"])
    assert_as_in_peft(case, trace.column("single:green"), "green")
    np.testing.assert_array_equal(trace.share("single:green"), [0, 1])


@every_base
def test_spectr(case: Case) -> None:
    trace = run(case.model, ["spectr"])
    column, told = trace.column("spectr"), decisions(case, trace, "spectr")
    ids = column.token_ids.tolist()
    logits, taken = case.reference.spectr(ids[:-1], told)
    np.testing.assert_equal(told, taken)
    num_answer = len(ids) - column.num_prompt
    np.testing.assert_array_equal(logits.argmax(-1)[-num_answer:], ids[-num_answer:])
    logprob = logprob_of(torch.cat([logits, logits[-1:]]), ids)
    np.testing.assert_allclose(column.logprob[1:], logprob, atol=case.base.drift)
    share = np.mean([experts == 0 for experts in taken.values()])
    np.testing.assert_allclose(trace.share("spectr"), [share, 1 - share], atol=1e-6)
    assert 0 < share < 1


@every_base
def test_default(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line has a lane of its own length, beside a column that reads all of the message."""
    monkeypatch.setattr(reading, "best_cut", lambda lengths, *_: [(0, 1), (1, len(lengths))])
    monkeypatch.setattr(reading, "joined", lambda lanes, *_: lanes)
    router = parse_router(IN_CONTEXT, EXPERTS)
    ids = case.model.encode(MESSAGE)
    lanes = case.model.lanes(router, ids)
    assert len({len(lane.ids) for lane in lanes}) == 2
    if case.base.rows:
        with pytest.raises(ValueError, match=re.escape(case.base.rows)):
            run(case.model, [router, "single:green"], MESSAGE)
        return
    trace = run(case.model, [router, "single:green"], MESSAGE)
    assert_as_in_peft(case, trace.column("single:green"), "green")
    column = trace.column("spectr-context")
    told = decisions(case, trace, "spectr-context")
    at = column.num_prompt
    for lane in lanes:
        assert lane.expert is not None
        assert lane.standing is not None
        answer = case.reference.answer(lane.ids, EXPERTS[lane.expert], NUM_TOKENS)
        own = slice(at, at + len(answer))
        assert column.token_ids[own].tolist() == answer
        text = [*lane.ids, *answer]
        logprob = logprob_of(case.reference.logits(text, EXPERTS[lane.expert]), text)
        expected = logprob[-len(answer) :]
        np.testing.assert_allclose(column.logprob[own], expected, atol=case.base.drift)
        assert all((experts[at : own.stop - 1] == lane.expert).all() for experts in told.values())
        alone = case.model.reader.whole(router, lane.ids).standing
        assert_close(alone, lane.standing, atol=1e-3, rtol=1e-3)
        at = own.stop
    assert at == column.num_tokens


@every_base
def test_preflight(case: Case) -> None:
    assert preflight(case.folder, case.experts).problems == ()


@pytest.mark.parametrize("base", LIMITED, ids=kind)
def test_all_linear_layers(base: Base, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """What cannot be routed is said in one line, before any weight is there."""
    model, adapter = base.model(), tmp_path / "red"
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    if base.all_linear == NOT_IN_PEFT:
        with pytest.raises(ValueError, match="is incompatible with Mamba-based models"):
            save_adapter(model, config, adapter)
        return
    save_adapter(model, config, adapter)
    model.config.save_pretrained(tmp_path / "base")
    problems = preflight(str(tmp_path / "base"), str(adapter)).problems
    if problems:
        with pytest.raises(AdapterError, match=re.escape(base.all_linear)) as caught:
            load(str(tmp_path / "base"), str(adapter))
        (problem,) = caught.value.problems
        assert problems == (problem,)
    else:  # found where the layer runs
        routed_model = load(save_base(model, tokenizer, tmp_path), str(adapter))
        with pytest.raises(ValueError, match=re.escape(base.all_linear)):
            run(routed_model, ["spectr"])


@pytest.mark.parametrize("base", REFUSED, ids=kind)
def test_a_base_that_is_refused(
    base: Base, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = save_base(base.model(), tokenizer, tmp_path)
    for begin in (load, preflight):
        with pytest.raises(ValueError, match=re.escape(base.refused)):
            begin(folder, [])
