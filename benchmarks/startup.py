"""Measure the start of the embedded default: the first one, which fetches it, and a later one.

    python benchmarks/startup.py [--runs 3] [--json startup.json]

Each start is a process of its own: seconds of wall time, and of CPU time, which a busy machine
stretches less. The first start has an empty cache folder and fetches the base with pip.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PROBE = """
import json, time
from time import perf_counter, process_time
start = perf_counter(), process_time()
from spectr_demo.loading import load_base
imported = perf_counter(), process_time()
base = load_base()
loaded = perf_counter(), process_time()
print(json.dumps({
    "import_s": imported[0] - start[0], "load_s": loaded[0] - imported[0],
    "import_cpu_s": imported[1] - start[1], "load_cpu_s": loaded[1] - imported[1],
    "quantization": base.quantization, "device": str(base.device),
}))
"""


def start(cache: Path) -> dict[str, float | str]:
    environment = {**os.environ, "SPECTR_CACHE": str(cache)}
    environment.pop("SPECTR_BASE_MODEL", None)
    probe = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, check=True, stdout=subprocess.PIPE
    )
    return json.loads(probe.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="later starts to measure")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        rows = [start(Path(cache)) for _ in range(1 + options.runs)]
    columns = ["import_s", "load_s", "import_cpu_s", "load_cpu_s"]
    print("       ", *(f"{column:>12}" for column in columns))
    for i, row in enumerate(rows):
        print("later  " if i else "first  ", *(f"{row[column]:12.1f}" for column in columns))
    print(f"{rows[0]['quantization']}, {rows[0]['device']}, {os.cpu_count()} CPU cores")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
