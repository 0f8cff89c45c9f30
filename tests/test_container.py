"""The Dockerfile: what a linter says of it, and that it copies what the demo needs. Not built."""

import re
import shlex
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def instructions(name: str) -> list[str]:
    joined = DOCKERFILE.replace("\\\n", " ")
    return re.findall(rf"^{name} +(.*)$", joined, flags=re.M)


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    result = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_it_copies_what_exists_and_what_dockerignore_lets_through() -> None:
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if "!" in line
    }
    copied = set()
    for copy in instructions("COPY"):
        *sources, _ = [part for part in shlex.split(copy) if not part.startswith("--")]
        copied.update(sources)
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)
    assert {"app.py", "spectr_demo", "assets", "requirements.txt", "constraints.txt"} <= copied


def test_it_runs_as_an_ordinary_user_with_caches_on_a_volume_and_a_health_check() -> None:
    assert instructions("USER") == ["1000"]
    (volume,) = instructions("VOLUME")
    environment = dict(re.findall(r"(\w+)=(\S+)", " ".join(instructions("ENV"))))
    for cache in ("HF_HOME", "SPECTR_CACHE"):
        assert environment[cache].startswith(f"{volume}/")
    port = environment["GRADIO_SERVER_PORT"]
    assert instructions("EXPOSE") == [port]
    assert f"127.0.0.1:{port}" in instructions("HEALTHCHECK")[0]
    assert instructions("CMD") == ['["python", "app.py"]']
