"""The notebooks: their form, and that each runs from a clean kernel and draws something."""

import ast
import re
import subprocess
import sys
import tomllib
from base64 import b64decode
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook
from plotly import graph_objects as go
from traitlets import default

from spectr_demo.base.checkpoint import embedded_checkpoint
from spectr_demo.base.loading import load_base
from spectr_demo.base.quantization import choose_compute_dtype
from spectr_demo.config import cache_dir, shipped_experts
from tests.conftest import SLOW_SECONDS

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
PLOTLY = "application/vnd.plotly.v1+json"
CELL_SECONDS = SLOW_SECONDS - 60  # so that a cell that hangs is named
SETTING = re.compile(r"(\w+) = (.+?)  #@param [\[{]")

# The quick mode: values of the settings cells in place of the defaults.
QUICK: dict[str, dict[str, Any]] = {
    "01_quickstart": {"max_new_tokens": 16},
    "02_how_spectr_works": {"layer": 7},
    "03_train_an_expert": {"steps": 4, "batch_size": 2, "num_eval": 2},
    "04_evaluate_routing": {
        "domains": "cron, chords",
        "routers": "base; oracle; spectr-calibrated; context, always an expert; spectr-context",
        "num_examples": 2,
    },
    "05_bring_your_own": {"experts": ", ".join(shipped_experts()[:3]), "max_new_tokens": 8},
}

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code(notebook: NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def settings_cell(notebook: NotebookNode) -> NotebookNode:
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    return cell


def settings(notebook: NotebookNode) -> dict[str, Any]:
    """The defaults by name; every line of the cell but the first is one."""
    first, *lines = settings_cell(notebook).source.splitlines()
    assert first == "# fmt: off"  # or the formatter would write `# @param`
    found = [SETTING.match(line) for line in lines]
    assert all(found), lines
    return {match[1]: ast.literal_eval(match[2]) for match in found if match}


def replace_settings_(notebook: NotebookNode, values: dict[str, Any]) -> None:
    unknown = values.keys() - settings(notebook)
    assert not unknown, unknown
    cell = settings_cell(notebook)
    for name, value in values.items():
        line = f"{name} = {value!r}"
        cell.source = re.sub(rf"^{name} = .+$", lambda _, to=line: to, cell.source, flags=re.M)


class NativeKernel(AsyncKernelManager):
    """The kernel of the interpreter that runs the tests, whatever else Jupyter has installed."""

    @default("kernel_spec_manager")
    def _native(self) -> KernelSpecManager:
        return KernelSpecManager(parent=self, kernel_dirs=[])


def execute(notebook: NotebookNode, folder: Path) -> None:
    NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        kernel_manager_class=NativeKernel,
        resources={"metadata": {"path": str(folder)}},
    ).execute()


def figures(notebook: NotebookNode) -> list[dict[str, Any]]:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    return [o.data[PLOTLY] for o in outputs if PLOTLY in o.get("data", {})]


def is_empty(figure: dict[str, Any]) -> bool:
    """Whether no trace of a figure has a value that is drawn."""
    return not any(_has_values(trace) for trace in figure["data"])


def _has_values(trace: dict[str, Any]) -> bool:
    values = next((trace[key] for key in ("z", "y", "values", "x") if key in trace), None)
    if isinstance(values, dict):  # Plotly's encoding of arrays
        values = np.frombuffer(b64decode(values["bdata"]), values["dtype"])
    flat = np.asarray([] if values is None else values).ravel().tolist()
    return any(value is not None and value == value for value in flat)  # NaN is not itself


def check_figures(notebook: NotebookNode) -> None:
    found = figures(notebook)
    assert found, "the notebook draws no figure"
    for number, figure in enumerate(found, start=1):
        assert not is_empty(figure), f"figure {number} is empty"


def test_there_are_five() -> None:
    assert [path.stem for path in NOTEBOOKS] == list(QUICK)


@each
def test_form(path: Path) -> None:
    notebook = read(path)
    assert len(notebook.cells) <= 20
    first, last = notebook.cells[0].source, notebook.cells[-1]
    assert first.startswith("# ")
    assert "?" in first.split("\n\n")[1].partition(".")[0]  # the question is the first sentence
    assert last.cell_type == "markdown"
    assert last.source.startswith("## What to try next\n")
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)
        assert not cell.get("attachments")


@each
def test_badge_and_clone_name_the_projects_repository(path: Path) -> None:
    notebook = read(path)
    project = REPOSITORY.removeprefix("https://github.com/")
    badge = f"https://colab.research.google.com/github/{project}/blob/main/notebooks/{path.name}"
    assert f"]({badge})" in notebook.cells[0].source
    assert f'"{REPOSITORY}"' in code(notebook)[0]
    assert badge in (ROOT / "notebooks" / "README.md").read_text()


@each
def test_settings_are_plain_defaults(path: Path) -> None:
    values = settings(read(path))
    assert values
    assert {type(value) for value in values.values()} <= {str, int, float, bool}
    assert code(read(path))[1] == settings_cell(read(path)).source


@each
def test_no_function_is_longer_than_ten_lines(path: Path) -> None:
    for source in code(read(path)):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 10


@each
def test_links_between_files_lead_somewhere(path: Path) -> None:
    for cell in read(path).cells:
        for link in re.findall(r"\]\(([^):]+)\)", cell.source):
            assert (path.parent / link).exists(), link


def test_the_install_cell_is_the_same_in_all() -> None:
    assert len({code(read(path))[0] for path in NOTEBOOKS}) == 1


@pytest.mark.parametrize("where", ["notebooks", "."])
def test_the_install_cell_finds_the_project(where: str) -> None:
    source = code(read(NOTEBOOKS[0]))[0] + "\nimport spectr_demo\nprint(spectr_demo.__file__)"
    command = [sys.executable, "-I", "-c", source]
    output = subprocess.run(command, cwd=ROOT / where, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == str(ROOT / "spectr_demo" / "__init__.py")


def test_on_colab_the_install_cell_clones_and_installs_without_torch(tmp_path: Path) -> None:
    """With a folder for a repository, and a pip that only says what it is asked for."""
    made = tmp_path / "made" / "notebooks"
    made.mkdir(parents=True)
    script = (ROOT / "notebooks" / "install_on_colab.py").read_text()
    (made / "install_on_colab.py").write_text(script)
    (made.parent / "spectr_demo").mkdir()
    (made.parent / "spectr_demo" / "__init__.py").touch()
    for name in ("requirements.txt", "requirements-train.txt"):
        (made.parent / name).write_text((ROOT / name).read_text())
    user = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*user, "commit", "-qm", "."]):
        subprocess.run(["git", *command], cwd=made.parent, check=True)
    (tmp_path / "pip.py").write_text(
        "import pathlib, sys\n"
        "print('\\n'.join(sys.argv[1:]))\n"
        "print('PINS', *pathlib.Path(sys.argv[sys.argv.index('-c') + 1]).read_text().split())\n"
    )
    source = code(read(NOTEBOOKS[0]))[0].replace(REPOSITORY, str(made.parent))
    source = "import sys\nsys.modules['google.colab'] = sys\n" + source + "\nprint(os.getcwd())"
    (tmp_path / "content").mkdir()
    for _ in range(2):  # again after the runtime was restarted
        output = subprocess.run(
            [sys.executable, "-c", source],
            cwd=tmp_path / "content",
            env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        assert str(tmp_path / "content" / "spectr-demo") in output
        asked = [line for line in output if "==" in line or line.startswith(("torch", "numpy"))]
        (pins,) = [line for line in asked if line.startswith("PINS")]
        asked.remove(pins)
        assert re.fullmatch(r"PINS torch==\S+ numpy==\S+", pins)
        lines = "\n".join(
            (ROOT / name).read_text() for name in ("requirements.txt", "requirements-train.txt")
        ).splitlines()
        needed = {line for line in lines if line and line[0] not in "#-"}
        assert needed - set(asked) == {
            line for line in needed if line.startswith(("torch>", "numpy="))
        }
        assert set(asked) < needed


@pytest.fixture
def plotly_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are recorded as data, as a Jupyter front end gets them."""
    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype")


@pytest.fixture
def quick(path: Path, tmp_path: Path) -> NotebookNode:
    """The notebook with quick settings; its files go to a folder of the test."""
    notebook = read(path)
    values = dict(QUICK[path.stem])
    if "output_folder" in settings(notebook):
        values["output_folder"] = str(tmp_path)
    if "base" in settings(notebook):  # another base: the default one as a folder
        device = load_base().device
        values["base"] = str(embedded_checkpoint(cache_dir(), choose_compute_dtype(device)))
    replace_settings_(notebook, values)
    return notebook


@pytest.mark.embedded
@pytest.mark.slow
@pytest.mark.usefixtures("plotly_outputs")
@each
def test_runs_from_a_clean_kernel_and_draws(quick: NotebookNode, path: Path) -> None:
    execute(quick, path.parent)
    check_figures(quick)


@pytest.mark.usefixtures("plotly_outputs")
def test_a_cell_that_raises_fails(tmp_path: Path) -> None:
    notebook = new_notebook(cells=[new_code_cell("1 / 0"), new_code_cell("print('too late')")])
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(notebook, tmp_path)
    assert not notebook.cells[1].outputs


@pytest.mark.usefixtures("plotly_outputs")
def test_a_drawn_figure_is_recorded_and_an_empty_one_fails(tmp_path: Path) -> None:
    source = "import plotly.graph_objects as go\ngo.Figure(go.Bar(y={}))"
    notebook = new_notebook(cells=[new_code_cell(source.format("[1, 2]"))])
    execute(notebook, tmp_path)
    check_figures(notebook)
    notebook = new_notebook(cells=[new_code_cell(source.format("[]"))])
    execute(notebook, tmp_path)
    with pytest.raises(AssertionError, match="figure 1 is empty"):
        check_figures(notebook)
    with pytest.raises(AssertionError, match="no figure"):
        check_figures(new_notebook(cells=[new_code_cell("1")]))


@pytest.mark.parametrize(
    ("trace", "expected"),
    [
        (None, True),
        (go.Scatter(x=[1, 2], y=[]), True),
        (go.Scatter(x=[None], y=[None]), True),
        (go.Heatmap(z=np.full((2, 2), np.nan)), True),
        (go.Heatmap(z=np.zeros((0, 3))), True),
        (go.Heatmap(z=np.ones((2, 2), np.float32)), False),
        (go.Scatter(x=["a"], y=[0]), False),
        (go.Bar(x=[3], y=["a"]), False),
    ],
)
def test_what_an_empty_figure_is(trace: Any, expected: bool) -> None:
    figure = go.Figure([] if trace is None else [trace])
    assert is_empty(figure.to_plotly_json()) is expected


def test_settings_that_are_not_there_are_not_replaced() -> None:
    notebook = read(NOTEBOOKS[0])
    with pytest.raises(AssertionError, match="max_tokens"):
        replace_settings_(notebook, {"max_tokens": 1})
    replace_settings_(notebook, {"max_new_tokens": 1, "prompt": r"a\1 'b'"})
    namespace: dict[str, Any] = {}
    exec(settings_cell(notebook).source, namespace)
    assert (namespace["max_new_tokens"], namespace["prompt"]) == (1, r"a\1 'b'")
