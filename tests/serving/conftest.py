"""The API of a tiny model, on a real port of this machine."""

import threading
from collections.abc import Callable, Iterator

import openai
import pytest
import uvicorn

from spectr_demo import serving
from spectr_demo.engine.model import SpectrModel

ServeModel = Callable[[SpectrModel], openai.OpenAI]


@pytest.fixture
def serve_model() -> Iterator[ServeModel]:
    """A function that serves a model and returns a client of it."""
    ends: list[Callable[[], None]] = []

    def serve(model: SpectrModel) -> openai.OpenAI:
        listener = serving.bound("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(serving.build(model), log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],))
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1",
            api_key="none",
            max_retries=0,
        )

        def end() -> None:
            client.close()
            server.should_exit = True
            thread.join()
            listener.close()

        ends.append(end)
        thread.start()
        while not server.started:
            assert thread.is_alive()
        return client

    yield serve
    for end in ends:
        end()


@pytest.fixture
def client(serve_model: ServeModel, routed_model: SpectrModel) -> openai.OpenAI:
    return serve_model(routed_model)
