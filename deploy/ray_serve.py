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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from spectr_demo import serving, ui
from spectr_demo.arguments import add_model_options
from spectr_demo.replicas import APP, replicated
from spectr_demo.workers import connected, share


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_model_options(parser)
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
    least, most = arguments.replicas, max(arguments.replicas, arguments.most_replicas or 0)
    asked = {"num_cpus": arguments.num_cpus, "num_gpus": arguments.num_gpus}
    resources = share(most) | {name: num for name, num in asked.items() if num is not None}
    with serving.bound(arguments.host, arguments.port) as listener, connected(most):
        from ray import serve

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has set one of its own
        try:
            model = replicated(
                arguments.base, arguments.experts, least=least, most=most, resources=resources
            )
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
