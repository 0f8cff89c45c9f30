"""From the start of a process to the demo's page and to a first answer, on the embedded default.

    python benchmarks/startup.py [--quick] [--json FILE]

Every start is a process of its own. The first one has an empty cache: it fetches the base with pip,
quantizes it, aligns the experts and compiles the loops of a token. `page_s`: from the start of
`python app.py` to its page being served. `answer_s`: from the start of another process to the first
token of an answer by `spectr-context`, of which importing the library takes `import_s`, loading the
base `base_s`, loading the experts `experts_s`, calibrating them on generic text `calibrate_s`, and
then the prompt `token_s`. What the page's process has cached, the first row's answer already finds.
"""

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
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from benchmarks.common import PROMPT, arguments, report
from spectr_demo.base.loading import load_base

ROOT = Path(__file__).resolve().parent.parent
PROBE = f"""
import json, time
clock = [time.perf_counter()]
lap = lambda: clock.append(time.perf_counter())
import spectr_demo as sd
from spectr_demo.config import shipped_experts
from spectr_demo.experts.library import load_experts
from spectr_demo.base.loading import load_base
lap()
base = load_base()
lap()
model = sd.SpectrModel(base, load_experts(shipped_experts(), base.model))
lap()
model.calibration
lap()
model.generate({PROMPT!r}, max_new_tokens=1)
lap()
names = ("import_s", "base_s", "experts_s", "calibrate_s", "token_s")
print(json.dumps(dict(zip(names, [b - a for a, b in zip(clock, clock[1:])]))))
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


def seconds_to_answer(environment: dict[str, str]) -> dict[str, float]:
    started = time.perf_counter()
    command = [sys.executable, "-c", PROBE]
    probe = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)
    assert probe.stdout is not None
    printed = probe.stdout.readline()
    answered = time.perf_counter() - started
    if probe.wait():
        raise RuntimeError(f"the answering process ended with exit code {probe.returncode}")
    return {"answer_s": answered, **json.loads(printed)}


def start(case: str, cache: str) -> dict[str, Any]:
    numba_cache = str(Path(cache) / "compiled")
    environment = {**os.environ, "SPECTR_CACHE": cache, "NUMBA_CACHE_DIR": numba_cache}
    environment.pop("SPECTR_BASE_MODEL", None)
    page = seconds_to_page(environment)
    return {"case": case, "page_s": page, **seconds_to_answer(environment)}


def main() -> None:
    options = arguments(__doc__)
    with tempfile.TemporaryDirectory() as cache:
        starts = ["first", *["later"] * (1 if options.quick else 3)]
        rows = [start(case, cache) for case in starts]
    report("python benchmarks/startup.py", rows, options.json, load_base(None))


if __name__ == "__main__":
    main()
