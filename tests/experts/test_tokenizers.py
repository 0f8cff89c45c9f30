"""The tokenizers that experts bring: a template for a base without one, and what differs."""

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from spectr_demo.base.loading import LoadedBase
from spectr_demo.base.prompts import encode
from spectr_demo.engine.model import load
from spectr_demo.experts.adapters import Adapter, read_adapter
from spectr_demo.experts.tokenizers import with_template_of
from tests.conftest import CHAT_TEMPLATE, EXPERT_NAMES, SaveExpert, loaded_base, tiny_llama

OTHER_TEMPLATE = CHAT_TEMPLATE.replace("assistant", "bot")

Bring = Callable[..., None]


@pytest.fixture
def folders(save_expert: SaveExpert, tmp_path: Path) -> list[Path]:
    return [Path(save_expert(name, seed=i, folder=tmp_path)) for i, name in enumerate(EXPERT_NAMES)]


@pytest.fixture
def bring(tokenizer: PreTrainedTokenizerFast) -> Bring:
    """Puts a tokenizer into an expert's folder, with another template or other attributes."""

    def put(folder: Path, template: str | None = CHAT_TEMPLATE, **changes: object) -> None:
        theirs = copy.deepcopy(tokenizer)
        theirs.chat_template = template
        for name, value in changes.items():
            setattr(theirs, name, value)
        theirs.save_pretrained(folder)

    return put


@pytest.fixture
def base(tokenizer: PreTrainedTokenizerFast) -> LoadedBase:
    return loaded_base(tiny_llama(len(tokenizer)), copy.deepcopy(tokenizer))


@pytest.fixture
def plain(base: LoadedBase) -> LoadedBase:
    """A base without a chat template."""
    base.tokenizer.chat_template = None
    return base


def adapters(folders: list[Path]) -> list[Adapter]:
    return [read_adapter(folder) for folder in folders]


def test_a_base_without_a_template_takes_that_of_its_experts(
    plain: LoadedBase,
    folders: list[Path],
    bring: Bring,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for folder in folders[:2]:  # the third brings none, and agrees
        bring(folder)
    found = with_template_of(plain, adapters(folders))
    notice = "base 'tiny' has no chat template; that of experts 'red', 'green' is used"
    assert found.notices == (notice,)
    assert [record.message for record in caplog.records] == [notice]
    assert encode(found.tokenizer, "Hi") == encode(tokenizer, "Hi")
    assert plain.tokenizer.chat_template is None, "the base that was given stays as it is"


@pytest.mark.parametrize("second", [OTHER_TEMPLATE, None])
def test_where_experts_do_not_agree_plain_text_is_read(
    plain: LoadedBase, folders: list[Path], bring: Bring, second: str | None
) -> None:
    bring(folders[0])
    bring(folders[1], second)
    bring(folders[2])
    found = with_template_of(plain, adapters(folders))
    assert found.tokenizer.chat_template is None
    groups = f"(one in experts 'red', 'blue'; {'one' if second else 'none'} in expert 'green')"
    assert found.notices == (
        f"base 'tiny' has no chat template, and those of its experts differ {groups}: plain text "
        "is read. Put the right chat_template.jinja into the base's folder",
    )


def test_nothing_is_said_where_nothing_differs(
    base: LoadedBase, folders: list[Path], bring: Bring
) -> None:
    assert with_template_of(base, adapters(folders)).notices == ()
    bring(folders[0])
    bring(folders[1], None)
    bring(folders[2], CHAT_TEMPLATE + "\n")
    found = with_template_of(base, adapters(folders))
    assert found.notices == ()
    assert found.tokenizer.chat_template == CHAT_TEMPLATE
    base.tokenizer.chat_template = None
    for folder in folders:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert with_template_of(base, adapters(folders)).notices == ()


def test_another_template_than_the_bases_is_named(
    base: LoadedBase, folders: list[Path], bring: Bring
) -> None:
    bring(folders[0])
    bring(folders[1], OTHER_TEMPLATE)
    bring(folders[2], OTHER_TEMPLATE)
    found = with_template_of(replace(base, notices=("first",)), adapters(folders))
    assert found.notices == (
        "first",
        "experts 'green', 'blue': the chat template is not the base's, which is used",
    )
    assert found.tokenizer.chat_template == CHAT_TEMPLATE


def test_other_tokens_are_named(
    base: LoadedBase,
    folders: list[Path],
    bring: Bring,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    theirs = copy.deepcopy(tokenizer)
    theirs.add_tokens([f"<tool{i}>" for i in range(6)])
    theirs.save_pretrained(folders[0])
    bring(folders[1], eos_token="<|im_start|>")
    base.model.generation_config.eos_token_id = 1
    assert with_template_of(base, adapters(folders)).notices == (
        "expert 'red': the tokenizer's '<tool0>', '<tool1>', '<tool2>', '<tool3>' and 2 more are "
        "not in the base's, or have other numbers there; the base's is used",
        "expert 'green': the tokenizer's end token is '<|im_start|>', at which the base does not "
        "stop",
    )
    base.model.generation_config.eos_token_id = [0, 1]
    assert len(with_template_of(base, adapters(folders)).notices) == 1


def test_a_template_of_the_experts_that_loses_the_text_is_an_error(
    plain: LoadedBase, folders: list[Path], bring: Bring
) -> None:
    bring(folders[0], CHAT_TEMPLATE.replace("{{ m['content'] }}", ""))
    with pytest.raises(ValueError, match=r"that of expert 'red' is used: .* leaves out what"):
        with_template_of(plain, adapters(folders))


def test_a_tokenizer_that_cannot_be_read_is_named(
    base: LoadedBase, folders: list[Path], bring: Bring
) -> None:
    bring(folders[0])
    (folders[0] / "tokenizer.json").write_text("[]")
    (notice,) = with_template_of(base, adapters(folders)).notices
    assert notice.startswith("expert 'red': the tokenizer files cannot be read (")


def test_a_tokenizer_on_the_hub_is_fetched(
    plain: LoadedBase,
    folders: list[Path],
    bring: Bring,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--someone--theirs"
    snapshot = repo / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(snapshot.name)
    bring(folders[0])
    folders[0].rename(snapshot / "inside")
    found = with_template_of(plain, [read_adapter("someone/theirs/inside")])
    assert found.tokenizer.chat_template == CHAT_TEMPLATE


def test_load_takes_the_template_and_the_page_can_say_so(
    base_folder: str,
    folders: list[Path],
    bring: Bring,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    without = tmp_path / "base"
    without.mkdir()
    for file in Path(base_folder).iterdir():
        if file.name != "chat_template.jinja":
            (without / file.name).write_bytes(file.read_bytes())
    bring(folders[0])
    model = load(str(without), folders)
    assert model.base.notices == (
        f"base {str(without)!r} has no chat template; that of expert 'red' is used",
    )
    assert model.encode("Hi") == encode(tokenizer, "Hi")
    assert model.template.opening
    step = model.compare("Hi", ["spectr"], max_new_tokens=2)
    assert step.trace is not None
    assert step.trace.columns[0].num_prompt == len(encode(tokenizer, "Hi"))


def test_a_tokenizer_that_is_large_or_odd_is_named_in_one_line(
    base: LoadedBase, folders: list[Path], bring: Bring
) -> None:
    for folder in folders:
        bring(folder)
    (folders[0] / "tokenizer.json").write_bytes(b"{")
    os.truncate(folders[0] / "tokenizer.json", 5_000_000_000)
    (folders[1] / "tokenizer_config.json").write_text("[" * 100_000)
    bring(folders[2], eos_token="\x1b[2J\n" + "x" * 63_000)
    notices = with_template_of(base, adapters(folders)).notices
    assert "expert 'red': the tokenizer files cannot be read (they have 50000" in notices[0]
    assert notices[1].startswith("expert 'green': the tokenizer files cannot be read (")
    assert any(notice.startswith("expert 'blue': ") for notice in notices)
    for notice in notices:
        assert notice.isprintable()
        assert len(notice) < 1100
