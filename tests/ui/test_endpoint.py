"""The endpoints for programs, as gradio_client and an MCP client see them."""

import ast
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import anyio
import gradio as gr
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client

from spectr_demo import ui
from spectr_demo.config import ASSETS
from spectr_demo.engine.model import SpectrModel
from spectr_demo.ui.endpoint import for_programs
from spectr_demo.ui.requests import NUM_NEAREST, routed_requests

Serve = Callable[[gr.Blocks], str]
TWO = "Write red things, and then write blue things"


@pytest.fixture
def described_model(routed_model: SpectrModel) -> SpectrModel:
    """Its first expert has the files of a shipped one."""
    first, *others = routed_model.library.adapters
    adapters = (replace(first, source=str(ASSETS / "experts" / "sql")), *others)
    library = replace(routed_model.library, adapters=adapters)
    routed_model.snapshot = replace(routed_model.snapshot, library=library)
    return routed_model


@pytest.fixture
def client(described_model: SpectrModel, serve: Serve) -> Client:
    return Client(serve(ui.build(described_model)), verbose=False)


def test_every_endpoint_is_typed_described_and_has_an_example_that_runs(client: Client) -> None:
    api: Any = client.view_api(return_format="dict", print_info=False)
    assert list(api["named_endpoints"]) == ["/compare", "/route", "/experts"]
    assert not api["unnamed_endpoints"]
    for name, endpoint in api["named_endpoints"].items():
        assert endpoint["description"].endswith(".")
        (result,) = endpoint["returns"]
        assert result["label"] == "result"
        assert result["python_type"]["type"].startswith("list[dict(")
        assert result["python_type"]["description"].startswith("For each ")
        for parameter in endpoint["parameters"]:
            assert parameter["label"] == parameter["parameter_name"]
            assert parameter["python_type"]["type"] in ("str", "int", "float", "list[str]")
            assert parameter["python_type"]["description"].endswith(".")
        arguments = [parameter["example_input"] for parameter in endpoint["parameters"]]
        assert client.predict(*arguments, api_name=name)
        assert "..." not in arguments


def test_compare(client: Client, described_model: SpectrModel) -> None:
    columns = ["base", "single:red", "spectr"]
    answers = client.predict("hello", columns, 8, api_name="/compare")
    assert [answer["label"] for answer in answers] == columns
    assert answers[0]["expert_share"] == {"red": 0, "green": 0, "blue": 0}
    expected = described_model.compare("hello", columns, max_new_tokens=8)
    assert [answer["text"] for answer in answers] == [c.text for c in expected.columns]
    sampled = {"temperature": 1.5, "seed": 3, "max_new_tokens": 8}
    drawn = client.predict("hello", ["spectr"], **sampled, api_name="/compare")
    assert drawn[0]["text"] == described_model.generate("hello", "spectr", **sampled)
    assert drawn[0]["text"] != answers[2]["text"]


def test_route_says_whom_each_request_is_for_and_why(
    client: Client, described_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_run(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("something is generated")

    monkeypatch.setattr(described_model, "stream", no_run)
    requests = client.predict(TWO, api_name="/route")
    assert requests == routed_requests(described_model, TWO)
    for request in requests:
        assert request["text"] in TWO
        assert {near["expert"] for near in request["nearest"]} == {"red", "green", "blue"}
        standings = [near["standing"] for near in request["nearest"]]
        assert standings == sorted(standings, reverse=True)
        assert request["standing"] == standings[0]
        is_sure = request["standing"] > request["threshold"]
        assert request["expert"] == (request["nearest"][0]["expert"] if is_sure else None)


def test_an_expert_that_stands_out_is_named(
    described_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = routed_requests(described_model, TWO)
    assert len(described_model.library.names) <= NUM_NEAREST
    monkeypatch.setattr(described_model.reader, "least_standing", lambda router: -100.0)
    sure = routed_requests(described_model, TWO)
    assert {request["threshold"] for request in sure} == {-100.0}
    assert all(request["expert"] == request["nearest"][0]["expert"] for request in sure)
    monkeypatch.setattr(described_model.reader, "least_standing", lambda router: 100.0)
    (unsure,) = routed_requests(described_model, TWO)
    assert unsure["expert"] is None
    assert unsure["text"] == TWO
    assert found[0]["nearest"]


def test_experts(client: Client) -> None:
    first, *others = client.predict(api_name="/experts")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert (first["name"], first["task"], first["rank"]) == ("red", "Question to SQL", [4, 4])
    assert sorted(first["modules"]) == sorted(modules)
    assert first["example"]["answer"].startswith("SELECT")
    assert [expert["name"] for expert in others] == ["green", "blue"]
    assert all(expert["task"] is expert["example"] is None for expert in others)


BAD = [
    ("/compare", ("", ["base"]), "the prompt is empty"),
    ("/compare", (None, ["base"]), "prompt is None: Input should be a valid string"),
    ("/compare", ("hello", ["spektr"]), "Did you mean 'spectr'"),
    ("/compare", ("hello", []), "has 0 columns; give 1 to 6"),
    ("/compare", ("hello", ["base"] * 7), "has 7 columns; give 1 to 6"),
    ("/compare", ("hello", "base"), "columns is 'base': Input should be a valid list"),
    ("/compare", ("hello", ["base"], 513), "up to 512"),
    ("/compare", ("hello", ["base"], 0), "max_new_tokens is 0"),
    ("/compare", ("hello", ["base"], "many"), "max_new_tokens is 'many'"),
    ("/compare", ("hello", ["base"], 3.7), r"max_new_tokens is 3\.7"),
    ("/compare", ("hello", ["base"], 8, -1), "temperature is -1"),
    ("/compare", ("hello", ["base"], 8, 0, -1), "seed is -1"),
    ("/compare", ("x" * 600, ["base"], 8), "the context of tiny is 512"),
    ("/route", ("",), "the prompt is empty"),
    ("/route", (["hello"],), "prompt is .*Input should be a valid string"),
    ("/route", ("x" * 600,), "the context of tiny is 512: shorten the prompt"),
]


def test_bad_input_is_one_clear_message(client: Client) -> None:
    for name, arguments, message in BAD:
        with pytest.raises(AppError, match=message) as caught:
            client.predict(*arguments, api_name=name)
        assert "\n" not in str(caught.value)


def test_a_run_that_breaks_is_a_message(
    client: Client, described_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(described_model, "stream", broken)
    with pytest.raises(AppError, match=r"the run broke off \(RuntimeError: out of memory\)"):
        client.predict("hello", ["base"], api_name="/compare")


def test_arguments_have_the_types_of_the_signature() -> None:
    @for_programs
    def double(number: int = 2) -> int:
        return 2 * number

    assert (double(), double(4), double(number=4)) == (4, 8, 8)
    assert list(inspect.signature(double).parameters) == ["number"]
    with pytest.raises(gr.Error, match="number is 'four'"):
        double("four")
    with pytest.raises(gr.Error, match="too many positional arguments"):
        double(1, 2)


def test_the_endpoints_are_mcp_tools(described_model: SpectrModel, serve: Serve) -> None:
    url = serve(ui.build(described_model)) + "gradio_api/mcp/"

    async def use() -> None:
        async with (
            streamable_http_client(url) as (read, write, *_),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = {tool.name: tool for tool in (await session.list_tools()).tools}
            assert list(tools) == ["compare", "route", "experts"]
            for tool in tools.values():
                assert ". Returns: For each " in (tool.description or "")
                for parameter in tool.inputSchema["properties"].values():
                    assert parameter["type"]
                    assert parameter["description"].endswith(".")
            assert tools["compare"].inputSchema["required"] == ["prompt", "columns"]

            async def call(name: str, **arguments: Any) -> Any:
                result = await session.call_tool(name, arguments)
                (content,) = result.content
                return result.isError, content.text  # type: ignore[union-attr]

            is_error, text = await call("route", prompt=TWO)
            assert not is_error
            assert ast.literal_eval(text) == routed_requests(described_model, TWO)
            is_error, text = await call(
                "compare", prompt="hello", columns=["spectr"], max_new_tokens=8
            )
            assert not is_error
            expected = described_model.generate("hello", "spectr", max_new_tokens=8)
            assert ast.literal_eval(text)[0]["text"] == expected
            _, text = await call("experts")
            assert [expert["name"] for expert in ast.literal_eval(text)] == ["red", "green", "blue"]
            is_error, text = await call("compare", prompt="hello", columns=["spektr"])
            assert is_error
            assert "Did you mean 'spectr'" in text

    anyio.run(use)
