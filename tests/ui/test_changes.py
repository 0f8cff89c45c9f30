"""The panel on the tab of experts: who may do what, what is told, and what the page shows then."""

import gc
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from spectr_demo import ui
from spectr_demo.engine.model import SpectrModel
from spectr_demo.experts import hub
from spectr_demo.ui import changes, libraries
from spectr_demo.ui.changes import Panel, kinds, name_for
from spectr_demo.ui.runner import Runner
from spectr_demo.ui.uploads import Upload
from spectr_demo.ui.visitors import Visitor
from tests.conftest import BuildModel, SaveExpert
from tests.ui.conftest import OPENING

Be = Callable[..., None]
Update = dict[Any, Any]


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is set."""
    for name in ("UPLOADS", "OWNER_TOKEN", "HUB_ALLOW"):
        monkeypatch.delenv(f"SPECTR_{name}", raising=False)
    for name in ("SPACE_ID", "GRADIO_SERVER_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def be(monkeypatch: pytest.MonkeyPatch) -> Be:
    """A function after which another visitor calls. is_here: from this machine."""
    now = {"who": Visitor(name="one", is_gone=lambda: False, is_here=True)}
    for module in (libraries, changes):
        monkeypatch.setattr(module, "visitor", lambda: now["who"])

    def be(name: str, *, is_here: bool = True) -> None:
        now["who"] = Visitor(name=name, is_gone=lambda: False, is_here=is_here)

    return be


def packed(folder: str) -> Upload:
    upload = Upload(name="theirs.zip", address="", at=0.0)
    with zipfile.ZipFile(upload.file, "w") as archive:
        for name in (hub.CONFIG_FILE, hub.WEIGHTS_FILE):
            archive.write(Path(folder) / name, name)
    return upload


class Pressed:
    """A page whose buttons are pressed. Each gives the last that came of every component."""

    def __init__(self, model: SpectrModel) -> None:
        self.page = ui.build(model)
        self.panel: Panel = self.handler("looking").__self__
        self.runner: Runner = self.handler("run").__self__

    def handler(self, name: str) -> Any:
        return next(fn.fn for fn in self.page.fns.values() if fn.name == name)

    def press(self, name: str, /, **inputs: Any) -> Update:
        asked = {"who": "page", "token": ""} | inputs
        last: Update = {}
        for updates in self.handler(name)(**asked):
            last |= {part: new for part, new in updates.items() if new != gr.skip()}
        return last

    def look(self, upload: Upload | None = None, **inputs: Any) -> Update:
        if upload is not None:
            self.panel._uploads._files["ticket"] = upload
        asked = {"kind": "zip", "where": "", "name": "", "sent": "ticket"} | inputs
        return self.press("looking", **asked)

    def told(self, updates: Update) -> str:
        """The message, "" where it is hidden."""
        notices = [updates[n] for n in (self.panel.added, self.panel.notice) if n in updates]
        return "".join(str(each["value"]) for each in notices if each["visible"])

    def run(self, **choices: Any) -> list[Update]:
        form = OPENING | {"prompt": "hello", "max_new_tokens": 8} | choices
        return list(self.runner.run(None, **form))


@pytest.fixture
def page(routed_model: SpectrModel, be: Be) -> Pressed:
    return Pressed(routed_model)


def test_an_adapter_is_looked_at_then_added_and_used(
    page: Pressed, be: Be, save_expert: SaveExpert, build_model: BuildModel, expert_folders: Any
) -> None:
    theirs = save_expert("theirs", seed=7, r=2, target_modules=["q_proj", "v_proj"])
    panel, at = page.panel, page.runner.layout
    seen = page.look(packed(theirs), name="mine")
    report = seen[panel.report]
    for fact in ("mine fits this base", "<dd>2</dd>", "q_proj, v_proj (4 linear layers)"):
        assert fact in report
    assert "<dt>Scaling</dt><dd>4</dd>" in report  # alpha 8, rank 2
    assert "the same)" in report and "mine.zip" in report
    assert seen[panel.add]["interactive"] and page.told(seen) == ""
    assert page.runner.model.library.names == ("red", "green", "blue"), "nothing is added yet"

    added = page.press("adding")
    assert "✓ <b>mine</b> was added for this page, in" in page.told(added)
    assert "added: mine" in added[panel.whose] and added[panel.back]["visible"]
    assert added[panel.report] == "" and not added[panel.add]["interactive"]
    assert ("mine", "mine") in added[at.form["expert"]]["choices"]
    assert "mine" in added[at.what_if.form["expert"]]["choices"]
    assert added[at.form["top_k"]]["maximum"] == 4
    assert added[panel.target]["value"] == "mine"
    assert any(">mine<" in str(new) for new in added.values()), "a chip in the header"

    *_, last = page.run(columns=["base", "single"], expert="mine")
    expected = build_model([*expert_folders, f"mine={theirs}"])
    (answer,) = expected.compare("hello", ["single:mine"], max_new_tokens=8).columns
    assert page.runner.session  # of the page
    frame = next(new for new in last.values() if hasattr(new, "frame")).frame
    assert frame.columns[1].text == answer.text
    assert "expert='mine'" in last[at.copies] or "single:mine" in last[at.copies]
    assert "spectr-" not in last[at.copies].replace("spectr-demo", "")
    assert "&#x27;mine.zip&#x27;])" in last[at.copies]

    be("two")
    *_, refused = page.run(columns=["base", "single"], expert="mine")
    assert "unknown expert &#x27;mine&#x27;" in refused[at.notice]["value"]
    be("one")
    gone = page.press("removing", target="mine")
    assert "✓ <b>mine</b> was removed" in page.told(gone)
    assert ("mine", "mine") not in gone[at.form["expert"]]["choices"]


def test_disable_enable_replace_and_back(
    page: Pressed, save_expert: SaveExpert, routed_model: SpectrModel
) -> None:
    panel = page.panel
    off = page.press("disabling", target="green")
    assert ("green (disabled)", "green") in off[panel.target]["choices"]
    assert off[panel.target]["value"] == "green"
    assert "disabled: green" in off[panel.whose]
    assert page.runner.model.library.names == ("red", "blue")
    page.press("enabling", target="green")
    assert page.runner.model.library.names == ("red", "green", "blue")
    page.look(packed(save_expert("other", seed=8)))
    new = page.press("replacing", target="red")
    assert "✓ <b>red</b> was replaced" in page.told(new) and "replaced: red" in new[panel.whose]
    assert page.runner.model.adapters[0].sha256 != routed_model.adapters[0].sha256
    back = page.handler("going_back")()
    assert "the experts of all again" in page.told(back) and not back[panel.back]["visible"]
    assert page.runner.model is routed_model


def test_what_is_wrong_is_one_message_and_nothing_is_lost(
    page: Pressed, save_expert: SaveExpert
) -> None:
    good = save_expert("theirs", seed=7)
    page.look(packed(good), name="red")  # a name that is taken
    clash = page.look(packed(good), name="red")
    assert "there is an expert red already" in clash[page.panel.report]
    assert not clash[page.panel.add]["interactive"]
    assert "there is one of this name already" in page.told(page.press("adding"))
    assert page.panel._libraries.candidate is not None, "it can still replace that one"

    for upload, sent, message in (
        (Upload(name="x.zip", address="", at=0), "ticket", "theirs.zip: it is no zip file"),
        (None, "", "no file was sent: choose a zip file"),
        (None, "!the file has more than 9 bytes", "the file has more than 9 bytes"),
        (None, "another", "no file was sent"),
    ):
        told = page.told(page.look(upload, name="theirs", sent=sent))
        assert message in told and "/tmp" not in told
    assert "is no name for an expert" in page.told(page.look(packed(good), name="a/b"))
    assert "unknown expert &#x27;wild&#x27;" in page.told(page.press("removing", target="wild"))
    assert "unknown expert" in page.told(page.press("disabling", target=None))
    assert page.runner.model.library.names == ("red", "green", "blue")
    assert not page.panel._libraries.is_own


def test_a_fault_that_nobody_foresaw_is_one_message(
    page: Pressed, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    words = "zebra"

    def broken(self: Any, name: str) -> None:
        raise MemoryError(words)

    monkeypatch.setattr(SpectrModel, "remove", broken)
    told = page.told(page.press("removing", target="red"))
    assert "It failed (MemoryError), and nothing was changed." in told
    assert "a change of experts failed: MemoryError" in caplog.text and words not in caplog.text


def test_who_changes_experts_stands_in_line(page: Pressed) -> None:
    line = page.panel._line
    line._most_runs = 1
    with line.ticket("somebody") as other:
        assert line.begins(other, 0)
        going = page.handler("removing")(who="page", token="", target="red")
        assert "number 2 in line" in page.told(next(going))
    *_, last = going
    assert "was removed" in page.told(last)


# Who may do what


def test_for_all_takes_the_owners_token(
    routed_model: SpectrModel, be: Be, monkeypatch: pytest.MonkeyPatch, save_expert: SaveExpert
) -> None:
    monkeypatch.setenv("SPECTR_OWNER_TOKEN", "s3cret")
    page = Pressed(routed_model)
    for token, message in (
        ("", "only the owner may change the experts of all"),
        ("guess", "this is not the owner&#x27;s token"),
    ):
        told = page.told(page.press("removing", who="all", token=token, target="red"))
        assert message in told
    assert routed_model.library.names == ("red", "green", "blue")
    be("owner")
    page.look(packed(save_expert("theirs", seed=7)), who="all", token="s3cret")
    told = page.told(page.press("adding", who="all", token="s3cret"))
    assert "was added for all visitors" in told
    assert routed_model.library.names == ("red", "green", "blue", "theirs")
    be("two")
    at = page.runner.layout
    first, *_ = page.run(expert="red")
    assert ("theirs", "theirs") in first[at.form["expert"]]["choices"], "at the next action"
    assert first[at.form["expert"]]["value"] == "red", "and what was chosen stays"
    assert at.form["expert"] not in page.run()[0]
    be("three")
    assert ("theirs", "theirs") in page.handler("arrive")()[at.form["expert"]]["choices"]
    assert page.handler("arrive")() == gr.skip()


def test_without_a_token_nobody_changes_the_experts_of_all(page: Pressed) -> None:
    for token in ("", "anything"):
        told = page.told(page.press("removing", who="all", token=token, target="red"))
        assert "only the owner may change the experts of all" in told


@pytest.mark.parametrize(
    ("variables", "has_panel"),
    [
        ({}, True),
        ({"SPECTR_UPLOADS": "0"}, False),
        ({"SPACE_ID": "you/demo"}, False),
        ({"SPACE_ID": "you/demo", "SPECTR_UPLOADS": "1"}, True),
        ({"SPACE_ID": "you/demo", "SPECTR_OWNER_TOKEN": "s3cret"}, True),
    ],
)
def test_where_nobody_may_there_is_no_panel(
    routed_model: SpectrModel,
    variables: dict[str, str],
    has_panel: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    page = ui.build(routed_model)
    assert any(fn.name == "looking" for fn in page.fns.values()) is has_panel


def test_what_runs_in_another_process_keeps_its_experts(routed_model: SpectrModel) -> None:
    page = ui.build(routed_model, gpu=lambda duration: lambda steps: steps)
    assert not {"looking", "arrive", "leave"} & {fn.name for fn in page.fns.values()}


def test_with_uploads_off_only_the_owner_changes_anything(
    routed_model: SpectrModel, be: Be, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECTR_UPLOADS", "0")
    monkeypatch.setenv("SPECTR_OWNER_TOKEN", "s3cret")
    page = Pressed(routed_model)
    assert page.panel.who.value == "all"
    told = page.told(page.press("disabling", target="red"))
    assert "only the owner may change experts here" in told
    assert "was disabled for this page" in page.told(
        page.press("disabling", token="s3cret", target="red")
    )


def test_a_folder_is_read_where_the_server_is_the_visitors_own_machine(
    page: Pressed, be: Be, save_expert: SaveExpert, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = save_expert("theirs", seed=7)
    seen = page.look(kind="folder", where=theirs)
    assert "theirs fits this base" in seen[page.panel.report]
    assert "there is no folder /nowhere" in page.told(page.look(kind="folder", where="/nowhere"))
    assert "no folder is given" in page.told(page.look(kind="folder", where=" "))
    several = str(Path(save_expert("a", seed=1, folder=Path(theirs).parent)).parent)
    assert "2 adapters: name the folder of one" in page.told(
        page.look(kind="folder", where=several)
    )

    owner_only = "only the owner may name a folder of the server"
    be("stranger", is_here=False)
    assert owner_only in page.told(page.look(kind="folder", where=theirs))
    assert owner_only in page.told(page.look(kind="folder", where="/nowhere")), "nor asked about"
    be("one")
    monkeypatch.setenv("SPECTR_OWNER_TOKEN", "s3cret")
    assert owner_only in page.told(page.look(kind="folder", where=theirs))
    seen = page.look(kind="folder", where=theirs, token="s3cret")
    assert "theirs fits this base" in seen[page.panel.report]
    monkeypatch.delenv("SPECTR_OWNER_TOKEN")
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    assert "nothing can be added from" in page.told(page.look(kind="folder", where=theirs))
    assert kinds() == ["zip"]


def test_the_hub_gives_what_the_list_allows(
    page: Pressed, save_expert: SaveExpert, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "spectr_demo.experts.adapters.fetched", lambda source: Path(save_expert("x", seed=7))
    )
    assert "nothing can be added from" in page.told(page.look(kind="hub", where="you/lora"))
    monkeypatch.setenv("SPECTR_HUB_ALLOW", "us/*, them/lora-*")
    for where in ("us/anything", "them/lora-1/sub"):
        assert "fits this base" in page.look(kind="hub", where=where)[page.panel.report]
    for where in ("them/other", "others/us", "us2/x", "x/us/y"):
        told = page.told(page.look(kind="hub", where=where))
        assert "is not among the repositories that may be added here (us/*, them/lora-*)" in told
    for where in ("us", "us/../x", "/etc/x", "us/x y", "us//x", "", "~/x"):
        assert "is no Hub id" in page.told(page.look(kind="hub", where=where))


def test_a_hub_id_never_names_a_folder_of_the_server(
    page: Pressed, save_expert: SaveExpert, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPECTR_HUB_ALLOW", "us/*")
    save_expert("x", seed=7, folder=tmp_path / "us")
    monkeypatch.chdir(tmp_path)
    assert "is a folder of the server, too" in page.told(page.look(kind="hub", where="us/x"))


@pytest.mark.parametrize(
    ("given", "kind", "where", "expected"),
    [
        ("", "zip", "my adapter.zip", "my_adapter"),
        ("", "zip", "../../x.zip", "x"),
        ("", "zip", "", "expert"),
        ("", "zip", "a" * 100 + ".zip", "a" * 60),
        ("", "zip", "-x.zip", "_x"),
        ("", "hub", "you/lora-1", "lora-1"),
        ("", "folder", "/a/b/", "b"),
        ("été-2", "zip", "x.zip", "été-2"),
    ],
)
def test_an_expert_is_called_as_its_source_or_as_the_visitor_says(
    given: str, kind: Any, where: str, expected: str
) -> None:
    assert name_for(given, kind, where) == expected


def test_an_example_that_was_recorded_with_other_experts_is_not_shown(
    routed_model: SpectrModel, recording: Any, be: Be
) -> None:
    page = Pressed(routed_model)
    prompt = "What is the capital of France?"
    at = page.runner.layout
    shown = page.handler("replay")(None, [prompt])
    assert "is-finished" in shown[at.answers]
    page.press("removing", target="red")
    shown = page.handler("replay")(None, [prompt])
    assert shown[at.form["prompt"]] == prompt and at.answers not in shown
    assert "others than when this was recorded. <b>Run</b> answers it." in shown[at.about]


def test_experts_can_be_added_where_there_were_none(
    build_model: BuildModel, be: Be, save_expert: SaveExpert
) -> None:
    page = Pressed(build_model([]))
    seen = page.look(packed(save_expert("theirs", seed=7)))
    assert "none shares a layer with it" in seen[page.panel.report]
    added = page.press("adding")
    shown = {part.elem_id: new for part, new in added.items() if getattr(part, "elem_id", None)}
    assert shown["expert-shown"]["visible"] and shown["expert-shown"]["value"] == "theirs"
    assert shown["how-projection"]["value"] is not None
    assert "is-finished" in page.run(columns=["base", "spectr"])[-1][page.runner.layout.answers]


def test_the_file_of_a_candidate_is_gone_with_it(
    page: Pressed, save_expert: SaveExpert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    page.look(packed(save_expert("theirs", seed=7)))
    assert list(tmp_path.glob("spectr-*"))
    page.panel._libraries.leave()
    gc.collect()
    assert not list(tmp_path.glob("spectr-*"))
