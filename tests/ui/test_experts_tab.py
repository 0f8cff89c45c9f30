"""The tab of experts: what files and weights say, of the project's experts and of strangers'."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from spectr_demo.config import ASSETS
from spectr_demo.engine.model import SpectrModel
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.ui import experts_tab
from spectr_demo.ui.experts_tab import facts_of, nearest, pictures
from spectr_demo.ui.libraries import Libraries
from spectr_demo.ui.lists import ExpertLists
from spectr_demo.ui.records import licence_of
from tests.conftest import BuildModel, SaveExpert


def with_record(library: ExpertLibrary, folder: Path, **changes: Any) -> ExpertLibrary:
    """The library, whose first expert has the record and the card of the shipped `sql`."""
    shipped = ASSETS / "experts" / "sql"
    record = json.loads((shipped / "scores.json").read_text(encoding="utf-8")) | changes
    (folder / "scores.json").write_text(json.dumps(record))
    (folder / "README.md").write_bytes((shipped / "README.md").read_bytes())
    first, *others = library.adapters
    return replace(library, adapters=(replace(first, source=str(folder)), *others))


def test_an_expert_of_this_project_shows_its_record(
    routed_model: SpectrModel, tmp_path: Path
) -> None:
    library = with_record(routed_model.library, tmp_path)
    facts = facts_of(library.adapters[0])
    assert "Question to SQL" in facts
    assert "apache-2.0" in facts
    assert "FROM flights WHERE airline = &#x27;Swiss&#x27;" in facts
    assert str(tmp_path.parent) not in facts, "where files lie is nobody's business"
    scores = pictures(library, 0)["scores"]
    assert scores.title == "It beats the base: 1.00 against 0.00"
    assert scores.rows == [
        ("this expert", "1.000 (0.981-1.000)"),
        ("base model", "0.000 (0.000-0.019)"),
    ]


def test_a_baseline_that_is_better_is_said(routed_model: SpectrModel, tmp_path: Path) -> None:
    every = {"all": {"mean": 0.5, "low": 0.4, "high": 0.6}}
    better = {"all": {"mean": 0.7, "low": 0.6, "high": 0.8}}
    broken = {"x": 1, "y": {"all": {"mean": "much"}}, "z": {}}
    scores = {"expert": every, "base": every, "by rule": better, **broken}
    library = with_record(routed_model.library, tmp_path, scores=scores)
    picture = pictures(library, 0)["scores"]
    assert picture.title == "It does not beat “by rule”: 0.50 against 0.70"
    assert [name for name, _ in picture.rows] == ["by rule", "this expert", "base model"]


def test_a_strangers_expert_shows_what_its_files_say(routed_model: SpectrModel) -> None:
    library = routed_model.library
    facts = facts_of(library.adapters[0])
    assert facts.count("its files do not say") >= 2
    assert "q_proj" in facts and "14 linear layers" in facts
    found = pictures(library, 0)
    assert found["scores"] is None
    assert found["layers"].title.startswith("It changes all 14 linear layers")
    assert len(found["spectrum"].rows) == 4
    assert sum(float(share.rstrip("%")) for _, share in found["spectrum"].rows) == pytest.approx(
        100, abs=0.5
    )


def test_what_an_expert_leaves_alone_is_empty(
    build_model: BuildModel, expert_folders: list[str], save_expert: SaveExpert
) -> None:
    small = save_expert("small", seed=7, r=2, target_modules=["q_proj"])
    library = build_model([*expert_folders, small]).library
    found = pictures(library, 3)
    assert found["layers"].title.startswith("It changes 2 of 14 linear layers, q_proj of layer")
    header, (first, _) = found["layers"].header, found["layers"].rows
    sizes = dict(zip(header, first, strict=True))
    assert float(sizes["q_proj"]) > 0
    assert {size for name, size in sizes.items() if name not in ("layer", "q_proj")} == {"-"}
    # The size is that of the change to the weights.
    path = next(path for path in library.aligned[3] if ".0." in path)
    aligned = library.aligned[3][path]
    assert float(sizes["q_proj"]) == pytest.approx(float((aligned.B @ aligned.A).norm()), abs=0.006)


def test_two_that_cannot_be_told_apart_are_warned_of(
    build_model: BuildModel, expert_folders: list[str], save_expert: SaveExpert
) -> None:
    twin = save_expert("twin", seed=0)  # the seed of red
    library = build_model([*expert_folders, twin]).library
    warned = nearest(library, 3)
    assert warned is not None
    assert warned.title == "⚠ twin and red cannot be told apart"
    assert warned.note.startswith("They respond to the same inputs: keep one, or merge them.")
    assert warned.rows[0] == ("red", "1.000")
    fine = nearest(library, 1)
    assert fine is not None
    assert fine.title.startswith("Nearest to green is ")
    assert fine.title.endswith("they can be told apart")


def test_an_expert_is_shown_before_all_are_compared(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gr.Blocks() as page, gr.Tabs(), gr.Tab("Experts") as tab:
        experts_tab.lay_out(tab, Libraries(routed_model), ExpertLists())
    handlers: dict[str, Any] = {fn.name: fn.fn for fn in page.fns.values()}
    with monkeypatch.context() as alone:
        alone.setattr(experts_tab, "overlap_of", None)
        shown = handlers["show"]("green")
    assert sum(hasattr(value, "to_plotly_json") for value in shown.values()) == 2
    compared = handlers["look_around"]("green")
    assert any("Nearest to green" in str(value) for value in compared.values())


def test_one_expert_alone_has_none_near(build_model: BuildModel, expert_folders: list[str]) -> None:
    library = build_model(expert_folders[:1]).library
    assert nearest(library, 0) is None


def test_without_experts_the_tab_says_so(build_model: BuildModel) -> None:
    with gr.Blocks() as page, gr.Tabs(), gr.Tab("Experts") as tab:
        experts_tab.lay_out(tab, Libraries(build_model([])), ExpertLists())
    (said,) = [
        b for b in page.blocks.values() if "No expert is loaded" in str(getattr(b, "value", ""))
    ]
    assert said.visible
    (chosen,) = [b for b in page.blocks.values() if isinstance(b, gr.Dropdown)]
    assert not chosen.visible
    handlers: dict[str, Any] = {fn.name: fn.fn for fn in page.fns.values()}
    (hidden,) = handlers["show"](None).values()
    assert not hidden["visible"]


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlanguage: en\nlicense: mit\n---\n", "mit"),
        ('---\nlicense: "cc-by-4.0"\n---\n', "cc-by-4.0"),
        ("---\nlanguage: en\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("---\nlicense:\n---\n", None),
        ("", None),
    ],
)
def test_the_licence_is_that_of_the_card(
    routed_model: SpectrModel, tmp_path: Path, card: str, expected: str | None
) -> None:
    adapter = replace(routed_model.library.adapters[0], source=str(tmp_path))
    assert licence_of(adapter) is None
    (tmp_path / "README.md").write_text(card)
    assert licence_of(adapter) == expected
