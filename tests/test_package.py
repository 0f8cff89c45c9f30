"""The wheel and the sdist: built, complete, and at work in an environment without the checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from spectr_demo.config import shipped_experts

ROOT = Path(__file__).parent.parent


def pins(name: str) -> dict[str, Requirement]:
    """The requirements that a file lists itself, by package."""
    lines = (ROOT / name).read_text().splitlines()
    found = [Requirement(line) for line in lines if line and line[0] not in "#-"]
    return {requirement.name: requirement for requirement in found}


@pytest.mark.parametrize(
    ("file", "extra"),
    [
        ("requirements.txt", None),
        ("requirements-train.txt", "train"),
        ("requirements-eval.txt", "eval"),
        ("requirements-ray.txt", "ray"),
    ],
)
def test_the_pins_are_versions_that_the_package_takes(file: str, extra: str | None) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = project["optional-dependencies"][extra] if extra else project["dependencies"]
    taken = {r.name: r for r in map(Requirement, listed)}
    pinned = pins(file)
    assert taken.keys() == pinned.keys()
    for name, pin in pinned.items():
        versions = [spec.version for spec in pin.specifier if spec.operator == "=="]
        if versions:
            assert taken[name].specifier.contains(versions[0]), name
        else:  # a range, for torch
            assert taken[name].specifier == pin.specifier


def test_without_a_gpu_the_same_packages_come_with_a_cpu_build_of_torch() -> None:
    lines = (ROOT / "requirements-cpu.txt").read_text().splitlines()
    assert "-r requirements.txt" in lines
    (torch,) = pins("requirements-cpu.txt").values()
    (specifier,) = torch.specifier
    assert specifier.operator == "=="
    assert specifier.version.endswith("+cpu")
    assert pins("requirements.txt")["torch"].specifier.contains(specifier.version)
    assert torch.marker is not None  # elsewhere PyPI's own build is for the CPU
    platforms = ("linux", "darwin", "win32")
    assert [torch.marker.evaluate({"sys_platform": name}) for name in platforms] == [1, 0, 0]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    work = tmp_path_factory.mktemp("package")
    files = subprocess.check_output(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True
    )
    for name in files.splitlines():  # a copy: building leaves its own folders behind
        if (ROOT / name).is_file():
            (work / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (work / "source" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--outdir", str(work / "dist"), str(work / "source")]
    subprocess.run(command, check=True, capture_output=True)
    return work / "dist"


@pytest.mark.slow
def test_wheel_and_sdist_hold_code_experts_and_results(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    (sdist,) = built.glob("*.tar.gz")
    assert max(wheel.stat().st_size, sdist.stat().st_size) < 60e6
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    code = {str(path.relative_to(ROOT)) for path in ROOT.glob("spectr_demo/**/*.py")}
    beside = {
        str(path.relative_to(ROOT))
        for kind in ("css", "js", "json")
        for path in ROOT.glob(f"spectr_demo/**/*.{kind}")
    }
    assert "spectr_demo/ui/state.js" in beside
    assert code | beside | {"spectr_demo/assets/generic_text.json"} <= in_wheel
    assert "spectr_demo/assets/results/evaluation.json" in in_wheel
    assert "spectr_demo/assets/held_out.json" in in_wheel
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    assert code <= in_sdist
    for folder in map(Path, shipped_experts()):
        for file in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
            assert f"spectr_demo/assets/experts/{folder.name}/{file}" in in_wheel
            assert f"assets/experts/{folder.name}/{file}" in in_sdist


@pytest.mark.embedded
@pytest.mark.slow
def test_the_installed_wheel_answers(built: Path, tmp_path: Path) -> None:
    """In a new environment that has this one's dependencies, but nothing of the checkout."""
    venv.create(tmp_path / "env", with_pip=False)
    folder = sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env")})
    (Path(folder) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = built.glob("*.whl")
    python = tmp_path / "env" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--no-deps", "--force-reinstall", str(wheel)]
    subprocess.run([*install, "--quiet"], check=True)
    command = [tmp_path / "env" / "bin" / "spectr-demo", "compare", "At 02:30, only on Monday"]
    settings = ["--columns", "base", "spectr-context", "--max-new-tokens", "4", "--json"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SPECTR_E"))}
    result = subprocess.run(
        [*command, *settings], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    columns = json.loads(result.stdout)["columns"]
    assert [column["router"] for column in columns] == ["base", "spectr-context"]
    assert all(column["text"] for column in columns)
    assert set(columns[1]["expert_share"]) == {Path(folder).name for folder in shipped_experts()}
    where = [str(python), "-c", "import spectr_demo.config as c; print(c.ASSETS, c.WORKPLACE)"]
    found = subprocess.check_output(where, cwd=tmp_path, env=environment, text=True)
    assert found.split() == [f"{folder}/spectr_demo/assets", "."]
