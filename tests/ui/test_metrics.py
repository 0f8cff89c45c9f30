"""What the page's server tells Prometheus, over a real port."""

from collections.abc import Callable
from typing import Any

import gradio as gr
import httpx
import pytest

from spectr_demo import ui
from spectr_demo.engine.model import SpectrModel
from tests.test_metrics import MARK, scraped

Serve = Callable[[gr.Blocks], str]


def test_the_page_tells_what_its_runs_did(
    serve: Serve, routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECTR_METRICS", "1")
    url = serve(ui.build(routed_model))

    def call(name: str, *data: Any) -> str:
        posted = httpx.post(f"{url}gradio_api/call/{name}", json={"data": data})
        event = posted.json()["event_id"]
        return httpx.get(f"{url}gradio_api/call/{name}/{event}", timeout=60).text

    assert "event: complete" in call("compare", MARK, ["base", "single:red", "spectr"], 6, 0, 0)
    got = scraped(f"{url}metrics")
    assert got["runs_total", "finished"] == 1
    assert got["generated_tokens_total", ""] == 18
    assert got["expert_tokens_total", "base"] == 6
    assert got["first_token_seconds_count", ""] == 1
    experts = sum(num for (name, _), num in got.items() if name == "expert_tokens_total")
    assert experts == pytest.approx(18)  # the trace knows of them all
    assert got["expert_tokens_total", "red"] >= 6
    assert "event: complete" in call("route", MARK)
    assert "event: error" in call("compare", MARK, ["base"], 505, 0, 0)
    got = scraped(f"{url}metrics")
    assert got["runs_total", "finished"] == 2
    assert got["runs_total", "refused"] == 1
    assert got["generated_tokens_total", ""] == 18
    assert got["runs_waiting", ""] == got["runs_running", ""] == 0


def test_nothing_is_told_unless_it_is_asked_for(
    serve: Serve, routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPECTR_METRICS", raising=False)
    assert "spectr_runs" not in httpx.get(f"{serve(ui.build(routed_model))}metrics").text
