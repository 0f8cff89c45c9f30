"""What is decided in a library is what the routers decide, on the same activations."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from spectr_demo.base.prompts import encode, shared_length
from spectr_demo.config import RouterConfig
from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation.accuracy import routing_accuracy
from spectr_demo.evaluation.reading import Text
from spectr_demo.evaluation.robustness.decisions import METHODS
from spectr_demo.evaluation.robustness.stress import stress
from spectr_demo.routing.context import EvidencePool
from spectr_demo.routing.routers import ROUTERS, parse_router
from spectr_demo.routing.spectr import select, spectr_scores
from tests.conftest import banks_by_path
from tests.evaluation.robustness.samples import PROMPTS, inputs, texts_for


@pytest.mark.slow
def test_accuracy_is_that_of_the_routers(
    routed_model: SpectrModel, stressed: dict[str, Any]
) -> None:
    """Against the routers' own code and `routing_accuracy`, on the same activations."""
    result = stressed["number"]["3"]["mean"]
    keys = ("arrow", "spectr", "norm", "spectr-calibrated", "spectr-context")
    statistics = own_calibration(routed_model)
    for method, key in zip(METHODS, keys, strict=True):
        rows = []
        for expert, (name, texts) in enumerate(texts_for(routed_model).items()):
            readings = [read_by(routed_model, key, name, text, statistics) for text in texts]
            rows.append(routing_accuracy(readings, expert))
        assert result[method] == {
            "decisions": pytest.approx(sum(row["answer"] for row in rows) / 3, abs=1e-3),
            "majority": pytest.approx(sum(row["majority"] for row in rows) / 3, abs=1e-3),
        }


def read_by(
    engine: SpectrModel, key: str, name: str, text: Text, statistics: dict[str, Tensor]
) -> Any:
    """What a router chooses where the activations are those of expert `name`."""
    config = replace(parse_router(key, engine.library.names, top_k=1), confidence=None)
    score, pool, banks = ROUTERS[key].score, None, banks_by_path(engine.library)
    assert score is not None
    ids = [*text.prompt_ids, *text.answer_ids[:-1]]
    num_opening = shared_length(engine.template.opening, ids)
    places = torch.arange(len(ids))

    def scores_of(router: str, token_ids: Sequence[int]) -> Iterator[Tensor]:
        if pool is not None:
            pool.begin_pass(1, len(token_ids))
        for path, x in inputs(engine, router, token_ids).items():
            bank = banks[path]
            scores = score(bank.project(x), bank.singular_values, config)
            if config.calibrated:
                mean, std = statistics[path]
                scores = (scores - mean) / std
            if pool is not None:
                scores = pool.add(bank, scores)
            yield scores[:, :, 0]

    if config.reads_first:
        assert config.decay is not None
        is_prompt = places[: len(text.prompt_ids)]
        pool = EvidencePool(config.decay, 3, (is_prompt >= num_opening)[None])
        list(scores_of("base", text.prompt_ids))
        is_answer = places >= len(text.prompt_ids)
        pool = EvidencePool(config.decay, 3, is_answer[None], pool.start())
    scores = list(scores_of(f"single:{name}", ids))
    return as_reading([select(each, config)[0][0] for each in scores], text, num_opening)


def as_reading(choices: Sequence[Tensor], text: Text, num_opening: int) -> Any:
    """What `routing_accuracy` needs of a Reading, from the choices (T, 1) of each layer."""
    return SimpleNamespace(
        choices=torch.stack(list(choices), dim=1)[:, None].to(torch.int16).numpy(),
        num_prompt=len(text.prompt_ids),
        num_opening=num_opening,
    )


def own_calibration(engine: SpectrModel) -> dict[str, Tensor]:
    """Mean and standard deviation of SpectR's scores on the generic prompts, by layer."""
    values: dict[str, list[Tensor]] = {}
    banks = banks_by_path(engine.library)
    for prompt in PROMPTS:
        ids = engine.encode(prompt)
        for path, x in inputs(engine, "base", ids).items():
            bank = banks[path]
            z = bank.project(x[:, len(engine.template.opening) :])
            scores = spectr_scores(z, bank.singular_values, RouterConfig(name="spectr"))
            values.setdefault(path, []).append(scores[0, :, 0])
    return {
        path: torch.stack([torch.cat(v).mean(0), torch.cat(v).std(0, correction=0)])
        for path, v in values.items()
    }


def test_evidence_is_the_engines_where_a_request_has_lines(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line of the prompt is read by itself; each line of the answer returns to them."""
    monkeypatch.setattr("spectr_demo.engine.reading.generic_prompts", lambda base: PROMPTS)
    engine = routed_model
    names = engine.library.names
    config = replace(parse_router("spectr-context", names), confidence=None)
    shares = []
    for expert, name in enumerate(names):
        text = two_lines(engine, name)
        assert len(engine.template.request_lines(text.prompt_ids)) == 2
        ids = [*text.prompt_ids, *text.answer_ids[:-1]]
        plan = engine.plan([config], [ids], num_prompt=[len(text.prompt_ids)])
        plan.begin_pass(torch.tensor([ids]))
        (group,), own = plan.groups, inputs(engine, f"single:{name}", ids)
        leads = []
        for bank in engine.library.banks:
            scores = group.scores(bank, bank.project(own[bank.paths[0]]))[0]  # (T, P, E)
            others = scores[..., [e for e in range(3) if e != expert]].amax(-1)
            leads.append((scores[..., expert] - others)[len(text.prompt_ids) - 1 :])
        lead = torch.cat(leads, dim=1)
        # Lines that name two experts make them equal: such a decision is shared.
        shares.append(torch.where(lead.abs() < 1e-5, 0.5, (lead > 0).float()).mean())
    found = stress(
        engine,
        {name: [two_lines(engine, name)] for name in names},
        PROMPTS,
        seeds=(0,),
        num_experts=(),
    )
    decisions = found["number"]["3"]["mean"]["spectr in context"]["decisions"]
    assert decisions == pytest.approx(float(sum(shares)) / 3, abs=1e-3)


def two_lines(engine: SpectrModel, name: str) -> Text:
    return Text(
        prompt_ids=tuple(
            encode(engine.tokenizer, f"What is {name}?\nAnd where are ships, or not?")
        ),
        answer_ids=tuple(engine.tokenizer(f"it is {name}\nat sea, {name}")["input_ids"]),
    )
