"""Results of parts of an evaluation, kept in the cache.

An interrupted evaluation goes on where it was. A change of the base, of the experts or of the code
that decides a number starts anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spectr_demo.base.files import keep_json, kept_json, named_for
from spectr_demo.base.generic import generic_prompts
from spectr_demo.config import RouterConfig, cache_dir
from spectr_demo.engine.model import SpectrModel

ORDINARY = Path(__file__).with_name("ordinary.json")
_PACKAGE = Path(__file__).resolve().parents[1]
# Imports go one way, so no room above `evaluation` decides a number: an edit of the page, of the
# charts or of the training leaves hours of results alone. Nor do the files that test what the parts
# say and put it into words. A test follows the imports, and fails where another file is not here.
_ROOMS = ["config.py", "trace", "cpu", "routing", "base", "gpu", "experts", "engine", "evaluation"]
_AFTERWARDS = ("evaluation/claims.py", "evaluation/findings.py", "evaluation/report.py")


def code_files() -> list[Path]:
    """The files of this package that decide a number of the results."""
    afterwards = [_PACKAGE / name for name in _AFTERWARDS]
    files = [file for room in _ROOMS for file in _files(_PACKAGE / room)]
    return [file for file in files if file not in afterwards]


def _files(room: Path) -> list[Path]:
    return [room] if room.suffix else sorted(room.rglob("*.py"))


def fingerprint(engine: SpectrModel) -> str:
    """16 hex digits: of all that the results depend on but the settings."""
    base = engine.base
    parts = [base.fingerprint, base.quantization, str(base.compute_dtype)]
    parts += [f"{a.name} {a.sha256}" for a in engine.library.adapters]
    parts += generic_prompts(base)
    files = [*code_files(), ORDINARY]
    parts += [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


class Parts:
    """The parts of one engine's evaluations: plain JSON values, one file each."""

    def __init__(self, engine: SpectrModel) -> None:
        self.folder = cache_dir() / "evaluation" / fingerprint(engine)
        self.found: dict[str, Any] = {}  # by file: all that `get` gave

    def get(
        self,
        kind: str,
        config: RouterConfig,
        compute: Callable[[RouterConfig], Any],
        *of: str | int,
    ) -> Any:
        """What `compute(config)` gives, from the cache where this very part was measured before.

        of: what else the part depends on.
        """
        file = named_for([kind, *of, config.to_json()], self.folder, ".json")
        result = kept_json(file)
        if result is None:
            result = compute(config)
            keep_json(result, file)  # two processes may share the work
        self.found[file.name] = result
        return result

    def keep(self, found: Mapping[str, Any]) -> None:
        """Parts that another process found, whose cache may be another one."""
        for name, result in found.items():
            if kept_json(self.folder / name) is None:
                keep_json(result, self.folder / name)
