"""An expert is banned, pinned or used alone: in the whole run, from a token on, in some layers."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from spectr_demo.config import Intervention, RouterConfig
from spectr_demo.engine.intervention import changed_constant, changed_weights
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.run import Step, unique_labels
from spectr_demo.routing.routers import ROUTERS, parse_router
from spectr_demo.trace import NOT_ROUTED, ColumnTrace
from tests.conftest import IN_CONTEXT, BuildModel, SaveExpert

PROMPT = "paint it a warm red"
SCORING = [key for key, row in ROUTERS.items() if row.score is not None]
NUM_TOKENS = 6


def changed(
    model: SpectrModel, router: str | RouterConfig, kind: Any, **scope: Any
) -> RouterConfig:
    config = parse_router(router, model.library.names)
    return replace(config, intervention=Intervention(kind=kind, expert="green", **scope))


def run(model: SpectrModel, *columns: str | RouterConfig) -> Step:
    return model.compare(PROMPT, columns, max_new_tokens=NUM_TOKENS)


def columns_of(step: Step) -> tuple[ColumnTrace, ...]:
    assert step.trace is not None
    return step.trace.columns


def share(step: Step, number: int = 0) -> dict[str, float]:
    assert step.trace is not None
    label = step.trace.labels[number]
    names = step.trace.expert_names
    return dict(zip(names, step.trace.share(label, "all").tolist(), strict=True))


def assert_same(one: ColumnTrace, other: ColumnTrace) -> None:
    assert one.tokens == other.tokens
    np.testing.assert_allclose(one.logprob, other.logprob, atol=1e-4)
    assert (one.weights[one.experts != NOT_ROUTED] > 0).all()


@pytest.mark.parametrize("router", ROUTERS)
def test_only_is_the_expert_alone(routed_model: SpectrModel, router: str) -> None:
    router = "single:red" if router == "single" else router
    alone, single = columns_of(
        run(routed_model, changed(routed_model, router, "only"), "single:green")
    )
    assert_same(alone, single)


@pytest.mark.parametrize("router", [*SCORING, "uniform", "spectr-context"])
def test_a_banned_expert_serves_nothing(routed_model: SpectrModel, router: str) -> None:
    found = share(run(routed_model, changed(routed_model, router, "ban")))
    assert found["green"] == 0
    if router != "spectr-context":
        assert sum(found.values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("router", SCORING)
def test_a_ban_is_the_library_without_the_expert(
    routed_model: SpectrModel, build_model: BuildModel, expert_folders: list[str], router: str
) -> None:
    config = parse_router(router, routed_model.library.names, top_k=2)
    without = build_model([expert_folders[0], expert_folders[2]])
    assert without.library.names == ("red", "blue")
    (banned,) = columns_of(run(routed_model, changed(routed_model, config, "ban")))
    (other,) = columns_of(run(without, config))
    if config.calibrated:
        return  # the base's ordinary text is the same, and so are the two experts' statistics
    assert_same(banned, other)


def test_banned_where_it_is_alone_the_base_answers(routed_model: SpectrModel) -> None:
    banned, base = columns_of(
        run(routed_model, changed(routed_model, "single:green", "ban"), "base")
    )
    assert_same(banned, base)
    assert not banned.is_routed


def test_a_pinned_expert_has_one_of_the_places(routed_model: SpectrModel) -> None:
    config = parse_router("spectr-paper", routed_model.library.names, top_k=2)
    pinned, plain = columns_of(run(routed_model, changed(routed_model, config, "pin"), config))
    read = pinned.experts[:-1]
    assert (read == 1).any(-1).all()
    assert ((read != NOT_ROUTED).sum(-1) == 2).all()
    had_it = (plain.experts[0] == 1).any(-1)  # the first token is read by the first layer alike
    first = np.sort(pinned.experts[0, 0], -1) == np.sort(plain.experts[0, 0], -1)
    assert first[had_it[0]].all()


def test_a_pin_where_one_is_chosen_is_that_expert_alone(routed_model: SpectrModel) -> None:
    pinned, single = columns_of(
        run(routed_model, changed(routed_model, "spectr", "pin"), "single:green")
    )
    assert_same(pinned, single)


@pytest.mark.parametrize("router", ROUTERS)
def test_beyond_its_scope_nothing_changes(routed_model: SpectrModel, router: str) -> None:
    router = "single:red" if router == "single" else router
    kinds = ("ban", "pin", "only")
    configs = [changed(routed_model, router, kind, from_token=NUM_TOKENS) for kind in kinds]
    *same, plain = columns_of(run(routed_model, *configs, router))
    for column in same:
        assert_same(column, plain)
        sums = (each.weights[:-1].sum(-1) for each in (column, plain))
        np.testing.assert_allclose(*sums, atol=1e-6)


@pytest.mark.parametrize("router", ["spectr", "spectr-paper", "uniform", "base", IN_CONTEXT])
def test_it_holds_from_a_token_on_in_some_layers(
    routed_model: SpectrModel, router: str | RouterConfig
) -> None:
    config = changed(routed_model, router, "only", from_token=3, layers=(1, 1))
    column, plain = columns_of(run(routed_model, config, router))
    start = column.num_prompt + 3
    is_green = ((column.experts == 1) & (column.weights == 1)).any(-1)[:-1]  # (T, L, P)
    assert is_green[start:, 1].all()
    before = column.weights[:start], plain.weights[:start]
    np.testing.assert_allclose(*(each.sum(-1) for each in before), atol=1e-6)
    assert column.tokens[: start + 1] == plain.tokens[: start + 1]
    if router in ("uniform", "base"):
        assert not is_green[:, 0].any()
        assert not is_green[:start].any()


def test_rows_with_padding_count_from_their_own_answer(routed_model: SpectrModel) -> None:
    """Two lanes of different length: the change begins with the same token of each answer."""
    config = changed(routed_model, IN_CONTEXT, "only", from_token=2)
    prompts = [routed_model.encode(text) for text in (PROMPT, "go")]
    plan = routed_model.plan([config] * 2, prompts)
    (group,) = plan.groups
    width = max(map(len, prompts))
    plan.begin_pass(torch.zeros(2, width, dtype=torch.long))
    bank = routed_model.library.banks[0]
    assert not group._is_changed(bank).any()  # type: ignore[attr-defined]
    found = []
    for _ in range(4):
        plan.begin_pass(torch.zeros(2, 1, dtype=torch.long))
        found.append(bool(group._is_changed(bank).all()))  # type: ignore[attr-defined]
    assert found == [False, False, True, True]
    # A base that keeps no keys and values reads all of it again.
    plan.begin_pass(torch.zeros(2, width + 4, dtype=torch.long))
    assert group._is_changed(bank)[0, :, 0, 0].tolist() == [False] * (width + 2) + [True] * 2  # type: ignore[attr-defined]


def test_a_layer_without_the_expert(build_model: BuildModel, save_expert: SaveExpert) -> None:
    """Only: the layer is the base's. Ban and pin: the others are chosen as before."""
    folders = [save_expert("red"), save_expert("green", seed=1, target_modules=["q_proj"])]
    model = build_model(folders)
    only, ban, pin, plain = columns_of(
        run(model, *(changed(model, "spectr", kind) for kind in ("only", "ban", "pin")), "spectr")
    )
    assert model.library.projections.index("q_proj") == 0
    assert (only.experts[:-1, :, 1:] == NOT_ROUTED).all()
    assert (ban.experts[:-1] == 0).any(-1).all()
    assert (pin.experts[:-1, :, 0] == 1).any(-1).all()
    assert (pin.experts[:-1, :, 1:] == plain.experts[:-1, :, 1:]).all()


@pytest.mark.parametrize("composition", ["outputs", "parameters"])
def test_an_intervention_runs_beside_other_columns(
    routed_model: SpectrModel, composition: Any
) -> None:
    config = parse_router("spectr-paper", routed_model.library.names, composition=composition)
    alone = columns_of(run(routed_model, "spectr", changed(routed_model, config, "ban")))[1]
    together = columns_of(
        run(routed_model, changed(routed_model, config, "ban"), "base", "uniform", config, "lag")
    )
    assert_same(alone, together[0])
    assert_same(columns_of(run(routed_model, config))[0], together[3])


SCORES = torch.tensor([3.0, 2.0, 1.0])


@pytest.mark.parametrize(
    ("kind", "top_k", "least", "expected"),
    [
        ("ban", 1, None, [1, 0, 0]),
        ("ban", 3, None, [0.5, 0, 0.5]),
        ("ban", 2, None, [0.5, 0, 0.5]),
        ("ban", 1, 5.0, [0, 0, 0]),
        ("pin", 1, 5.0, [0, 1, 0]),
        ("pin", 2, None, [0.5, 0.5, 0]),
        ("pin", 3, None, [1 / 3] * 3),
        ("only", 3, 5.0, [0, 1, 0]),
    ],
)
def test_weights_from_scores(
    kind: Any, top_k: int, least: float | None, expected: list[float]
) -> None:
    intervention = Intervention(kind=kind, expert="b")
    router = RouterConfig(name="spectr", top_k=top_k, intervention=intervention)
    at = torch.tensor([False, True, False])
    torch.testing.assert_close(
        changed_weights(SCORES, router, at, least), torch.tensor(expected) * 1.0
    )


def test_softmax_weights_of_a_pinned_expert_are_of_its_score() -> None:
    router = RouterConfig(
        name="arrow",
        top_k=2,
        weighting="softmax",
        intervention=Intervention(kind="pin", expert="c"),
    )
    at = torch.tensor([False, False, True])
    expected = torch.tensor([3.0, -torch.inf, 1.0]).softmax(-1)
    torch.testing.assert_close(changed_weights(SCORES, router, at), expected)
    only_one = torch.tensor([True])
    assert changed_weights(SCORES[:1], router, only_one).tolist() == [1]


def test_the_only_expert_is_banned() -> None:
    intervention = Intervention(kind="ban", expert="a")
    router = RouterConfig(name="spectr", top_k=1, intervention=intervention)
    at = torch.tensor([True])
    assert changed_weights(SCORES[:1], router, at).tolist() == [0]
    assert changed_constant(torch.tensor([1.0]), intervention, at).tolist() == [0]


def test_wrong_interventions(routed_model: SpectrModel) -> None:
    config = changed(routed_model, "spectr", "ban", layers=(0, 2))
    with pytest.raises(ValueError, match=r"layers 0 to 2; tiny has 0 to 1"):
        routed_model.stream(PROMPT, [config])
    unknown = replace(config, intervention=Intervention(kind="ban", expert="grey"))
    with pytest.raises(ValueError, match="unknown expert 'grey'"):
        routed_model.stream(PROMPT, [unknown])
    for wrong in (
        {"kind": "kill"},
        {"from_token": -1},
        {"from_token": 0.5},
        {"layers": (2, 1)},
        {"layers": (0,)},
        {"layers": (0, 1.5)},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong)).replace("kind", "intervention")):
            Intervention(**{"kind": "ban", "expert": "red"} | wrong)  # type: ignore[arg-type]


def test_a_label_says_what_is_changed(routed_model: SpectrModel) -> None:
    config = changed(routed_model, "spectr", "ban")
    assert unique_labels([config, parse_router("spectr", ("a",)), config]) == [
        "spectr, ban green",
        "spectr",
        "spectr, ban green (2)",
    ]
    trace = run(routed_model, config).trace
    assert trace is not None
    assert trace.columns[0].router["intervention"]["expert"] == "green"
