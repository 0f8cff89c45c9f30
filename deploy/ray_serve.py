"""The page and OpenAI's API before several replicas of the engine, with Ray Serve.

    python deploy/ray_serve.py [--replicas N] [--most-replicas M]

docs/operations.md says what to set and what to watch.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from spectr_demo import serving, ui
from spectr_demo.replicas import APP, RUNS_EACH, replicated
from spectr_demo.workers import connected, share


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of Serve's deployment: how many replicas there are, and what each has."""
    least = arguments.replicas
    most = max(least, arguments.most_replicas or 0)
    own = share(most)
    for name in own:
        if (asked := getattr(arguments, name)) is not None:
            own[name] = asked
    if most == least:
        return {"ray_actor_options": own, "num_replicas": least}
    # Counted are runs that go on in a replica or wait for a place in one.
    bounds = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": RUNS_EACH}
    return {"ray_actor_options": own, "autoscaling_config": bounds}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", help="Hub id or folder (SPECTR_BASE_MODEL; the embedded default)")
    parser.add_argument(
        "--experts",
        nargs="+",
        metavar="[NAME=]SOURCE",
        help="Hub ids or folders of LoRA adapters (SPECTR_EXPERTS; those of assets/experts)",
    )
    parser.add_argument("--replicas", type=int, default=2, help="of the engine, at least")
    parser.add_argument(
        "--most-replicas", type=int, help="while runs wait (default: as many as --replicas)"
    )
    parser.add_argument(
        "--num-cpus", type=int, help="of a replica (default: its share of this machine's)"
    )
    parser.add_argument(
        "--num-gpus",
        type=float,
        help="of a replica; 0.5: two of them share one (default: its share of this machine's)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="of the API; 0.0.0.0: all addresses")
    parser.add_argument("--port", type=int, default=8000, help="of the API (default: 8000)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until a signal ends it. The page is where `GRADIO_SERVER_NAME` and `_PORT` say."""
    arguments = _parser().parse_args(argv)
    most = max(arguments.replicas, arguments.most_replicas or 0)
    with serving.bound(arguments.host, arguments.port) as listener, connected(most):
        from ray import serve

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has set one of its own
        try:
            model = replicated(arguments.base, arguments.experts, **_options(arguments))
            page, api = ui.build(model), serving.build(model)
            page.launch(**ui.launch_options(), prevent_thread_lock=True)
            host, port = listener.getsockname()[:2]
            address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
            print(f"OpenAI's API is at {address}", flush=True)
            serving.run(api, listener)
        finally:
            serve.delete(APP, _blocking=False)  # the runs of this process are over


if __name__ == "__main__":
    try:
        with suppress(KeyboardInterrupt):
            main()
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(str(error))
    sys.stdout.flush()
    os._exit(0)  # answers that are being written are not waited for
