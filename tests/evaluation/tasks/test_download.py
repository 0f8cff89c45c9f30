"""Data files from a server on this machine: fetched once, checked, and clear where they fail."""

import hashlib
import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest

from spectr_demo.evaluation.tasks.download import Archive, fetch

NAME = "words-1.0.tgz"
CONTENT = b"words and their answers"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The file that the server has."""
    path = tmp_path / "site" / NAME
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def url(published: Path) -> Iterator[str]:
    handler = partial(SimpleHTTPRequestHandler, directory=str(published.parent))
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/{NAME}"
        server.shutdown()
        thread.join()


@pytest.fixture
def dead_url() -> Iterator[str]:
    """An address where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/{NAME}"


def test_a_file_is_fetched_once(url: str, published: Path, cache_folder: Path) -> None:
    archive = Archive(url=url, sha256=SHA256)
    path = fetch(archive)
    assert path == cache_folder / "data" / NAME
    assert path.read_bytes() == CONTENT
    published.unlink()
    assert fetch(archive) == path


def test_a_file_put_there_by_hand_needs_no_network(dead_url: str, cache_folder: Path) -> None:
    path = cache_folder / "data" / NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert fetch(Archive(url=dead_url, sha256=SHA256)) == path


def test_a_spoiled_file_is_fetched_again(url: str, cache_folder: Path) -> None:
    path = cache_folder / "data" / NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:4])
    assert fetch(Archive(url=url, sha256=SHA256)).read_bytes() == CONTENT


def test_another_file_than_the_pinned_one_is_refused_and_not_kept(
    url: str, published: Path, cache_folder: Path
) -> None:
    published.write_bytes(b"something else")
    with pytest.raises(RuntimeError, match=rf"hash.*SHA-256 {SHA256}; download {url}.*put it into"):
        fetch(Archive(url=url, sha256=SHA256))
    assert not any((cache_folder / "data").iterdir())


def test_an_unreachable_host_is_one_error_that_says_what_to_do(
    dead_url: str, cache_folder: Path
) -> None:
    with pytest.raises(RuntimeError) as caught:
        fetch(Archive(url=dead_url, sha256=SHA256))
    message = str(caught.value)
    assert message.startswith(f"{NAME} could not be fetched")
    assert f"download {dead_url}" in message
    assert f"put it into {cache_folder / 'data'}" in message
    assert "\n" not in message


def test_a_file_that_is_gone_is_the_same_error(url: str, published: Path) -> None:
    published.unlink()
    with pytest.raises(RuntimeError, match=r"could not be fetched \(404 .*put it into"):
        fetch(Archive(url=url, sha256=SHA256))


def test_a_cache_that_cannot_be_written_is_the_same_error(url: str, cache_folder: Path) -> None:
    cache_folder.write_text("a file, not a folder")
    with pytest.raises(RuntimeError, match="set SPECTR_CACHE to a folder that can be written"):
        fetch(Archive(url=url, sha256=SHA256))


def test_an_error_without_words_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def retrieve(*_: object, **__: object) -> str:
        raise TimeoutError

    monkeypatch.setattr("pooch.retrieve", retrieve)
    with pytest.raises(RuntimeError, match=r"could not be fetched \(TimeoutError\)"):
        fetch(Archive(url=f"https://example.org/{NAME}", sha256=SHA256))
