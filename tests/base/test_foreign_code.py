"""Code that comes with a base or an expert is never run, whoever answers transformers' question."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from spectr_demo.base.loading import load_base
from spectr_demo.engine.model import load
from spectr_demo.experts.preflight import preflight
from tests.conftest import SaveExpert

CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model
from transformers import PreTrainedTokenizerFast as Tokenizer
"""
AUTO_MAP = {
    "AutoConfig": "theirs.Config",
    "AutoModel": "theirs.Model",
    "AutoModelForCausalLM": "theirs.Model",
    "AutoTokenizer": [None, "theirs.Tokenizer"],
    "AutoProcessor": "theirs.Tokenizer",
}


@pytest.fixture(autouse=True)
def willing_person(monkeypatch: pytest.MonkeyPatch) -> None:
    """Says yes to all that is asked on the terminal."""
    monkeypatch.setattr("builtins.input", lambda question="": "y")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Is there once the code has run."""
    return tmp_path / "the-code-has-run"


@pytest.fixture
def with_code(mark: Path) -> Callable[..., None]:
    """Gives a folder code of its own, and changes to one of its files."""

    def add(folder: Path, file: str, **changes: object) -> None:
        code = CODE.format(mark=str(mark))
        for name in ("theirs", "modeling_llama"):
            (folder / f"{name}.py").write_text(code)
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": AUTO_MAP} | changes))

    return add


def test_the_code_would_leave_its_mark(mark: Path) -> None:
    exec(CODE.format(mark=str(mark)), {})
    assert mark.exists()


def test_a_base_that_transformers_knows_is_loaded_without_its_code(
    folder: Path, with_code: Callable[..., None], mark: Path
) -> None:
    for file in ("config.json", "tokenizer_config.json", "generation_config.json"):
        with_code(folder, file)
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "theirs.py", folder / "custom_generate" / "generate.py")
    base = load_base(str(folder), device="cpu")
    assert type(base.model).__module__ == "transformers.models.llama.modeling_llama"
    assert not mark.exists()


@pytest.mark.parametrize(
    ("file", "changes", "what"),
    [
        ("config.json", {"model_type": "theirs"}, "config"),
        ("tokenizer_config.json", {"tokenizer_class": "TheirTokenizer"}, "weights or tokenizer"),
    ],
)
def test_a_base_that_needs_its_code_is_refused(
    folder: Path,
    with_code: Callable[..., None],
    mark: Path,
    file: str,
    changes: dict[str, object],
    what: str,
) -> None:
    with_code(folder, file, **changes)
    reason = f"its {what} needs code that comes with it, and such code is never run"
    with pytest.raises(ValueError, match=reason):
        load_base(str(folder), device="cpu")
    if file == "config.json":
        with pytest.raises(ValueError, match=reason):
            preflight(str(folder), [])
    assert not mark.exists()


def test_an_experts_tokenizer_that_needs_its_code_is_left_out(
    base_folder: str,
    save_expert: SaveExpert,
    with_code: Callable[..., None],
    mark: Path,
    tmp_path: Path,
) -> None:
    expert = Path(save_expert("theirs", folder=tmp_path))
    shutil.copy(Path(base_folder) / "tokenizer.json", expert)
    (expert / "tokenizer_config.json").write_text('{"tokenizer_class": "TheirTokenizer"}')
    with_code(expert, "tokenizer_config.json")
    model = load(base_folder, [str(expert)])
    assert "the tokenizer files cannot be read" in model.base.notices[-1]
    assert not mark.exists()
