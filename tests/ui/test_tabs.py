"""The tabs beside the comparison, as Gradio sees them."""

import gradio as gr
import pytest

from spectr_demo import ui
from spectr_demo.engine.model import SpectrModel
from spectr_demo.ui import evidence_tab
from tests.conftest import BuildModel


def test_what_uses_the_model_waits_with_the_runs(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence_tab, "domains_for", lambda names: ["cron"])
    page = ui.build(routed_model)
    places = {fn.name: fn.concurrency_id for fn in page.fns.values()}
    assert {places[name] for name in ("run", "evaluate", "read", "inside", "open_how")} == {"model"}
    assert "model" not in (places["show"], places["_stop"])


@pytest.mark.parametrize("num", [0, 1, 2])
def test_the_page_has_its_tabs_with_any_number_of_experts(
    build_model: BuildModel, expert_folders: list[str], num: int
) -> None:
    page = ui.build(build_model(expert_folders[:num]))
    tabs = [block.label for block in page.blocks.values() if isinstance(block, gr.Tab)]
    assert tabs == ["Compare", "Experts", "Evidence", "How it works"]
    # Charts are drawn when a tab is opened.
    plots = [block for block in page.blocks.values() if isinstance(block, gr.Plot)]
    assert all(plot.value is None for plot in plots)
