"""Adapters on the Hub: sizes first, then the files of that commit."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from spectr_demo.experts import hub
from spectr_demo.experts.adapters import read_adapter
from spectr_demo.experts.messages import AdapterError
from tests.conftest import SaveExpert

CONFIG, WEIGHTS = hub.CONFIG_FILE, hub.WEIGHTS_FILE


class FakeHub:
    """One repository; what is fetched is counted."""

    def __init__(self, folder: str, **sizes: int | None) -> None:
        self.folder, self.fetched = folder, []  # type: ignore[var-annotated]
        self.sizes = {CONFIG: 1000, WEIGHTS: 100_000} | sizes
        self.error: Exception | None = None

    def model_info(self, repo: str, **options: Any) -> Any:
        assert options["files_metadata"]
        if self.error:
            raise self.error
        files = [SimpleNamespace(rfilename=name, size=size) for name, size in self.sizes.items()]
        return SimpleNamespace(sha="abc", siblings=files)

    def download(self, repo: str, **options: Any) -> str:
        self.fetched.append((repo, options["revision"], options["local_files_only"]))
        return self.folder


@pytest.fixture
def there(save_expert: SaveExpert, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(save_expert("theirs", seed=4))
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub, "snapshot_download", fake.download)
    return fake


def test_the_files_are_those_of_the_commit_whose_sizes_were_told(there: FakeHub) -> None:
    adapter = read_adapter("someone/theirs")
    assert adapter.sha256 == read_adapter(there.folder).sha256
    assert there.fetched == [("someone/theirs", "abc", False)]


@pytest.mark.parametrize(
    ("file", "size", "message"),
    [
        (WEIGHTS, 10**13, f"someone/theirs: {WEIGHTS} has 10,000,000,000,000 bytes, at most"),
        (CONFIG, 4_000_001, f"{CONFIG} has 4,000,001 bytes, at most 4,000,000 are fetched"),
        (WEIGHTS, None, f"{WEIGHTS} has an unknown number of bytes"),
    ],
)
def test_what_is_too_large_is_not_fetched(
    there: FakeHub, file: str, size: int | None, message: str
) -> None:
    there.sizes[file] = size
    with pytest.raises(AdapterError, match=message):
        read_adapter("someone/theirs")
    assert there.fetched == []


def test_other_files_may_be_of_any_size(there: FakeHub) -> None:
    there.sizes["model.safetensors"] = 10**13
    assert read_adapter("someone/theirs").name == "theirs"


def test_without_the_network_only_the_cache_is_looked_at(there: FakeHub) -> None:
    there.error = RuntimeError("no route")
    read_adapter("someone/theirs")
    assert there.fetched == [("someone/theirs", None, True)]


def test_what_the_hub_does_not_have_is_not_fetched(there: FakeHub) -> None:
    there.error = RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="the Hub did not give it"):
        read_adapter("someone/theirs")
    assert there.fetched == []


def test_a_folder_in_a_repository(there: FakeHub, tmp_path: Path) -> None:
    inner = tmp_path / "sub"
    inner.symlink_to(there.folder)
    there.folder = str(tmp_path)
    there.sizes = {f"sub/{CONFIG}": 1000, f"sub/{WEIGHTS}": 10**13}
    with pytest.raises(AdapterError, match=f"sub/{WEIGHTS} has"):
        read_adapter("someone/theirs/sub")
    there.sizes = {f"sub/{CONFIG}": 1000, f"sub/{WEIGHTS}": 10**5}
    assert read_adapter("someone/theirs/sub").name == "sub"
