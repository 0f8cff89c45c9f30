"""What `serve` tells Prometheus, over a real port."""

from typing import Any

import httpx
import openai
import pytest

from spectr_demo.engine.model import SpectrModel
from spectr_demo.metrics import NOT_KNOWN
from tests.serving.conftest import ServeModel
from tests.test_metrics import MARK, scraped


def test_serve_tells_what_its_runs_did(
    serve_model: ServeModel, routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECTR_METRICS", "1")
    client = serve_model(routed_model)
    url = str(client.base_url).replace("/v1/", "/metrics")

    def ask(model: str, **settings: Any) -> Any:
        messages = [{"role": "user", "content": MARK}]
        settings = {"max_tokens": 6} | settings
        return client.chat.completions.create(model=model, messages=messages, **settings)

    answers = [ask("base"), ask("single:red"), ask("spectr")]
    assert len(list(ask("single:red", stream=True))) > 2
    with pytest.raises(openai.BadRequestError):
        ask("base", max_tokens=5000)
    with pytest.raises(openai.NotFoundError):
        ask("nobody")
    got = scraped(url)
    assert got["runs_total", "finished"] == 4
    assert got["runs_total", "refused"] == 2
    assert got["runs_total", "failed"] == got["runs_total", "left"] == 0
    assert got["runs_waiting", ""] == got["runs_running", ""] == 0
    num = sum(answer.usage.completion_tokens for answer in answers)
    assert got["generated_tokens_total", ""] == num + 6
    assert got["expert_tokens_total", "base"] == 6
    assert got["expert_tokens_total", "red"] == 12
    assert got["expert_tokens_total", NOT_KNOWN] == 6  # a router that looks at tokens
    assert got["first_token_seconds_count", ""] == 4
    assert got["in_line_seconds_count", ""] == 6
    assert got["answer_tokens_per_second_count", ""] == 4


@pytest.mark.parametrize("asked", [None, "0"])
def test_nothing_is_told_unless_it_is_asked_for(
    asked: str | None,
    serve_model: ServeModel,
    routed_model: SpectrModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SPECTR_METRICS", raising=False)
    if asked is not None:
        monkeypatch.setenv("SPECTR_METRICS", asked)
    client = serve_model(routed_model)
    assert httpx.get(str(client.base_url).replace("/v1/", "/metrics")).status_code == 404
