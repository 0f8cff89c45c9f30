"""Aligning an adapter against reading it from disk, for several ranks.

    python benchmarks/alignment.py [--quick] [--json FILE]

`read` is safetensors' own reading of the file into memory, `read and check` this project's.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from safetensors.torch import load

from benchmarks.common import arguments, expert_folders, report, rows, seconds
from spectr_demo.experts.adapters import WEIGHTS_FILE, read_adapter
from spectr_demo.experts.library import align_adapter, align_in_groups


def cases(source: str, cache: Path) -> dict[str, Callable[[], object]]:
    file, adapter = Path(source) / WEIGHTS_FILE, read_adapter(source)
    factors = adapter.read()
    adapter = replace(adapter, read=lambda: factors)

    def first_time() -> None:
        for cached in (cache / "aligned").glob("*"):
            cached.unlink()
        align_adapter(adapter)

    return {
        "read": lambda: load(file.read_bytes()),
        "read and check": lambda: read_adapter(source),
        "align": lambda: align_in_groups(adapter),
        "align and cache": first_time,
        "from the cache": lambda: align_adapter(adapter),
    }


def main() -> None:
    options = arguments(__doc__)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SPECTR_CACHE"] = folder
        for rank in (8,) if options.quick else (4, 8, 16, 64):
            (source,) = expert_folders(1, Path(folder), rank)
            times = seconds(cases(source, Path(folder)), 3 if options.quick else 25)
            results += rows(times, "read", rank=rank)
    report("python benchmarks/alignment.py", results, options.json)


if __name__ == "__main__":
    main()
