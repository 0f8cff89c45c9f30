"""Rehearse the Space before it is pushed: build its tree, install it, start it, ask it.

    python scripts/space_check.py [--skip-pre-requirements] [--python python3.12] [--json]

The tree is what `HEAD` holds, without uncommitted changes. It is installed as a Space installs it:
pip sees pre-requirements.txt and requirements.txt alone, not the rest of the tree, and adds
gradio's extras and `spaces`. Then `python app.py` is started with a Space's variables, an empty
home folder and an empty cache, and asked one shipped example through gradio_client, twice.

Reports the size of the tree, the times, and the peak memory; anything that fails is one message and
exit status 1. Needs only Python's standard library.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILE_BYTES = 10_000_000  # above it, the Hub takes a file only through LFS or Xet
START_SECONDS = 900  # a Space has 30 minutes
LOG_LINES = 15
# Columns that every library of experts has, and one of the page's own examples.
COLUMNS = ["base", "uniform", "spectr-context"]
PROMPT = "Translate to a SQL query: how many books are there for each genre?"
ASK = """
import json, sys
from gradio_client import Client
url, prompt, columns = sys.argv[1], sys.argv[2], sys.argv[3:]
client = Client(url, verbose=False)
print(json.dumps(client.predict(prompt, columns, 32, api_name="/compare")))
"""
# Of the caller's environment, a Space's process gets what reaches the network, and nothing else.
INHERITED = re.compile(r"PATH|LANG|PIP_\w+|SSL_\w+|REQUESTS_CA_BUNDLE|\w+_proxy", re.IGNORECASE)


class SpaceError(RuntimeError):
    """The Space would not build, start or answer; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Tree:
    """The files of the Space, in a folder of their own."""

    folder: Path
    num_files: int
    num_bytes: int
    largest: tuple[str, int]  # path and bytes


def export(folder: Path, revision: str = "HEAD") -> Tree:
    """Write the files of a commit to `folder`. Raises SpaceError for those that the Hub refuses."""
    archive = subprocess.run(
        ["git", "archive", revision], cwd=ROOT, capture_output=True, check=True
    ).stdout
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return measure(folder)


def measure(folder: Path) -> Tree:
    sizes = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    if too_big := [
        f"{name} ({size / 1e6:.1f} MB)" for name, size in sizes.items() if size > FILE_BYTES
    ]:
        raise SpaceError(
            f"files over {FILE_BYTES / 1e6:.0f} MB, which need LFS or Xet on the Hub: "
            f"{', '.join(too_big)}"
        )
    return Tree(
        folder=folder,
        num_files=len(sizes),
        num_bytes=sum(sizes.values()),
        largest=max(sizes.items(), key=lambda item: item[1]),
    )


def setting(folder: Path, key: str) -> str:
    """One plain value of the README's front matter."""
    front = (folder / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    found = re.search(rf'^{key}: *"?([^"\n]+)"?$', front, flags=re.M)
    if found is None:
        raise SpaceError(f"README.md: its front matter has no {key}")
    return found[1]


def choose_python(wanted: str) -> str:
    """An interpreter of this version (3.12.12: any 3.12), else the one that runs this script."""
    name = "python" + ".".join(wanted.split(".")[:2])
    try:
        subprocess.run([name, "--version"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return sys.executable
    return name


def install(tree: Path, environment: Path, python: str, *, pre_requirements: bool) -> None:
    """Make a virtual environment and install the Space's requirements in a Space's order."""
    run("the virtual environment", [python, "-m", "venv", str(environment)])
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    extras = [
        f"gradio[oauth,mcp]=={setting(tree, 'sdk_version')}",
        *("uvicorn>=0.14.0", "websockets>=10.4", "spaces"),
    ]
    steps = {"pre-requirements.txt": []} if pre_requirements else {}
    for name, more in (steps | {"requirements.txt": extras}).items():
        # The builder mounts this one file, so it must not refer to another.
        with tempfile.TemporaryDirectory() as alone:
            file = Path(alone, name)
            file.write_bytes((tree / name).read_bytes())
            run(name, [*pip, "-r", str(file), *more])


def run(what: str, command: Sequence[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SpaceError(f"{what} could not be installed:\n{last_lines(done.stdout)}")


def last_lines(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-LOG_LINES:])


def space_variables(tree: Path, home: Path, port: int) -> dict[str, str]:
    """The environment of a Space's process, its own variables apart."""
    inherited = {key: value for key, value in os.environ.items() if INHERITED.fullmatch(key)}
    return inherited | {
        "HOME": str(home),
        "PYTHONPATH": str(tree),
        "PYTHONUNBUFFERED": "1",
        "SYSTEM": "spaces",
        "SPACE_ID": "you/spectr-demo",
        "SPACE_AUTHOR_NAME": "you",
        "SPACE_REPO_NAME": "spectr-demo",
        "SPACE_TITLE": setting(tree, "title"),
        "SPACE_HOST": "you-spectr-demo.hf.space",
        "GRADIO_ALLOW_FLAGGING": "never",
        "GRADIO_NUM_PORTS": "1",
        "GRADIO_SERVER_NAME": "0.0.0.0",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_THEME": "huggingface",
        "TQDM_POSITION": "-1",
        "TQDM_MININTERVAL": "1",
    }


@contextmanager
def started(
    tree: Path, python: str, home: Path, port: int, variables: dict[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """The app once its page is served, and the seconds that took; stopped at the end."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise SpaceError(f"port {port} is in use; stop what listens there, or give --port")
    log = home / "space.log"
    begin = time.perf_counter()
    with log.open("wb") as sink:
        app = subprocess.Popen(
            [python, setting(tree, "app_file")],
            cwd=tree,
            env=space_variables(tree, home, port) | variables,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it starts ends with it
        )
    try:
        while not is_served(port):
            seconds = time.perf_counter() - begin
            if app.poll() is not None or seconds > START_SECONDS:
                ended = f"ended with exit status {app.returncode}"
                what = ended if app.returncode is not None else f"served nothing in {seconds:.0f} s"
                text = log.read_text(encoding="utf-8", errors="replace")
                raise SpaceError(f"the app {what}; the end of its log:\n{last_lines(text)}")
            time.sleep(0.1)
        yield app, time.perf_counter() - begin
    finally:
        for end in (signal.SIGTERM, signal.SIGKILL):
            if app.poll() is None:
                os.killpg(app.pid, end)
                try:
                    app.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    continue


def is_served(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10).read()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True


def ask(python: str, port: int) -> float:
    """Run the example through gradio_client; the seconds it took, with the client's own start."""
    begin = time.perf_counter()
    done = subprocess.run(
        [python, "-c", ASK, f"http://127.0.0.1:{port}", PROMPT, *COLUMNS],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SpaceError(f"/compare did not answer:\n{last_lines(done.stderr)}")
    check_answer(json.loads(done.stdout))
    return time.perf_counter() - begin


def check_answer(answer: list[dict[str, Any]]) -> None:
    labels = [column["label"] for column in answer]
    if labels != COLUMNS:
        raise SpaceError(f"/compare answered with the columns {labels}; {COLUMNS} were asked for")
    if empty := [column["label"] for column in answer if not column["text"].strip()]:
        raise SpaceError(f"/compare answered with no text in {', '.join(empty)}")


def peak_memory(pid: int) -> int | None:
    """The most bytes the process ever held (VmHWM); None where the system does not say."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status, flags=re.M)
    return int(found[1]) * 1024 if found else None


def installed_version(python: str, package: str) -> str:
    code = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
    done = subprocess.run([python, "-c", code, package], capture_output=True, text=True)
    return done.stdout.strip() or "none"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def check(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    tree = export(folder / "tree")
    wanted = setting(tree.folder, "python_version")
    say(f"{tree.num_files} files, {tree.num_bytes / 1e6:.1f} MB")
    begin = time.perf_counter()
    if options.current:
        python = sys.executable
    else:
        environment = folder / "environment"
        made_with = options.python or choose_python(wanted)
        say(f"installing with {made_with} ...")
        install(
            tree.folder,
            environment,
            made_with,
            pre_requirements=not options.skip_pre_requirements,
        )
        python = str(environment / "bin" / "python")
    install_seconds = None if options.current else round(time.perf_counter() - begin, 1)
    home = folder / "home"
    home.mkdir()
    variables = dict(pair.split("=", 1) for pair in options.variable)
    say("starting app.py ...")
    with started(tree.folder, python, home, options.port, variables) as (app, start_seconds):
        say("asking ...")
        answer_seconds = [round(ask(python, options.port), 1) for _ in range(2)]
        peak = peak_memory(app.pid)
    version = subprocess.run([python, "--version"], capture_output=True, text=True).stdout
    has_pin = not (options.current or options.skip_pre_requirements)
    return {
        "files": tree.num_files,
        "megabytes": round(tree.num_bytes / 1e6, 1),
        "largest": f"{tree.largest[0]} ({tree.largest[1] / 1e6:.1f} MB)",
        "python": f"{version.split()[-1]} (the Space has {wanted})",
        "torch": f"{installed_version(python, 'torch')} "
        + ("(pre-requirements.txt)" if has_pin else "(pre-requirements.txt was not installed)"),
        "environment": "this one" if options.current else "fresh",
        "install_seconds": install_seconds,
        "start_seconds": round(start_seconds, 1),
        "answer_seconds": answer_seconds,
        "peak_megabytes": None if peak is None else round(peak / 1e6),
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--python", help="interpreter of the fresh environment (the front matter's)")
    made.add_argument(
        "--current", action="store_true", help="install nothing: use the environment of this Python"
    )
    made.add_argument(
        "--skip-pre-requirements",
        action="store_true",
        help="leave torch to requirements.txt: ZeroGPU's torch is gigabytes of CUDA",
    )
    made.add_argument("--port", type=int, default=7860)
    made.add_argument(
        "--variable",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable of the Space, such as SPECTR_EXPERTS; may be given several times",
    )
    made.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="space-") as folder:
            report = check(options, Path(folder))
    except SpaceError as error:
        say(f"The Space would not run: {error}")
        return 1
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        for name, value in report.items():
            print(f"{name:16} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
