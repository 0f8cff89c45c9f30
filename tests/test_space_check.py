"""What a Space needs of the repository, and the rehearsal of one (nothing is installed here)."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from PIL import Image

from scripts import space_check
from scripts.space_check import SpaceError
from spectr_demo.base.loading import EMBEDDED_ID
from spectr_demo.ui.examples import EXAMPLES

ROOT = Path(__file__).parent.parent
COLORS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
ZERO_GPU_TORCH = {"2.8.0", "2.9.1", "2.10.0", "2.11.0"}


def requirements(name: str) -> dict[str, Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    found = [Requirement(line) for line in lines if not line.startswith("#")]
    return {requirement.name: requirement for requirement in found}


def test_front_matter() -> None:
    front = yaml.safe_load((ROOT / "README.md").read_text().split("---\n")[1])
    needed = {"title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version"}
    needed |= {"app_file", "short_description", "models", "tags", "thumbnail", "license"}
    assert set(front) == needed
    assert front["sdk"] == "gradio"
    assert str(requirements("requirements.txt")["gradio"].specifier) == f"=={front['sdk_version']}"
    assert re.fullmatch(r"3\.(1[1-9])\.\d+", front["python_version"])
    assert len(front["short_description"]) <= 60
    assert {front["colorFrom"], front["colorTo"]} <= COLORS
    assert front["models"] == [EMBEDDED_ID]
    assert (ROOT / front["app_file"]).is_file()
    thumbnail = ROOT / front["thumbnail"]
    assert thumbnail.is_relative_to(ROOT / "assets")
    assert thumbnail.stat().st_size < 200_000
    with Image.open(thumbnail) as image:
        assert image.size == (1200, 600)
    # The script reads the same values without a YAML parser.
    for key in ("title", "sdk_version", "python_version", "app_file"):
        assert space_check.setting(ROOT, key) == front[key]


def test_requirements_stand_alone() -> None:
    for name in ("requirements.txt", "pre-requirements.txt"):
        assert not re.search(r"^\s*-", (ROOT / name).read_text(), flags=re.M)


def test_zero_gpu_gets_a_torch_that_it_supports_and_that_is_kept() -> None:
    (pinned,) = requirements("pre-requirements.txt").values()
    (specifier,) = pinned.specifier
    assert pinned.name == "torch"
    assert specifier.operator == "=="
    assert specifier.version in ZERO_GPU_TORCH
    assert specifier.version in requirements("requirements.txt")["torch"].specifier


def test_the_rehearsal_runs_a_shipped_example() -> None:
    assert space_check.PROMPT in {example.prompt for example in EXAMPLES}


def test_the_tree_is_what_is_committed(tmp_path: Path) -> None:
    tree = space_check.export(tmp_path)
    listed = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", "-z", "HEAD"], cwd=ROOT, capture_output=True
    ).stdout.decode()
    held = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert held == set(filter(None, listed.split("\0")))
    assert tree.num_files == len(held)
    assert tree.largest[1] <= tree.num_bytes


def test_a_file_that_the_hub_refuses(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"x")
    with (tmp_path / "large.bin").open("wb") as file:
        file.truncate(space_check.FILE_BYTES + 1)
    with pytest.raises(SpaceError, match=r"large\.bin \(10\.0 MB\)$"):
        space_check.measure(tmp_path)


def test_the_python_of_the_front_matter_else_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python3.99"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert space_check.choose_python("3.99.1") == "python3.99"
    python.write_text("#!/bin/sh\nexit 127\n")  # as a shim of a version manager does
    assert space_check.choose_python("3.99.1") == sys.executable
    assert space_check.choose_python("3.98.1") == sys.executable


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"base": "a", "uniform": "b"}, "with the columns"),
        ({"base": "a", "uniform": " ", "spectr-context": "c"}, "with no text in uniform"),
    ],
)
def test_a_wrong_answer(answer: dict[str, str], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        space_check.check_answer([{"label": k, "text": v} for k, v in answer.items()])


SERVER = """
import os
from http.server import HTTPServer, SimpleHTTPRequestHandler
assert os.environ["SYSTEM"] == "spaces" and os.environ["MINE"] == "1"
assert "SECRET_OF_THE_CALLER" not in os.environ
address = "127.0.0.1", int(os.environ["GRADIO_SERVER_PORT"])
HTTPServer(address, SimpleHTTPRequestHandler).serve_forever()
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "README.md").write_text("---\ntitle: Small\napp_file: app.py\n---\n")
    (folder / "app.py").write_text(SERVER)
    return folder


def test_the_app_runs_as_on_a_space_and_is_stopped(
    small_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_CALLER", "1")
    port = free_port()
    arguments = (small_tree, sys.executable, tmp_path, port, {"MINE": "1"})
    with space_check.started(*arguments) as (app, seconds):
        assert seconds > 0
        assert space_check.is_served(port)
        assert space_check.peak_memory(app.pid)
        with (
            pytest.raises(SpaceError, match=f"port {port} is in use"),
            space_check.started(*arguments),
        ):
            pass
    assert app.returncode is not None
    assert not space_check.is_served(port)


def test_an_app_that_ends_at_once(small_tree: Path, tmp_path: Path) -> None:
    (small_tree / "app.py").write_text("import sys; sys.exit('this and that is missing')")
    message = r"ended with exit status 1; the end of its log:\n    this and that is missing$"
    with (
        pytest.raises(SpaceError, match=message),
        space_check.started(small_tree, sys.executable, tmp_path, free_port(), {}),
    ):
        pass


def rehearse(base: str, experts: str) -> int:
    return space_check.main(
        [
            *("--current", "--json", "--port", str(free_port())),
            *("--variable", f"SPECTR_BASE_MODEL={base}", "--variable", f"SPECTR_EXPERTS={experts}"),
        ]
    )


@pytest.mark.slow
def test_a_duplicate_with_variables_of_its_own(
    base_folder: str, expert_folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert rehearse(base_folder, ", ".join(expert_folders)) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["files"] > 100
    assert report["start_seconds"] > 0
    assert len(report["answer_seconds"]) == 2
    assert report["environment"] == "this one"


@pytest.mark.slow
def test_a_duplicate_with_a_wrong_variable_says_so_in_its_log(
    base_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rehearse(base_folder, "./medicine") == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    message = "expert 'medicine': there is no folder ./medicine; give a folder or a Hub id"
    assert message in printed.err
    assert message in (ROOT / "docs" / "space.md").read_text()
    assert "Traceback" not in printed.err


def test_the_commands_of_the_docs() -> None:
    text = (ROOT / "docs" / "space.md").read_text()
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("python ")]
    assert len(commands) == 2
    for _, script, *arguments in commands:
        assert script == "scripts/space_check.py"
        space_check.parser().parse_args(arguments)
