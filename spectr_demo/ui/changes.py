"""Experts that come and go, on the tab of experts: looked at first, then added; disabled, enabled,
replaced, removed. For this visitor's page, or by the owner for all.
"""

import contextvars
import html
import logging
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import gradio as gr

from spectr_demo.config import has_uploads, hub_patterns, listens_here_only, owner_token
from spectr_demo.cpu.threads import release_threads
from spectr_demo.engine.model import SpectrModel
from spectr_demo.experts.adapters import Adapter, local_folder
from spectr_demo.experts.archives import MOST_ZIP_BYTES, read_zipped
from spectr_demo.experts.fit import fit_adapters
from spectr_demo.experts.inspection import ALIKE
from spectr_demo.experts.library import read_adapters
from spectr_demo.experts.messages import AdapterError, shown
from spectr_demo.experts.preflight import Candidate
from spectr_demo.ui import cards
from spectr_demo.ui.libraries import Libraries, is_owner
from spectr_demo.ui.line import TICK, Line, in_line
from spectr_demo.ui.lists import ExpertLists, Updates
from spectr_demo.ui.run import Waiting
from spectr_demo.ui.uploads import Upload, Uploads
from spectr_demo.ui.visitors import visitor
from spectr_demo.web import log_fault

logger = logging.getLogger(__name__)

Kind = Literal["zip", "hub", "folder"]
Who = Literal["page", "all"]
NUM_NEAREST = 3
_NAME = re.compile(r"\w[\w.+-]{0,59}")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?:/[\w.-]+)*")
_KINDS: dict[Kind, str] = {"zip": "a zip file", "hub": "the Hub", "folder": "a folder here"}
Facts = Callable[[Adapter, Mapping[str, str]], str]
T = TypeVar("T")


@dataclass(frozen=True)
class Done(Generic[T]):
    """What came of a piece of work, and how many seconds it took."""

    result: T
    seconds: float


def timed(work: Callable[[], T]) -> Generator[float | Done[T], None, None]:
    """The seconds that it takes so far, now and then, and at last what came of it. Closing it waits
    for its end."""
    start = time.monotonic()

    def alone() -> T:
        try:
            return work()
        finally:
            release_threads()

    visible = contextvars.copy_context()  # who the visitor is
    with ThreadPoolExecutor(1, thread_name_prefix="experts") as pool:
        going = pool.submit(visible.run, alone)
        while not wait([going], TICK).done:
            yield time.monotonic() - start
    yield Done(going.result(), time.monotonic() - start)


def _refusing(work: Callable[[], T]) -> Callable[[], T]:
    """The same work, whose ValueErrors count as refusals."""

    def refused() -> T:
        try:
            return work()
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return refused


def may_change() -> bool:
    """Whether there may be anyone who can change something."""
    return has_uploads() or bool(owner_token())


def kinds() -> list[Kind]:
    """From where adapters may come: folders only for the owner, or where the server is the
    visitor's own machine."""
    has_folders = bool(owner_token()) or listens_here_only()
    is_there = {"zip": True, "hub": bool(hub_patterns()), "folder": has_folders}
    return [kind for kind in _KINDS if is_there[kind]]


def check_may(*, token: str, for_all: bool) -> None:
    """Raise ValueError where this visitor may not change this."""
    if is_owner(token):
        return
    if token and owner_token():
        raise ValueError("this is not the owner's token; write it again, or leave it empty")
    if for_all:
        raise ValueError("only the owner may change the experts of all: give the owner's token")
    if not has_uploads():
        raise ValueError("only the owner may change experts here: give the owner's token")


def check_source(kind: Kind, where: str, token: str) -> None:
    """Raise ValueError for a place from which this visitor may take nothing."""
    if kind == "folder":
        is_mine = listens_here_only() and not owner_token() and visitor().is_here
        if not (is_mine or is_owner(token)):
            raise ValueError("only the owner may name a folder of the server: send a zip file")
        if not where:
            raise ValueError("no folder is given: write its path")
        if local_folder(where) is None:
            raise ValueError(f"there is no folder {shown(where)} on this machine")
    if kind == "hub":
        if not _HUB_ID.fullmatch(where) or ".." in where:
            raise ValueError(f"{shown(where)!r} is no Hub id; write one, such as owner/name")
        owner, name, *_ = where.split("/")
        patterns = [pattern.partition("/") for pattern in hub_patterns()]
        if not any(fnmatchcase(owner, o) and fnmatchcase(name, n) for o, _, n in patterns):
            raise ValueError(
                f"{where} is not among the repositories that may be added here "
                f"({', '.join(hub_patterns()) or 'none'})"
            )
        if local_folder(where) is not None:
            raise ValueError(f"{where} is a folder of the server, too: it cannot be told apart")


def name_for(given: str, kind: Kind, where: str) -> str:
    """The name of an expert. Raises ValueError for one that is none.

    given: what the visitor wrote. where: from where it comes, which else names it.
    """
    if not given:
        last = Path(where).stem if kind == "zip" else Path(where.rstrip("/")).name
        return re.sub(r"^\W+|[^\w.+-]", "_", last)[:60] or "expert"
    if not _NAME.fullmatch(given):
        raise ValueError(
            f"{shown(given)!r} is no name for an expert; it has up to 60 letters, digits and "
            "- _ . + , and begins with a letter or digit"
        )
    return given


def read_candidate(
    model: SpectrModel, kind: Kind, where: str, name: str, upload: Upload | None
) -> Candidate:
    """Read, check and align an adapter. Raises AdapterError with all that is wrong with it."""
    config = model.model.config
    if kind == "zip":
        assert upload is not None
        label = f"{name}.zip"
        adapter = read_zipped(
            upload.file, name, label, lambda a: fit_adapters([a], config).problems
        )
        found, problems = fit_adapters([adapter], config)
    else:
        found, problems = read_adapters(where, config)
    if problems:
        raise AdapterError(problems)
    if len(found) != 1:
        raise AdapterError([f"{shown(where)} has {len(found)} adapters: name the folder of one"])
    return Candidate.of(replace(found[0], name=name), model.library)


# What is shown


def report(candidate: Candidate, known: tuple[str, ...], facts: Facts) -> str:
    """What would be added. known: names of experts that there are. facts: what its files say."""
    adapter, (low, high) = candidate.adapter, candidate.scaling
    near = candidate.overlaps[:NUM_NEAREST]
    more = {
        "Scaling": f"{low:g}" if low == high else f"{low:g} to {high:g}",
        "Nearest": ", ".join(f"{name} ({overlap:.0%} the same)" for name, overlap in near)
        or "none shares a layer with it",
    }
    warned = [
        f"{name} responds to the same inputs: no router here can tell them apart"
        for name, overlap in near
        if overlap >= ALIKE
    ]
    if adapter.name in known:
        warned.append(
            f"there is an expert {adapter.name} already: give this one another name and look "
            "again, or replace that one"
        )
    items = "".join(f"<li>{html.escape(each)}</li>" for each in warned)
    listed = f'<ul class="warnings" role="note">{items}</ul>' if items else ""
    return (
        f'<div class="report" role="status"><h3>{html.escape(adapter.name)} fits this base'
        f"{': it can be added' if adapter.name not in known else ''}</h3>{listed}"
        f"{facts(adapter, more)}</div>"
    )


def whose(libraries: Libraries) -> str:
    """Whose experts this page has, in words."""
    if not libraries.is_own:
        return '<p class="caption">This page has the experts of all.</p>'
    of_all = {a.name: a.sha256 for a in libraries.shared.adapters}
    own = {a.name: a.sha256 for a in libraries.model.adapters}
    parts = {
        "added": [name for name in own if name not in of_all],
        "replaced": [n for n, digest in own.items() if of_all.get(n, digest) != digest],
        "disabled": [n for n in libraries.model.disabled if n not in libraries.shared.disabled],
        "enabled": [n for n in libraries.shared.disabled if n in libraries.model.library.names],
        "removed": [name for name in of_all if name not in own],
    }
    told = "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)
    behind = (
        " Those of all have changed since: <b>Back to the experts of all</b> takes them."
        if libraries.is_behind
        else ""
    )
    return (
        f'<p class="caption">This page has experts of its own ({html.escape(told) or "as all"}). '
        f"Nobody else has them. They end with this page.{behind}</p>"
    )


def _goes_on(item: Waiting | float, what: str) -> str:
    """Where somebody stands who waits, or for how long it goes on."""
    if isinstance(item, Waiting):
        return cards.in_line(item) if item.place > 1 else f"{what} …"
    return f"{what} … {item:.0f} s"


def _targets(model: SpectrModel, chosen: str = "") -> dict[str, Any]:
    """The experts that can be changed, disabled ones too."""
    names = [adapter.name for adapter in model.adapters]
    first = names[0] if names else None
    return {
        "choices": [(f"{n} (disabled)" if n in model.disabled else n, n) for n in names],
        "value": chosen if chosen in names else first,
    }


def _file_field() -> str:
    return (
        '<label class="file"><span>Zip file of an adapter’s folder, up to '
        f"{MOST_ZIP_BYTES / 1e6:.0f} MB</span>"
        '<input type="file" accept=".zip,application/zip" id="zip"></label>'
        '<p class="caption" id="zip-sent" role="status"></p>'
    )


class Panel:
    """The components, and what happens when they are used."""

    def __init__(
        self,
        libraries: Libraries,
        line: Line,
        uploads: Uploads,
        facts: Facts,
    ) -> None:
        """facts: what an adapter's files say, as HTML."""
        self._libraries, self._line, self._uploads = libraries, line, uploads
        self._facts = facts
        self._lay_out()

    def _lay_out(self) -> None:
        model = self._libraries.model
        has_owner = bool(owner_token())
        with gr.Accordion("Add or change experts", open=False, elem_id="changes"):
            self.whose = gr.HTML(whose(self._libraries), elem_id="changes-whose")
            with gr.Row(visible=has_owner):
                self.who = gr.Radio(
                    label="For whom",
                    choices=[("this page alone", "page"), ("all visitors (the owner)", "all")],
                    value="page" if has_uploads() else "all",
                    min_width=140,
                    elem_id="changes-for",
                )
                self.token = gr.Textbox(
                    label="Owner’s token",
                    info="what SPECTR_OWNER_TOKEN says",
                    type="password",
                    min_width=140,
                    elem_id="changes-token",
                )
            gr.HTML('<h3 class="asked">Add an adapter</h3>')
            with gr.Row():
                self.kind = gr.Radio(
                    label="From",
                    choices=[(_KINDS[kind], kind) for kind in kinds()],
                    value="zip",
                    min_width=140,
                    elem_id="changes-kind",
                )
                self.name = gr.Textbox(
                    label="Name",
                    info="empty: that of the file, folder or repository",
                    max_length=60,
                    min_width=140,
                    elem_id="changes-name",
                )
            self.zip = gr.HTML(_file_field(), elem_id="changes-zip")
            self.where = gr.Textbox(visible=False, elem_id="changes-where")
            self.sent = gr.Textbox(visible=False)  # a ticket, which the script gives
            with gr.Row(elem_classes="acts"):
                self.look = gr.Button("Look at it", elem_id="changes-look")
                self.add = gr.Button(
                    "Add it", variant="primary", interactive=False, elem_id="changes-add"
                )
            self.added = gr.HTML(visible=False, elem_id="changes-added", elem_classes="said")
            self.report = gr.HTML(elem_id="changes-report")
            gr.HTML('<h3 class="asked">Change an expert</h3>')
            self.target = gr.Dropdown(
                label="Expert", **_targets(model), filterable=True, elem_id="changes-expert"
            )
            with gr.Row(elem_classes="acts"):
                self.disable = gr.Button("Disable", elem_id="changes-disable")
                self.enable = gr.Button("Enable", elem_id="changes-enable")
                self.replace = gr.Button(
                    "Replace by the above", interactive=False, elem_id="changes-replace"
                )
                self.remove = gr.Button("Remove", elem_id="changes-remove")
                self.back = gr.Button(
                    "Back to the experts of all", visible=False, elem_id="changes-back"
                )
            self.notice = gr.HTML(visible=False, elem_id="changes-notice", elem_classes="said")

    def wire(
        self, lists: ExpertLists, queue: dict[str, Any], redraw: Callable[[Any], None]
    ) -> None:
        """lists: all that tells which experts there are. queue: of all that uses the model. redraw:
        has what is drawn of an expert follow an event."""
        self._lists = lists
        lists.add([self.target, self.whose, self.back], self._shows)
        allowed: dict[str, Any] = {"who": self.who, "token": self.token}
        asked = {"kind": self.kind, "where": self.where, "name": self.name, "sent": self.sent}
        of_one: dict[str, Any] = {"target": self.target}
        own = [self.added, self.notice, self.report, self.add, self.replace]
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        self.kind.input(self._ask_for, self.kind, [self.zip, self.where], queue=False, **private)
        self.look.click(
            self.looking,
            inputs_kwargs=allowed | asked,
            outputs=[*own, self.look],
            js="(...values) => window.spectr.send(values)",
            **private,
            **queue,
        )
        outputs = [*own, *lists.components]
        handlers: list[tuple[gr.Button, Callable[..., Iterator[Updates]], dict[str, Any]]] = [
            (self.add, self.adding, allowed),
            (self.replace, self.replacing, allowed | of_one),
            (self.disable, self.disabling, allowed | of_one),
            (self.enable, self.enabling, allowed | of_one),
            (self.remove, self.removing, allowed | of_one),
        ]
        for button, handler, inputs in handlers:
            redraw(button.click(handler, None, outputs, inputs_kwargs=inputs, **private, **queue))
        redraw(self.back.click(self.going_back, None, outputs, **private))

    def _shows(self, model: SpectrModel) -> Updates:
        return {
            self.target: gr.update(**_targets(model)),
            self.whose: whose(self._libraries),
            self.back: gr.update(visible=self._libraries.is_own),
        }

    def _ask_for(self, kind: Kind) -> Updates:
        told = {"hub": ("Hub id", "such as owner/name"), "folder": ("Folder", "a path here")}
        label, info = told.get(kind, ("", ""))
        return {
            self.zip: gr.update(visible=kind == "zip"),
            self.where: gr.update(visible=kind != "zip", label=label, info=info),
        }

    # What is pressed

    def looking(
        self, who: Who, token: str, kind: Kind, where: str, name: str, sent: str
    ) -> Iterator[Updates]:
        """Read an adapter, and tell what it is. Nothing is added."""

        def start() -> Callable[[], Candidate]:
            check_may(token=token, for_all=who == "all")
            if kind not in kinds():
                raise ValueError(f"nothing can be added from {shown(kind)!r}")
            upload = self._sent(sent) if kind == "zip" else None
            place = upload.name if upload else where.strip()
            check_source(kind, place, token)
            called = name_for(name.strip(), kind, place)
            model = self._model(who)
            return lambda: read_candidate(model, kind, place, called, upload)

        def end(done: Done[Candidate]) -> Updates:
            self._libraries.propose(done.result)
            known = tuple(adapter.name for adapter in self._model(who).adapters)
            is_new = done.result.adapter.name not in known
            return {
                self.report: report(done.result, known, self._facts),
                self.add: gr.update(interactive=is_new),
                self.replace: gr.update(interactive=True),
                self.added: gr.update(visible=False),
            }

        yield {self.look: gr.update(interactive=False)}
        for updates in self._going(start, end, "reading it", self.added):
            yield {self.look: gr.skip(), **updates}
        yield {self.look: gr.update(interactive=True)}

    def adding(self, who: Who, token: str) -> Iterator[Updates]:
        yield from self._changing(
            who,
            token,
            lambda: self._libraries.add(for_all=who == "all"),
            "{} was added",
            self.added,
        )

    def replacing(self, who: Who, token: str, target: str | None) -> Iterator[Updates]:
        name = target or ""

        def put() -> str:
            self._libraries.replace(name, for_all=who == "all")
            return name

        yield from self._changing(who, token, put, "{} was replaced")

    def disabling(self, who: Who, token: str, target: str | None) -> Iterator[Updates]:
        change = self._change_of(who, target, lambda m, name: m.disable(name))
        yield from self._changing(who, token, change, "{} was disabled")

    def enabling(self, who: Who, token: str, target: str | None) -> Iterator[Updates]:
        change = self._change_of(who, target, lambda m, name: m.enable(name))
        yield from self._changing(who, token, change, "{} was enabled")

    def removing(self, who: Who, token: str, target: str | None) -> Iterator[Updates]:
        change = self._change_of(who, target, lambda m, name: m.remove(name))
        yield from self._changing(who, token, change, "{} was removed")

    def going_back(self) -> Updates:
        self._libraries.take_that_of_all()
        return self._told("This page has the experts of all again.", self.notice)

    # How it goes

    def _model(self, who: Who) -> SpectrModel:
        return self._libraries.shared if who == "all" else self._libraries.model

    def _sent(self, ticket: str) -> Upload:
        """What the script sent. It says itself why there is no ticket."""
        upload = self._uploads.take(ticket)
        if upload is None:
            problem = ticket.removeprefix("!") if ticket.startswith("!") else ""
            raise ValueError(shown(problem) or "no file was sent: choose a zip file")
        return upload

    def _change_of(
        self, who: Who, target: str | None, change: Callable[[SpectrModel, str], Any]
    ) -> Callable[[], str]:
        name = target or ""

        def work() -> str:
            self._libraries.change(lambda model: change(model, name), for_all=who == "all")
            return name

        return work

    def _changing(
        self,
        who: Who,
        token: str,
        work: Callable[[], str],
        words: str,
        notice: gr.HTML | None = None,
    ) -> Iterator[Updates]:
        """notice: where it is told; None is below the buttons that change an expert."""
        notice = notice or self.notice

        def start() -> Callable[[], str]:
            check_may(token=token, for_all=who == "all")
            return work

        def end(done: Done[str]) -> Updates:
            name = f"<b>{html.escape(done.result)}</b>"
            whom = "all visitors" if who == "all" else "this page"
            told = f"✓ {words.format(name)} for {whom}, in {done.seconds:.1f} s."
            return self._told(told, notice, done.result)

        what = "changing the library, and measuring what is new"
        yield from self._going(start, end, what, notice)

    def _told(self, message: str, notice: gr.HTML, target: str = "") -> Updates:
        """After a change: all that tells which experts there are, and what was done. target: which
        expert to offer next, if it is still there."""
        libraries = self._libraries
        libraries.news()  # it is shown here
        has_candidate = libraries.candidate is not None
        return {
            **self._lists.of(libraries.model),
            self.target: gr.update(**_targets(libraries.model, target)),
            **{each: gr.update(visible=False) for each in (self.added, self.notice)},
            notice: gr.update(value=f'<p role="status">{message}</p>', visible=True),
            self.report: gr.skip() if has_candidate else "",
            self.add: gr.skip() if has_candidate else gr.update(interactive=False),
            self.replace: gr.skip() if has_candidate else gr.update(interactive=False),
        }

    def _going(
        self,
        start: Callable[[], Callable[[], T]],
        end: Callable[[Done[T]], Updates],
        what: str,
        notice: gr.HTML,
    ) -> Iterator[Updates]:
        """Stand in line, work, and show what came of it. start: checks, and gives the work. What
        fails is one message, and changes nothing. notice: where it is told."""

        def failed(message: str) -> Updates:
            return {notice: gr.update(value=cards.notice(message), visible=True)}

        try:
            work = _refusing(start())
            with closing(in_line(timed, self._line)(work)) as going:
                for item in going:
                    if isinstance(item, Done):
                        yield end(item)
                        continue
                    words = f'<p class="caption">{_goes_on(item, what)}</p>'
                    yield {notice: gr.update(value=words, visible=True)}
        except gr.Error as error:
            yield failed(error.message)
        except ValueError as error:
            yield failed(str(error))
        except Exception as error:
            log_fault(logger, "a change of experts failed", error)
            yield failed(f"It failed ({type(error).__name__}), and nothing was changed.")
