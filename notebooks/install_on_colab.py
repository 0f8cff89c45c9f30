"""Install what the notebooks need on a machine that brings its own torch: Colab.

torch and numpy stay as they are, whatever asks for another version; the rest is the project's
direct dependencies. Options of pip may follow, such as --dry-run.
"""

import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("requirements.txt", "requirements-train.txt")
KEPT = ("torch", "numpy")  # numpy is loaded before the first cell runs: it must not change under it


def requirements() -> list[str]:
    """The lines of the project's files that name a package, but for those that are kept."""
    lines = [line for file in FILES for line in (ROOT / file).read_text().splitlines()]
    return [line for line in lines if line[:1].isalpha() and _name(line) not in KEPT]


def constraints() -> str:
    """Exactly the versions that are there, local parts such as +cu126 included."""
    return "".join(f"{name}=={version(name)}\n" for name in KEPT)


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "constraints.txt"
        pins.write_text(constraints())
        install = [sys.executable, "-m", "pip", "install", "-q", *requirements(), "-c", str(pins)]
        sys.exit(subprocess.run([*install, *sys.argv[1:]]).returncode)
