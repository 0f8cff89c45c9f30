"""How it works: the numbers of one token in one layer are those that the engine computes."""

from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch

from spectr_demo.engine.layers import routed
from spectr_demo.engine.model import SpectrModel
from spectr_demo.routing.routers import parse_router
from spectr_demo.routing.spectr import delta, spectr_scores
from spectr_demo.ui import how, how_tab
from spectr_demo.ui.how import MAX_TOKENS, Look, look_at, look_inside, places
from spectr_demo.ui.how_tab import pictures_of
from spectr_demo.ui.libraries import Libraries
from spectr_demo.ui.line import Line
from spectr_demo.ui.lists import ExpertLists
from tests.conftest import BuildModel, SaveExpert

PROMPT = "red or green?"


def path_of(layer: int, projection: str) -> str:
    part = "mlp" if projection in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"model.layers.{layer}.{part}.{projection}"


@pytest.mark.parametrize(
    ("layer", "projection"), [(0, "q_proj"), (0, "v_proj"), (1, "up_proj"), (1, "down_proj")]
)
def test_the_steps_are_the_methods(routed_model: SpectrModel, layer: int, projection: str) -> None:
    found = look_at(routed_model, PROMPT, 5, layer, projection)
    library, path = routed_model.library, path_of(layer, projection)
    config = parse_router(how.ROUTER, library.names)
    factors = [expert[path] for expert in library.aligned]
    A, B = (torch.stack([getattr(each, side) for each in factors]) for side in "AB")
    x = torch.tensor(found.x)

    z = torch.einsum("erd,d->er", A, x)
    np.testing.assert_allclose(found.z, z, atol=1e-5)
    np.testing.assert_allclose(found.scores, z.norm(dim=-1), atol=1e-5)
    assert sorted(found.chosen) == [0, 1, 2]
    assert found.weights == pytest.approx([1 / 3] * 3)
    np.testing.assert_allclose(found.mixed, z.mean(0), atol=1e-5)
    added = delta(x, A, B, spectr_scores, config)
    assert found.delta_length == pytest.approx(float(added.norm()), rel=1e-4)
    W = routed_model.model.get_submodule(path).weight
    assert found.base_length == pytest.approx(float((W @ x).norm()), rel=1e-4)


def test_the_first_layer_is_what_a_run_computes(routed_model: SpectrModel) -> None:
    ids = routed_model.encode(PROMPT)
    trace = routed_model.compare(PROMPT, [how.ROUTER], max_new_tokens=1).trace
    assert trace is not None
    column, projection = trace.columns[0], trace.projections.index("q_proj")
    for token in (1, len(ids) - 1):
        found = look_at(routed_model, PROMPT, token, 0, "q_proj")
        experts = column.experts[token, 0, projection].tolist()
        assert [found.experts.index(trace.expert_names[e]) for e in experts] == list(found.chosen)
        np.testing.assert_allclose(
            column.scores[token, 0, projection], found.scores[list(found.chosen)], rtol=1e-4
        )


def test_all_layers_vote(routed_model: SpectrModel) -> None:
    found = look_at(routed_model, PROMPT, 5, 0, "q_proj")
    assert sum(found.votes.values()) == 14
    best: dict[str, int] = {}
    for layer, names in places(routed_model.library).items():
        for name in names:
            here = look_at(routed_model, PROMPT, 5, layer, name)
            winner = here.experts[int(here.scores.argmax())]
            best[winner] = best.get(winner, 0) + 1
    assert found.votes == best


def test_it_opens_on_the_requests_last_token(routed_model: SpectrModel) -> None:
    found = look_at(routed_model, PROMPT, None, 0, "q_proj")
    assert found.tokens[found.token] == "?"
    assert "".join(found.tokens[: found.token + 1]).endswith(PROMPT)
    # A token that another prompt had.
    assert look_at(routed_model, "red", 500, 0, "q_proj").token < 500


def test_looking_disturbs_nothing(routed_model: SpectrModel) -> None:
    ids = torch.tensor([routed_model.encode(PROMPT)])
    with torch.inference_mode(), routed(None):
        before = routed_model.model(ids).logits
        look_at(routed_model, PROMPT, 3, 1, "o_proj")
        torch.testing.assert_close(routed_model.model(ids).logits, before, rtol=0, atol=0)


def test_what_cannot_be_looked_at_is_said(
    build_model: BuildModel, expert_folders: list[str], save_expert: SaveExpert
) -> None:
    small = save_expert("small", seed=7, r=2, target_modules=["q_proj"])
    model = build_model([small])
    assert places(model.library) == {0: ["q_proj"], 1: ["q_proj"]}
    with pytest.raises(ValueError, match=r"no expert touches v_proj of layer 0; .* q_proj"):
        look_at(model, PROMPT, None, 0, "v_proj")
    with pytest.raises(ValueError, match="the prompt is empty"):
        look_at(model, " ", None, 0, "q_proj")
    with pytest.raises(ValueError, match=f"up to {MAX_TOKENS} are looked into"):
        look_at(model, "x" * MAX_TOKENS, None, 0, "q_proj")
    with pytest.raises(gr.Error, match="no expert touches"):
        next(look_inside(model)(PROMPT, None, 5, "q_proj"))


def test_experts_of_other_layers_are_left_out(
    build_model: BuildModel, expert_folders: list[str], save_expert: SaveExpert
) -> None:
    small = save_expert("small", seed=7, r=2, target_modules=["q_proj"])
    model = build_model([*expert_folders, small])
    assert look_at(model, PROMPT, 5, 0, "q_proj").experts == ("red", "green", "blue", "small")
    found = look_at(model, PROMPT, 5, 0, "v_proj")
    assert found.experts == ("red", "green", "blue")
    assert len(found.chosen) == 3


@pytest.mark.parametrize("num", [1, 2, 3])
def test_any_number_of_experts_is_drawn(
    build_model: BuildModel, expert_folders: list[str], num: int
) -> None:
    found = look_at(build_model(expert_folders[:num]), PROMPT, 5, 0, "q_proj")
    assert found.weights == pytest.approx([1 / num] * num)
    pictures = pictures_of(found)
    assert set(pictures) == set(how_tab.STEPS)
    assert len(pictures["scores"].rows) == num
    assert [row[-1] for row in pictures["scores"].rows] == ["yes"] * num
    assert len(pictures["mix"].rows) == num + 1
    share = found.delta_length / found.base_length
    assert f"by {share:.0%} of its length" in pictures["output"].title
    best = found.experts[int(found.scores.argmax())]
    assert pictures["scores"].title.startswith(best)


def test_of_many_experts_the_best_are_drawn() -> None:
    E, r = 40, 4
    z = np.random.default_rng(0).normal(size=(E, r)).astype(np.float32)
    scores = np.linalg.norm(z, axis=1)
    order = np.argsort(-scores)
    found = Look(
        tokens=("a", "b"),
        token=1,
        layer=0,
        projection="q_proj",
        experts=tuple(f"<e{i}>" for i in range(E)),
        x=np.ones(8, np.float32),
        z=z,
        scores=scores,
        chosen=tuple(order[:4].tolist()),
        weights=(0.25,) * 4,
        mixed=z[order[:4]].mean(0),
        base_length=2.0,
        delta_length=0.5,
        votes={f"<e{i}>": E - i for i in range(E)},
    )
    pictures = pictures_of(found)
    shown = [row[0] for row in pictures["scores"].rows]
    assert shown == [f"<e{i}>" for i in order[: how_tab.MAX_SHOWN]]
    assert "28 with lower scores are left out" in pictures["z"].note
    assert len(pictures["votes"].figure.data[0].x) == how_tab.MAX_SHOWN
    assert "&lt;e" in pictures["z"].twin and "<e0>" not in pictures["z"].twin
    assert "25% of its length" in pictures["output"].title


def handlers(model: SpectrModel, line: Line | None = None) -> tuple[gr.Blocks, dict[str, Any]]:
    with gr.Blocks() as page, gr.Tabs(), gr.Tab("How it works") as tab:
        how_tab.lay_out(tab, Libraries(model), None, line or Line(), {}, ExpertLists())
    return page, {fn.name: fn.fn for fn in page.fns.values()}


def test_the_tab_reads_when_it_is_opened_and_only_then(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found = handlers(routed_model)
    (opened,) = found["open_how"](False, PROMPT, 0, "q_proj")
    figures = [v for v in opened.values() if hasattr(v, "to_plotly_json")]
    assert len(figures) == len(how_tab.STEPS)
    token = next(v for k, v in opened.items() if k.elem_id == "how-token")
    assert token["choices"][token["value"]][0].endswith(": ?")

    def no_model(*args: Any) -> Any:
        raise AssertionError("the model was asked")

    monkeypatch.setattr(routed_model, "encode", no_model)
    assert [len(update) for update in found["open_how"](True, PROMPT, 0, "q_proj")] == [1]


def test_an_error_leaves_what_was_shown(routed_model: SpectrModel) -> None:
    _, found = handlers(routed_model)
    (update,) = found["read"]("", 0, "q_proj")
    (told,) = update.values()
    assert "the prompt is empty" in told["value"]


def test_who_looks_stands_in_line_with_the_runs(routed_model: SpectrModel) -> None:
    line = Line()
    _, found = handlers(routed_model, line)
    with line.ticket("somebody") as other:
        assert line.begins(other, 0)
        going = found["read"](PROMPT, 0, "q_proj")
        (told,) = next(going).values()
        assert "number 2 in line" in told["value"]
    *_, shown = going
    assert any(hasattr(value, "to_plotly_json") for value in shown.values())


def test_without_experts_the_tab_says_what_is_computed(build_model: BuildModel) -> None:
    page, found = handlers(build_model([]))
    (said,) = [b for b in page.blocks.values() if "y = W x." in str(getattr(b, "value", ""))]
    assert said.visible
    (asked,) = [b for b in page.blocks.values() if getattr(b, "elem_id", "") == "how-prompt"]
    row = asked.parent.parent  # type: ignore[union-attr]
    assert isinstance(row, gr.Row) and not row.visible
    assert len(list(found["open_how"](False, PROMPT, None, None))) == 1


def test_what_a_prompt_holds_is_escaped(routed_model: SpectrModel) -> None:
    found = look_at(routed_model, "<script>", None, 0, "q_proj")
    assert "<script" not in how_tab.first_step(found)
