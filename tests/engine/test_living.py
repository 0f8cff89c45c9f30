"""Experts come and go while the model runs."""

import gc
import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close

from spectr_demo.base import generic
from spectr_demo.config import GenerationSettings, RouterConfig
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.ordinary import Heard, Ordinary
from spectr_demo.engine.reading import Reader
from spectr_demo.engine.run import Step
from spectr_demo.experts.adapters import AdapterError
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.routers import calibrated_scores
from tests.conftest import IN_CONTEXT, BuildModel, SaveExpert

PROMPT = "Paint it red"
COLUMNS = ["base", "uniform", "spectr-paper", "arrow", "spectr-calibrated", IN_CONTEXT]
ORDINARY = ["How are you?", "Tell me of a walk in the rain", "What is new?", "1, 2, 3"]
MANY = 8
Change = Callable[[SpectrModel], object]


@pytest.fixture(autouse=True)
def few_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "generic_text.json"
    file.write_text(json.dumps({"bases": {"tiny": ORDINARY}}))
    monkeypatch.setattr(generic, "GENERIC_TEXT", file)


@pytest.fixture(scope="module")
def folders(save_expert: SaveExpert) -> dict[str, str]:
    """Experts of several ranks, on several layers."""
    return {
        "all": save_expert("all", seed=0),
        "attention": save_expert("attention", seed=1, r=2, target_modules=["q_proj", "v_proj"]),
        "query": save_expert("query", seed=2, r=8, target_modules=["q_proj"]),
        "wide": save_expert("wide", seed=3, r=6),
        "mlp": save_expert("mlp", seed=4, target_modules=["up_proj", "down_proj"]),
    }


def texts(model: SpectrModel, columns: Sequence[str | RouterConfig] = ("base",)) -> list[str]:
    step = model.compare(PROMPT, columns, record=False, max_new_tokens=6)
    return [column.text for column in step.columns]


def columns_of(names: Sequence[str]) -> list[str | RouterConfig]:
    return [*COLUMNS, *(f"single:{name}" for name in names)] if names else ["base"]


def statistics(found: Ordinary, name: str, model: SpectrModel) -> dict[tuple[str, int], Any]:
    """All that is known of one expert, by layer."""
    expert = model.library.index(name)
    return {
        (path, bank.run): [
            values[p, (bank.expert_ids == expert).nonzero().item()]
            for values in (
                found.detectors[bank].mean,
                found.detectors[bank].std,
                *(v for score in calibrated_scores() for v in found.calibration.of(bank, score)),
            )
        ]
        for bank in model.library.banks
        if expert in bank.expert_ids
        for p, path in enumerate(bank.paths)
    }


def assert_fresh(model: SpectrModel, fresh: SpectrModel) -> None:
    """What ordinary text tells is what it would tell a model that is loaded with these experts."""
    assert model.library.names == fresh.library.names
    found, expected = model.reader.ordinary, fresh.reader.ordinary
    assert_close(found.certainty, expected.certainty, atol=1e-4, rtol=1e-4)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    for one, other in zip(model.library.banks, fresh.library.banks, strict=True):
        inputs = x[:, : one.A.shape[1]]
        scores = found.detectors[one].scores(inputs), expected.detectors[other].scores(inputs)
        assert_close(*scores, atol=2e-3, rtol=2e-3)
        for score in calibrated_scores():
            of_both = found.calibration.of(one, score), expected.calibration.of(other, score)
            assert_close(*of_both, atol=1e-4, rtol=1e-4)


CHANGES: dict[str, Callable[[dict[str, str]], Change]] = {
    "add": lambda folders: lambda model: model.add([folders["wide"], folders["mlp"]]),
    "replace": lambda folders: lambda model: model.replace("query", folders["wide"]),
    "disable": lambda folders: lambda model: model.disable("attention"),
    "remove": lambda folders: lambda model: model.remove("attention"),
}


@contextmanager
def held(model: SpectrModel) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Between the two events the thread of the runs stands still."""
    stands, goes_on, main = threading.Event(), threading.Event(), threading.current_thread()

    def wait(*_: object) -> None:
        if threading.current_thread() is not main and stands.is_set():
            assert goes_on.wait(60)

    hook = model.model.model.register_forward_pre_hook(wait)
    try:
        yield stands, goes_on
    finally:
        goes_on.set()
        hook.remove()


@pytest.mark.parametrize("name", CHANGES)
def test_runs_end_with_the_experts_that_they_began_with(
    name: str, build_model: BuildModel, folders: dict[str, str]
) -> None:
    """Each is stopped in its middle while the library changes; `add` wraps layers meanwhile."""
    before = [folders["attention"], folders["query"]]
    model = build_model(before)
    columns: list[str | RouterConfig] = ["spectr", "single:attention", "spectr-calibrated", "arrow"]
    columns += ["uniform", "spectr-paper", "base", "norm"]
    options = GenerationSettings(max_new_tokens=80)
    expected = [model.generate(PROMPT, column, max_new_tokens=80) for column in columns]
    old = model.snapshot
    found: dict[int, Step] = {}

    with held(model) as (stands, goes_on):
        streams = [model.stream(PROMPT, [column], options) for column in columns]
        assert [next(stream).columns[0].num_tokens for stream in streams] == [1] * MANY
        stands.set()

        def work(i: int) -> None:
            found[i] = deque(streams[i], maxlen=1).pop()

        threads = [threading.Thread(target=work, args=(i,)) for i in range(MANY)]
        for thread in threads:
            thread.start()
        CHANGES[name](folders)(model)
        assert model.snapshot is not old and not found, "all of them were still running"
        goes_on.set()
        for thread in threads:
            thread.join()
    assert [found[i].columns[0].text for i in range(MANY)] == expected
    now = {
        "add": [*before, folders["wide"], folders["mlp"]],
        "replace": [before[0], f"query={folders['wide']}"],
    }.get(name, before[1:])
    fresh = build_model(now)
    assert texts(model, columns_of(fresh.library.names)) == texts(
        fresh, columns_of(fresh.library.names)
    )
    assert_fresh(model, fresh)


def test_a_run_that_has_not_read_yet_keeps_to_its_experts(
    build_model: BuildModel, folders: dict[str, str]
) -> None:
    """It begins when it is asked for, not with its first token."""
    model = build_model([folders["all"], folders["wide"]])
    expected = texts(model, [IN_CONTEXT, "uniform"])
    run = model.stream(PROMPT, [IN_CONTEXT, "uniform"], GenerationSettings(max_new_tokens=6))
    model.remove("all")
    assert [column.text for column in deque(run, maxlen=1).pop().columns] == expected
    assert texts(model, [IN_CONTEXT, "uniform"]) != expected


def memory_of(model: SpectrModel) -> list[StorageWeakRef]:
    return [
        StorageWeakRef(factors.untyped_storage())
        for bank in model.library.banks
        for factors in (bank.A, *bank.B, bank.singular_values)
    ]


def test_memory_comes_back_with_the_last_run(
    build_model: BuildModel, folders: dict[str, str]
) -> None:
    model = build_model([folders["all"], folders["query"]])
    texts(model, COLUMNS)
    memory = memory_of(model)
    stream = model.stream(PROMPT, COLUMNS, GenerationSettings(max_new_tokens=4), record=True)
    next(stream)
    model.remove("all")
    gc.collect()
    assert not any(each.expired() for each in memory), "a run uses them"
    deque(stream, maxlen=0)
    del stream
    gc.collect()
    assert all(each.expired() for each in memory)
    texts(model, COLUMNS)
    memory = memory_of(model)
    model.remove("query")
    gc.collect()
    assert memory and all(each.expired() for each in memory)


def test_only_new_experts_are_measured(
    build_model: BuildModel, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model([folders["all"], folders["attention"]])
    before = {name: statistics(model.reader.ordinary, name, model) for name in model.library.names}
    measured, of, read = [], Heard.of.__func__, Reader.read  # type: ignore[attr-defined]

    def spy(cls: type[Heard], bank: ExpertBank, *rest: Any) -> Heard:
        measured.append(len(bank.expert_ids))
        return of(cls, bank, *rest)  # type: ignore[no-any-return]

    def never(*_: object) -> None:
        raise AssertionError("the base reads again")

    monkeypatch.setattr(Heard, "of", classmethod(spy))
    assert model.add(folders["wide"]) == ("wide",)
    assert set(measured) == {1} and len(measured) == len(model.library.banks)
    new = statistics(model.reader.ordinary, "wide", model)
    for name, values in before.items():
        assert statistics(model.reader.ordinary, name, model) == values
    monkeypatch.setattr(Reader, "read", never)
    model.disable("wide")
    assert model.disabled == ("wide",) and model.library.names == ("all", "attention")
    with pytest.raises(ValueError, match="unknown expert 'wide'"):
        model.stream(PROMPT, ["single:wide"])
    model.disable("all")
    model.enable("wide")
    model.enable("all")
    assert model.library.names == ("all", "attention", "wide"), "each in its old place"
    assert statistics(model.reader.ordinary, "wide", model) == new
    model.remove("wide")
    with pytest.raises(AssertionError, match="the base reads again"):
        model.add(folders["wide"])
    assert model.library.names == ("all", "attention")
    monkeypatch.setattr(Reader, "read", read)
    model.replace("all", folders["wide"])
    assert_fresh(model, build_model([f"all={folders['wide']}", folders["attention"]]))


def test_nothing_is_measured_before_it_is_needed(
    build_model: BuildModel, folders: dict[str, str]
) -> None:
    model = build_model([folders["all"]])
    model.add(folders["wide"])
    assert not model.reader.is_measured
    assert_fresh(model, build_model([folders["all"], folders["wide"]]))


def _misfit(save_expert: SaveExpert) -> str:
    folder = Path(save_expert("misfit", seed=5))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_dora": True}))
    return str(folder)


@pytest.mark.parametrize("fault", ["adapter", "name", "memory", "reading"])
def test_an_add_that_fails_changes_nothing(
    fault: str,
    build_model: BuildModel,
    folders: dict[str, str],
    save_expert: SaveExpert,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither the runs that go on, nor what the next one has."""
    model = build_model([folders["attention"], folders["query"]])
    model.disable("query")
    expected, found = texts(model, COLUMNS), model.reader.ordinary
    snapshot, of_query = model.snapshot, model.disabled

    def broken(*_: object, **__: object) -> Any:
        raise MemoryError("no room")

    source: Sequence[str] = [folders["wide"]]
    error: type[Exception] = MemoryError
    match = "no room"
    with held(model) as (stands, _), monkeypatch.context() as patch:
        stream = model.stream(PROMPT, COLUMNS, GenerationSettings(max_new_tokens=6))
        next(stream)
        stands.set()
        if fault == "adapter":
            source, error, match = [folders["wide"], _misfit(save_expert)], AdapterError, "misfit"
        elif fault == "name":
            source, error = [folders["wide"], folders["query"]], AdapterError
            match = "expert 'query': there is one of this name already .* or replace the old one"
        elif fault == "memory":
            put, num = ExpertBank.put_, iter(range(3))

            def full(self: ExpertBank, *rest: Any) -> None:
                put(self, *rest) if next(num, None) is not None else broken()

            patch.setattr(ExpertBank, "put_", full)
        else:
            patch.setattr(Heard, "of", broken)
        with pytest.raises(error, match=match):
            model.add(source)
    assert model.snapshot is snapshot and model.reader.ordinary is found
    assert model.library.names == ("attention",) and model.disabled == of_query
    assert [column.text for column in deque(stream, maxlen=1).pop().columns] == expected
    assert texts(model, COLUMNS) == expected
    model.add(folders["wide"])  # what failed has left nothing in its way
    model.enable("query")
    now = ["attention", "query", "wide"]
    assert_fresh(model, build_model([folders[name] for name in now]))


def test_a_replacement_is_one_adapter_under_the_old_name(
    build_model: BuildModel, folders: dict[str, str], save_expert: SaveExpert, tmp_path: Path
) -> None:
    """Whatever the folders are called, such as `lr=1e-4`."""
    several = tmp_path / "several"
    old = save_expert("lr=1e-4", seed=6, folder=several)
    save_expert("other", seed=7, folder=several)
    model = build_model([Path(old)])
    with pytest.raises(AdapterError, match=r"'lr=1e-4': .*several has 2 adapters, needed one"):
        model.replace("lr=1e-4", several)
    model.replace("lr=1e-4", folders["wide"])
    assert model.library.names == ("lr=1e-4",)
    fresh = build_model([folders["wide"]])
    assert texts(model, ["single:lr=1e-4"]) == texts(fresh, ["single:wide"])


def test_without_the_last_expert_the_base_answers(
    build_model: BuildModel, folders: dict[str, str]
) -> None:
    model = build_model([folders["all"]])
    _ = model.reader.ordinary
    base = texts(model)
    model.remove("all")
    assert model.library.names == () and texts(model) == base
    with pytest.raises(ValueError, match="no expert to choose from"):
        texts(model, ["spectr"])
    with pytest.raises(ValueError, match="unknown expert 'all'; there is none"):
        model.enable("all")
    model.add(folders["mlp"])
    assert_fresh(model, build_model([folders["mlp"]]))


def test_a_name_that_no_expert_has(build_model: BuildModel, folders: dict[str, str]) -> None:
    model = build_model([folders["all"], folders["wide"]])
    model.disable("wide")
    changes: list[Change] = [
        lambda model: model.replace("wild", folders["mlp"]),
        lambda model: model.disable("wild"),
        lambda model: model.enable("wild"),
        lambda model: model.remove("wild"),
    ]
    for change in changes:
        with pytest.raises(ValueError, match=r"there is 'all', 'wide'\. Did you mean 'wide'"):
            change(model)
    model.disable("wide")
    model.enable("all")  # what is so already
    assert (model.library.names, model.disabled) == (("all",), ("wide",))


def test_a_variant_has_a_library_of_its_own(
    build_model: BuildModel, folders: dict[str, str]
) -> None:
    """Neither hears of the other's changes, also where one touches layers that the other does
    not."""
    model = build_model([folders["attention"], folders["query"]])
    before = texts(model, columns_of(model.library.names))
    variant, other = model.variant(), model.variant()
    assert variant.snapshot is model.snapshot, "it costs nothing before its first change"
    variant.add(folders["mlp"])
    variant.disable("query")
    other.remove("attention")
    fresh = build_model([folders["attention"], folders["mlp"]])
    assert texts(variant, columns_of(("attention", "mlp"))) == texts(
        fresh, columns_of(("attention", "mlp"))
    )
    assert_fresh(variant, fresh)
    assert_fresh(other, build_model([folders["query"]]))
    assert texts(model, columns_of(model.library.names)) == before
    assert (model.disabled, variant.disabled, other.disabled) == ((), ("query",), ())
    model.remove("attention")
    assert variant.library.names == ("attention", "mlp")
    assert texts(variant, ["single:attention"]) == texts(fresh, ["single:attention"])


def test_a_model_runs_the_snapshot_of_a_variant(
    build_model: BuildModel, folders: dict[str, str]
) -> None:
    model = build_model([folders["attention"]])
    variant = model.variant()
    variant.add(folders["wide"])
    options, columns = GenerationSettings(max_new_tokens=6), ["single:wide", "uniform"]
    run = model.stream(PROMPT, columns, options, snapshot=variant.snapshot)
    assert [c.text for c in deque(run, maxlen=1).pop().columns] == texts(variant, columns)
    with pytest.raises(ValueError, match="unknown expert 'wide'"):
        model.stream(PROMPT, columns, options)


def test_what_is_known_of_a_variants_experts_stays(
    build_model: BuildModel, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is gone, with all that it alone had."""
    model = build_model([folders["all"]])
    _ = model.reader.ordinary
    variant = model.variant()
    variant.add(folders["wide"])
    memory = memory_of(variant)

    def never(*_: object) -> None:
        raise AssertionError("the base reads again")

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read", never)
        model.disable("all")
        variant.disable("wide")
        variant.enable("wide")
        model.enable("all")
        model.add(folders["wide"])
        model.remove("wide")
    memory += memory_of(variant)
    del variant
    gc.collect()
    assert memory and all(each.expired() for each in memory)
    model.disable("all")  # a change, at which what nobody has is forgotten
    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read", never)
        model.enable("all")
        with pytest.raises(AssertionError, match="the base reads again"):
            model.add(folders["wide"])


def test_an_adapter_that_was_read_is_added(
    build_model: BuildModel, folders: dict[str, str]
) -> None:
    model = build_model([folders["all"]])
    wide = build_model([folders["wide"]]).library.adapters[0]
    assert model.add(wide) == ("wide",)
    with pytest.raises(AdapterError, match="there is one of this name already"):
        model.add(wide)
    model.replace("all", wide)
    fresh = build_model([f"all={folders['wide']}", folders["wide"]])
    assert texts(model, ["single:all", "uniform"]) == texts(fresh, ["single:all", "uniform"])


def test_any_changes_in_any_order(build_model: BuildModel, folders: dict[str, str]) -> None:
    """Against a list of names, and models that are loaded with just these adapters."""
    of_fresh: dict[tuple[str, ...], list[str]] = {}
    names = st.sampled_from(["red", "green", "blue"])
    sources = st.sampled_from(sorted(folders))

    def fresh(experts: dict[str, str]) -> list[str]:
        key = tuple(f"{name}={folders[source]}" for name, source in experts.items())
        if key not in of_fresh:
            of_fresh[key] = texts(build_model(list(key)), columns_of(list(experts)))
        return of_fresh[key]

    class Living(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.model = build_model([])
            self.experts: dict[str, str] = {}
            self.off: set[str] = set()
            self.running: list[tuple[Iterator[Step], list[str]]] = []

        @property
        def on(self) -> dict[str, str]:
            return {n: source for n, source in self.experts.items() if n not in self.off}

        def change(self, name: str, change: Callable[[], object]) -> bool:
            """Whether it was made."""
            if name in self.experts:
                change()
                return True
            with pytest.raises(ValueError, match=f"unknown expert '{name}'"):
                change()
            return False

        @rule(name=names, source=sources)
        def add(self, name: str, source: str) -> None:
            if name in self.experts:
                with pytest.raises(AdapterError, match=f"{name}': there is one of this name"):
                    self.model.add(f"{name}={folders[source]}")
            else:
                assert self.model.add(f"{name}={folders[source]}") == (name,)
                self.experts[name] = source

        @rule(name=names, source=sources)
        def replace(self, name: str, source: str) -> None:
            if self.change(name, lambda: self.model.replace(name, folders[source])):
                self.experts[name] = source

        @rule(name=names)
        def disable(self, name: str) -> None:
            if self.change(name, lambda: self.model.disable(name)):
                self.off.add(name)

        @rule(name=names)
        def enable(self, name: str) -> None:
            if self.change(name, lambda: self.model.enable(name)):
                self.off.discard(name)

        @rule(name=names)
        def remove(self, name: str) -> None:
            if self.change(name, lambda: self.model.remove(name)):
                del self.experts[name]
                self.off.discard(name)

        @rule()
        def begin(self) -> None:
            run = self.model.stream(
                PROMPT, columns_of(list(self.on)), GenerationSettings(max_new_tokens=6)
            )
            self.running.append((run, fresh(self.on)))

        @precondition(lambda self: self.running)
        @rule()
        def end(self) -> None:
            run, expected = self.running.pop(0)
            assert [column.text for column in deque(run, maxlen=1).pop().columns] == expected

        @rule()
        def answer(self) -> None:
            assert texts(self.model, columns_of(list(self.on))) == fresh(self.on)

        @invariant()
        def names_are_known(self) -> None:
            assert self.model.library.names == tuple(self.on)
            assert self.model.disabled == tuple(n for n in self.experts if n in self.off)

        def teardown(self) -> None:
            while self.running:
                self.end()
            self.answer()

    run_state_machine_as_test(
        Living,
        settings=settings(
            max_examples=30,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
