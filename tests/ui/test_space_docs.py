"""The client code of docs/space.md, run as it stands against a page."""

import re
from collections.abc import Callable
from pathlib import Path

import gradio as gr
import gradio_client
import pytest

from spectr_demo import ui
from spectr_demo.engine.model import SpectrModel

DOCS = Path(__file__).parents[2] / "docs" / "space.md"


def test_the_client_code(
    routed_model: SpectrModel,
    serve: Callable[[gr.Blocks], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, client = serve(ui.build(routed_model)), gradio_client.Client
    asked = []

    def local_client(space: str) -> gradio_client.Client:
        asked.append(space)
        return client(url, verbose=False)

    monkeypatch.setattr(gradio_client, "Client", local_client)
    (block,) = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), flags=re.M | re.S)
    exec(compile(block, DOCS.name, "exec"), {})
    assert asked == ["you/spectr-demo"]
    printed = capsys.readouterr().out
    assert all(f"{column} " in printed for column in ("base", "uniform", "spectr-context"))
