"""What is decided in a library is what the routers decide, on the same activations."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from spectr_demo.base.prompts import shared_length
from spectr_demo.config import RouterConfig
from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation.accuracy import routing_accuracy
from spectr_demo.evaluation.reading import Text
from spectr_demo.evaluation.robustness.decisions import METHODS, certainties, hear
from spectr_demo.routing.detection import standing
from spectr_demo.routing.routers import ROUTERS, parse_router
from spectr_demo.routing.spectr import select, spectr_scores
from tests.conftest import IN_CONTEXT, banks_by_path
from tests.evaluation.robustness.samples import PROMPTS, build, inputs, texts_for

OF_TOKENS = ("arrow", "spectr", "norm", "spectr-calibrated")


@pytest.mark.slow
def test_accuracy_is_that_of_the_routers(
    routed_model: SpectrModel, stressed: dict[str, Any]
) -> None:
    """Against the routers' own code and `routing_accuracy`, on the same activations."""
    result = stressed["number"]["3"]["mean"]
    statistics = own_calibration(routed_model)
    for method, key in zip(METHODS, OF_TOKENS, strict=False):
        rows = []
        for expert, (name, texts) in enumerate(texts_for(routed_model).items()):
            readings = [read_by(routed_model, key, name, text, statistics) for text in texts]
            rows.append(routing_accuracy(readings, expert))
        assert result[method] == {
            "decisions": pytest.approx(sum(row["answer"] for row in rows) / 3, abs=1e-3),
            "majority": pytest.approx(sum(row["majority"] for row in rows) / 3, abs=1e-3),
        }


@pytest.mark.slow
def test_in_context_it_is_whom_the_engine_names(
    routed_model: SpectrModel, stressed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spectr_demo.engine.reading.generic_prompts", lambda base: PROMPTS)
    router = parse_router(IN_CONTEXT, routed_model.library.names)
    variants = build(routed_model)
    texts = [(name, text) for name, own in texts_for(routed_model).items() for text in own]
    ordinary, heard = hear(routed_model, variants, PROMPTS, [text.prompt_ids for _, text in texts])
    library = torch.arange(3)
    right = []
    for (name, text), of_text in zip(texts, heard, strict=True):
        lane = routed_model.reader.whole(router, text.prompt_ids)
        # The second ones are blocks of the same experts, cut to a rank that they do not exceed.
        for candidates in (library, 3 + library):
            of_both = (certainties(variants, each, candidates) for each in (of_text, ordinary))
            torch.testing.assert_close(standing(*of_both), lane.standing, atol=1e-3, rtol=0)
        right.append(lane.expert == routed_model.library.index(name))
    share = sum(right) / len(right)
    found = stressed["number"]["3"]["mean"][METHODS[-1]]
    assert found == {"decisions": pytest.approx(share, abs=1e-4)} | {"majority": found["decisions"]}


def read_by(
    engine: SpectrModel, key: str, name: str, text: Text, statistics: dict[str, Tensor]
) -> Any:
    """What a router chooses where the activations are those of expert `name`."""
    config, banks = parse_router(key, engine.library.names, top_k=1), banks_by_path(engine.library)
    score = ROUTERS[key].score
    assert score is not None
    ids = [*text.prompt_ids, *text.answer_ids[:-1]]
    choices = []
    for path, x in inputs(engine, f"single:{name}", ids).items():
        bank = banks[path]
        scores = score(bank.project(x), bank.singular_values, config)
        if config.calibrated:
            mean, std = statistics[path]
            scores = (scores - mean) / std
        choices.append(select(scores[0, :, 0], config)[0])
    return as_reading(choices, text, shared_length(engine.template.opening, ids))


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
