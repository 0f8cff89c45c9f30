"""The door for zip files: who may send one, how many, how large, and what is told."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest

from spectr_demo import ui
from spectr_demo.engine.model import SpectrModel
from spectr_demo.ui import page as page_module
from spectr_demo.ui import uploads
from spectr_demo.ui.uploads import MOST_EACH, MOST_FILES, OWNER_HEADER, PATH, Uploads
from spectr_demo.ui.visitors import _is_here
from tests.ui.test_visitors import until

Serve = Callable[[gr.Blocks], str]
MOST = 300_000  # bytes, in the place of 200 MB


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SPECTR_UPLOADS", "SPECTR_OWNER_TOKEN", "SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(page_module, "MOST_ZIP_BYTES", MOST)


@pytest.fixture
def page(routed_model: SpectrModel) -> gr.Blocks:
    return ui.build(routed_model)


@pytest.fixture
def url(page: gr.Blocks, serve: Serve) -> str:
    return serve(page).rstrip("/") + PATH


def uploads_of(page: gr.Blocks) -> Uploads:
    looking: Any = next(fn.fn for fn in page.fns.values() if fn.name == "looking")
    return looking.__self__._uploads  # type: ignore[no-any-return]


def test_a_file_is_kept_without_a_name_and_taken_once(url: str, page: gr.Blocks) -> None:
    response = httpx.post(url, params={"name": "a\nb.zip"}, content=b"x" * 1000)
    assert response.status_code == 200
    assert list(response.json()) == ["ticket"] and len(response.text) < 60
    sent = uploads_of(page).take(response.json()["ticket"])
    assert sent is not None and sent.name == "a\\nb.zip"
    sent.file.seek(0)
    assert sent.file.read() == b"x" * 1000
    assert not isinstance(sent.file.name, str) or not Path(sent.file.name).exists()
    assert uploads_of(page).take(response.json()["ticket"]) is None


def test_a_file_is_bounded_also_where_it_names_no_length(url: str, page: gr.Blocks) -> None:
    pieces = (b"x" * 10_000 for _ in range(MOST // 10_000 + 2))
    for content in (b"x" * (MOST + 1), pieces):
        response = httpx.post(url, content=content)
        assert response.status_code == 413
        assert f"more than {MOST:,} bytes" in response.json()["detail"]
    assert not uploads_of(page)._files
    assert httpx.post(url, content=b"x" * MOST).status_code == 200


def test_other_bodies_stay_as_small_as_they_were(url: str) -> None:
    assert ui.page.MAX_BODY > MOST
    call = url.replace(PATH, "/gradio_api/call/compare")
    response = httpx.post(call, content=b"x" * (ui.page.MAX_BODY + 1))
    assert response.status_code == 413


def test_so_many_files_are_on_their_way(url: str, page: gr.Blocks) -> None:
    """Of one address, and of all."""

    def send(address: str) -> httpx.Response:
        return httpx.post(url, content=b"x", headers={"x-forwarded-for": address})

    first = [send("1.1.1.1") for _ in range(MOST_EACH)]
    refused = send("1.1.1.1")
    assert refused.status_code == 429
    assert "2 files of yours are being sent" in refused.json()["detail"]
    assert all(send(f"2.2.2.{i}").status_code == 200 for i in range(MOST_FILES - MOST_EACH))
    refused = send("3.3.3.3")
    assert (refused.status_code, refused.json()["detail"][:24]) == (429, "many files are being sen")
    uploads_of(page).take(first[0].json()["ticket"])
    assert send("1.1.1.1").status_code == 200


def test_one_that_nobody_takes_is_forgotten(url: str, page: gr.Blocks) -> None:
    found = uploads_of(page)
    for _ in range(MOST_EACH):
        httpx.post(url, content=b"x")
    found._clock = lambda: 1e9
    assert httpx.post(url, content=b"x").status_code == 200
    assert len(found._files) == 1


def test_one_that_breaks_off_leaves_nothing(url: str, page: gr.Blocks) -> None:
    goes_on = threading.Event()

    def pieces() -> Iterator[bytes]:
        yield b"x" * 1000
        assert goes_on.wait(20)
        raise RuntimeError("the client breaks off")

    def send() -> None:
        with pytest.raises(RuntimeError):
            httpx.post(url, content=pieces())

    client = threading.Thread(target=send)
    client.start()
    until(lambda: len(uploads_of(page)._files) == 1)
    goes_on.set()
    client.join()
    until(lambda: not uploads_of(page)._files)


def test_one_that_does_not_end_is_given_up(
    url: str, page: gr.Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "SECONDS", 0.5)
    goes_on = threading.Event()

    def pieces() -> Iterator[bytes]:
        yield b"x" * 1000
        goes_on.wait(10)

    found: list[httpx.Response] = []
    client = threading.Thread(
        target=lambda: found.append(httpx.post(url, content=pieces(), timeout=20))
    )
    client.start()
    until(lambda: len(uploads_of(page)._files) == 1)
    until(lambda: not uploads_of(page)._files)
    goes_on.set()
    client.join()


def test_with_uploads_off_only_the_owner_sends(
    routed_model: SpectrModel, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECTR_UPLOADS", "0")
    monkeypatch.setenv("SPECTR_OWNER_TOKEN", "s3cret%")
    url = serve(ui.build(routed_model)).rstrip("/") + PATH
    for headers in ({}, {OWNER_HEADER: "guess"}):
        response = httpx.post(url, content=b"x", headers=headers)
        assert response.status_code == 403
        assert "only the owner may send a file" in response.json()["detail"]
    response = httpx.post(url, content=b"x", headers={OWNER_HEADER: "s3cret%25"})
    assert response.status_code == 200


def test_where_nobody_may_send_there_is_no_door(
    routed_model: SpectrModel, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECTR_UPLOADS", "0")
    url = serve(ui.build(routed_model)).rstrip("/") + PATH
    assert httpx.post(url, content=b"x").status_code in (404, 405)


def test_gradios_own_door_stays_closed(url: str) -> None:
    files = {"files": ("a.zip", b"x")}
    response = httpx.post(url.replace(PATH, "/gradio_api/upload"), files=files)
    assert response.status_code == 404


@pytest.mark.parametrize(
    ("headers", "client", "expected"),
    [
        ({"host": "127.0.0.1:7860"}, ("127.0.0.1", 1), True),
        ({"host": "localhost"}, ("127.0.0.1", 1), True),
        ({"host": "[::1]:7860"}, ("::1", 1), True),
        ({"host": "evil.example:7860"}, ("127.0.0.1", 1), False),  # a name that leads here
        ({"host": "127.0.0.1:7860"}, ("10.0.0.7", 1), False),
        ({"host": "127.0.0.1:7860", "x-forwarded-for": "9.9.9.9"}, ("127.0.0.1", 1), False),
        ({"host": "127.0.0.1:7860", "via": "1.1 proxy"}, ("127.0.0.1", 1), False),
        ({}, ("127.0.0.1", 1), False),
        ({"host": "127.0.0.1"}, None, False),
    ],
)
def test_who_is_on_this_machine(headers: dict[str, str], client: Any, expected: bool) -> None:
    assert _is_here(headers, client) is expected
