"""Advice: each verdict is provoked by an expert that deserves it, and by none that does not."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from spectr_demo.__main__ import main
from spectr_demo.base.generic import user_turns
from spectr_demo.engine.layers import routed
from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation import advice
from spectr_demo.evaluation.advice import ExpertAdvice, advise, to_json
from spectr_demo.experts.library import load_experts
from spectr_demo.routing.routers import parse_router
from tests.conftest import BuildModel, SaveExpert, loaded_base, tiny_llama

SOUND = ExpertAdvice(
    name="sound",
    request="a",
    answer="b",
    strength=0.9,
    found=1.0,
    others=0.0,
    ordinary=0.0,
    cost=1.0,
    nearest="other",
    apart=1.0,
    shared=0.0,
)
VOCABULARY = 258


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "NUM_REQUESTS", 4)
    monkeypatch.setattr(advice, "NUM_TOKENS", 8)


def kinds(each: ExpertAdvice) -> list[str]:
    return [verdict.partition(":")[0] for verdict in each.verdicts]


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, None),
        ({"strength": 0.1}, "weak"),
        ({"shared": 0.9, "apart": 0.5}, "alike"),
        ({"found": 0.0, "ordinary": 0.1}, None),
        # A twin's requests are as likely given to either: that is said once.
        ({"shared": 0.9, "apart": 0.5, "found": 0.0}, "alike"),
        ({"apart": 0.5}, "mixed up"),
        ({"found": 0.0}, "never chosen"),
        ({"others": 0.9}, "always chosen"),
        ({"ordinary": 0.9}, "always chosen"),
        ({"cost": math.log(VOCABULARY)}, "harmful"),
        ({"nearest": None, "apart": math.nan, "shared": math.nan, "others": math.nan}, None),
    ],
)
def test_each_number_has_its_verdict(changes: dict[str, object], kind: str | None) -> None:
    each = replace(SOUND, **changes)  # type: ignore[arg-type]
    found = list(advice._verdicts(each, VOCABULARY))
    assert kinds(replace(each, verdicts=tuple(found))) == ([kind] if kind else [])


def test_an_expert_that_does_nothing_is_weak(
    build_model: BuildModel, expert_folders: list[str], save_expert: SaveExpert
) -> None:
    nothing = save_expert("nothing", size=0.0)
    small = save_expert("small", seed=7, size=0.05)
    by_name = {each.name: each for each in advise(build_model([nothing, small, *expert_folders]))}
    assert by_name["nothing"].strength == by_name["nothing"].cost == 0
    assert "weak" in kinds(by_name["nothing"])
    assert "weak" in kinds(by_name["small"])
    assert 0 <= by_name["small"].strength < by_name["red"].strength


def test_twins_are_alike_and_others_are_not(
    build_model: BuildModel, expert_folders: list[str], save_expert: SaveExpert
) -> None:
    twin = save_expert("twin", seed=0)  # the seed of red
    by_name = {each.name: each for each in advise(build_model([*expert_folders, twin]))}
    for one, other in (("red", "twin"), ("twin", "red")):
        assert by_name[one].nearest == other
        assert by_name[one].apart == 0.5
        assert by_name[one].shared == pytest.approx(1, abs=0.01)
        assert "alike" in kinds(by_name[one])
    assert by_name["green"].shared < 0.5
    assert "alike" not in kinds(by_name["green"]) + kinds(by_name["blue"])


def test_an_expert_that_spoils_ordinary_text_is_harmful(
    build_model: BuildModel, save_expert: SaveExpert
) -> None:
    folders = [save_expert("huge", seed=1, size=0.5), save_expert("small", seed=2, size=0.02)]
    huge, small = advise(build_model(folders))
    assert "harmful" in kinds(huge)
    assert "harmful" not in kinds(small)
    assert huge.cost > small.cost >= 0


def test_what_an_expert_is_worth_depends_on_no_other(
    build_model: BuildModel, expert_folders: list[str]
) -> None:
    (alone,) = advise(build_model(expert_folders[:1]))
    among = advise(build_model(expert_folders[::-1]))[-1]
    assert (alone.name, alone.request, alone.answer) == (among.name, among.request, among.answer)
    assert alone.strength == pytest.approx(among.strength, abs=1e-3)
    assert alone.cost == pytest.approx(among.cost, abs=1e-3)
    assert alone.nearest is None
    (values,) = to_json([alone])
    assert values["others"] is values["apart"] is values["shared"] is None
    json.dumps(values, allow_nan=False)


def test_without_experts_there_is_nothing_to_say(build_model: BuildModel) -> None:
    assert advise(build_model([])) == []


def test_a_request_is_the_experts_own(routed_model: SpectrModel) -> None:
    router = parse_router("single:red", routed_model.library.names)
    opening = routed_model.template.opening
    with routed(routed_model.plan([router] * 3, [opening] * 3)):
        own = user_turns(routed_model.base, 3, 8)
    assert len(own) == 3
    assert own != user_turns(routed_model.base, 3, 8)


def test_a_base_without_a_chat_template(
    tokenizer: PreTrainedTokenizerFast, expert_folders: list[str]
) -> None:
    plain = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>"
    )
    plain.pad_token = plain.eos_token
    model = tiny_llama(len(plain))
    engine = SpectrModel(loaded_base(model, plain, "plain"), load_experts(expert_folders, model))
    assert [each.name for each in advise(engine)] == ["red", "green", "blue"]


def test_taken_are_requests_in_which_it_stands_out_enough() -> None:
    standing = torch.tensor([[3.0, 1.0], [0.5, 0.0], [0.0, 4.0], [2.0, 1.0]])
    assert advice._share_taken(standing, 0, 1.0) == 0.5
    assert advice._share_taken(standing, 1, 1.0) == 0.25
    assert advice._share_taken(standing, 0, -math.inf) == 0.75


def test_the_command(
    base_folder: str, expert_folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["inspect", "--base", base_folder, "--experts", *expert_folders[:2]]
    assert main([*command, "--json"]) == 0
    assert "advice" not in json.loads(capsys.readouterr().out)
    assert main([*command, "--advise", "--json"]) == 0
    red, green = json.loads(capsys.readouterr().out)["advice"]
    assert (red["name"], red["nearest"], green["nearest"]) == ("red", "green", "red")
    assert main([*command, "--advise"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "strength" in printed
    for expert in (red, green):
        for verdict in expert["verdicts"]:
            assert f"Advice: expert '{expert['name']}' is {verdict}" in printed
