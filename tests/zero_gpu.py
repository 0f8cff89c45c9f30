"""ZeroGPU without a GPU: the real `spaces` package, in a process of its own.

    python -m tests.zero_gpu (app | rules)

`app` takes the base and the experts from the environment, as a Space does; without any it is the
Space as shipped (minutes on a CPU, so the test gives it a tiny base).

Real are its decorator, its client, the worker that is forked for a GPU call, the queues that pickle
what goes in and out, and its stand-in for CUDA outside of a GPU call. Replaced are the device API
(here a server that always grants), the move of tensors to a GPU (they stay where they are), and
bitsandbytes' CUDA kernels (its CPU kernels are there before `spaces` claims that there is CUDA).
One rule is made stricter: nothing of torch may be pickled, which shared memory would let through.

Prints one JSON document as the last line of stdout; `tests/test_zero_gpu.py` reads it.
"""

import inspect
import io
import json
import os
import pickle
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

REQUESTS: list[str] = []


class _DeviceAPI(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        REQUESTS.append(self.path)
        grant = {"idle": True, "nvidiaIndex": 0, "nvidiaUUID": "GPU-0", "allowToken": "token"}
        body = json.dumps(grant).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def durations() -> list[int]:
    """The seconds asked for, one for each GPU call so far."""
    queries = [parse_qs(urlsplit(path).query) for path in REQUESTS if path.startswith("/schedule")]
    return [int(query["durationSeconds"][0]) for query in queries]


class _NoTorch(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "torch":
            raise pickle.PicklingError(f"{module}.{name} would cross the border of a GPU call")
        return super().find_class(module, name)


def emulate() -> None:
    """Import `spaces` as on a ZeroGPU Space. Nothing that imports it may be imported before."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _DeviceAPI)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    folder = Path(tempfile.mkdtemp())
    (folder / "cgroup").write_text("0::/space\n")
    os.environ |= {
        "SPACES_ZERO_GPU": "true",
        "SPACES_ZERO_DEVICE_API_URL": f"http://127.0.0.1:{server.server_port}",
        "ZEROGPU_PROC_SELF_CGROUP_PATH": str(folder / "cgroup"),
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    import bitsandbytes  # noqa: F401
    import torch

    if torch.version.cuda is None:  # a CPU build lacks what `spaces` replaces
        torch.version.cuda = "12.8"
        torch._C._cuda_init = None  # type: ignore[attr-defined]
        torch.cuda._is_in_bad_fork = bool

    import spaces.utils
    import spaces.zero.torch
    from spaces.zero.torch import patching

    def move(callback: Any = None) -> None:
        for fake, original in patching.cuda_aliases.items():
            fake.data = original

    worker_side: Any = spaces.zero.torch
    worker_side.pack = worker_side.size = lambda: 0
    worker_side.init = lambda nvidia_uuid: None
    worker_side.move = move

    put = spaces.utils.SimpleQueue.put

    def strict_put(queue: Any, item: Any) -> None:
        try:
            pickled = pickle.dumps(item)
        except TypeError as error:
            raise pickle.PicklingError(str(error)) from error
        _NoTorch(io.BytesIO(pickled)).load()
        put(queue, item)

    spaces.utils.SimpleQueue.put = strict_put


def app() -> dict[str, Any]:
    """Build the page from the environment, serve it, and run it through both of its doors."""
    emulate()
    import torch
    from gradio_client import Client
    from spaces.zero import decorator
    from torch.nn.modules.module import register_module_forward_pre_hook

    import app as entry_point
    from spectr_demo import ui

    num_forwards, meta = 0, torch.device("meta")

    def count(module: Any, inputs: Any) -> None:
        nonlocal num_forwards
        # A model without weights may be run: nothing is computed on "meta".
        num_forwards += any(getattr(x, "device", None) not in (None, meta) for x in inputs)

    hook = register_module_forward_pre_hook(count)
    page = entry_point.build([])
    hook.remove()
    found: dict[str, Any] = {
        "forwards_at_start": num_forwards,
        "cuda_at_start": torch.cuda.is_initialized(),
        "gpu_functions": len(set(decorator.decorated_cache.values())),
        "are_generators": all(map(inspect.isgeneratorfunction, decorator.decorated_cache)),
    }
    runner: Any = next(fn.fn for fn in page.fns.values() if fn.name == "run")
    model = runner.__self__.model
    found["device"], found["quantization"] = str(model.model.device), model.base.quantization
    found["banks"] = len(model.library.banks)

    _, url, _ = page.launch(**ui.launch_options(), prevent_thread_lock=True, quiet=True)
    client = Client(url, verbose=False)
    expert = model.library.names[0]
    columns = ["base", f"single:{expert}", "spectr-context"]
    found["answer"] = client.predict("hello", columns, 20, api_name="/compare")
    found["seconds_of_the_endpoint"] = durations()
    del REQUESTS[:]
    found["requests"] = client.predict("hello", api_name="/route")
    found["seconds_of_reading"] = durations()
    try:
        client.predict("x" * 15 * model.base.context, columns, 20, api_name="/compare")
    except Exception as error:
        found["error"] = str(error)

    del REQUESTS[:]
    look: Any = next(fn.fn for fn in page.fns.values() if fn.name == "read")
    *_, shown = look("hello", 0, model.library.projections[0])
    found["parts_of_the_look"] = len(shown)
    found["seconds_of_the_look"] = durations()

    del REQUESTS[:]
    evaluate: Any = next(fn.fn for fn in page.fns.values() if fn.name == "evaluate")
    *_, shown, _ = evaluate(["cron"], ["base", "spectr-context"], 1)
    found["evaluation"] = next(iter(shown.values()))
    found["seconds_of_an_evaluated_prompt"] = durations()

    del REQUESTS[:]
    choices = {
        "prompt": "hello",
        "columns": ["base", "spectr-context"],
        "expert": expert,
        "top_k": 0,
        "weighting": "",
        "composition": "",
        "router_temperature": 0,
        "temperature": 0.0,
        "max_new_tokens": 50,
        "seed": 0,
    }
    *_, last = runner(None, **choices)
    found["seconds_of_the_page"] = durations()
    found["page"] = last[runner.__self__.layout.answers]
    with closing(runner(None, **choices)) as left:
        for _ in range(3):  # a visitor who leaves after the first words
            next(left)
    *_, last = runner(None, **choices)
    found["page_after_a_visitor_left"] = last[runner.__self__.layout.answers]
    page.close()
    return found


def rules() -> dict[str, str]:
    """What becomes of GPU functions that break a rule; "" where nothing does."""
    emulate()
    import numpy as np
    import spaces
    import torch

    def fine(x: Any) -> Iterator[Any]:
        yield {"x": np.zeros(2, np.float32)}

    def yields_a_tensor(x: Any) -> Iterator[Any]:
        yield [{"x": torch.zeros(2)}]

    async def is_async(x: Any) -> AsyncIterator[Any]:
        yield 0

    def initialises_cuda(x: Any) -> list[Any]:
        torch.cuda.init()
        return []

    def outcome(function: Callable[..., Any], x: Any = 0) -> str:
        try:
            list(function(x))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    return {
        "fine": outcome(spaces.GPU(fine)),
        "a tensor in the results": outcome(spaces.GPU(yields_a_tensor)),
        "a tensor in the arguments": outcome(spaces.GPU(fine), torch.zeros(2)),
        "an async generator": outcome(spaces.GPU(is_async)),
        "CUDA outside of a GPU call": outcome(initialises_cuda),
    }


if __name__ == "__main__":
    print(json.dumps({"app": app, "rules": rules}[sys.argv[1]]()))
