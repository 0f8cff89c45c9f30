"""Measure the start of the demo on the embedded default: the first one, and later ones.

    python benchmarks/startup.py [--runs 3] [--json startup.json]

The first start has an empty cache folder and fetches the base with pip. Every start is a process of
its own. `page`: from the start of `python app.py` to its page being served. `import` and `load`:
the library's import and `load_base()`, in wall time and in CPU time, which a busy machine stretches
less.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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


def seconds_to_page(environment: dict[str, str]) -> float:
    """From starting the demo's process to the first answer of its page."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.perf_counter()
    app = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=ROOT,
        env=environment | {"GRADIO_SERVER_PORT": str(port)},
        stdout=subprocess.DEVNULL,
    )
    try:
        while app.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10).read()
                return time.perf_counter() - started
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.05)
        raise RuntimeError(
            f"app.py ended with exit code {app.returncode} before it served its page"
        )
    finally:
        app.terminate()
        app.wait()


def start(cache: Path) -> dict[str, float | str]:
    environment = {**os.environ, "SPECTR_CACHE": str(cache)}
    environment.pop("SPECTR_BASE_MODEL", None)
    page = seconds_to_page(environment)
    probe = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE
    )
    return {"page_s": page, **json.loads(probe.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3, help="later starts to measure")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        rows = [start(Path(cache)) for _ in range(1 + options.runs)]
    # The first row's page includes the fetch; its import and load already find the cache filled.
    columns = ["page_s", "import_s", "load_s", "import_cpu_s", "load_cpu_s"]
    print("       ", *(f"{column:>12}" for column in columns))
    for i, row in enumerate(rows):
        print("later  " if i else "first  ", *(f"{row[column]:12.1f}" for column in columns))
    print(f"{rows[0]['quantization']}, {rows[0]['device']}, {os.cpu_count()} CPU cores")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
