"""Runs that go on at once are rows of one batch, and each writes what it writes alone."""

import gc
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import Gemma2Config, LlamaConfig, LlamaForCausalLM

from spectr_demo.config import GenerationSettings, Intervention, RouterConfig
from spectr_demo.engine import batch
from spectr_demo.engine.decoding import Decoding, rows_can_join
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.run import Run, Step
from spectr_demo.routing.routers import parse_router
from spectr_demo.trace import RoutingTrace
from tests.conftest import IN_CONTEXT, wait_until

PROMPTS = ["hello", "Paint it red, and then blue", "What is new? Tell me more of it, if you can."]
CHANGED = RouterConfig(
    name="spectr",
    intervention=Intervention(kind="ban", expert="red", from_token=3),
)
COLUMNS: list[list[str | RouterConfig]] = [
    ["base"],
    ["single:red"],
    ["uniform", "spectr-paper", "lag"],
    ["spectr", "arrow"],
    ["spectr-calibrated"],
    [IN_CONTEXT, "single:blue"],
    [CHANGED, "norm"],
]


def last(stream: Iterator[Step]) -> Step:
    return deque(stream, maxlen=1).pop()


class Paced:
    """The thread of the batch, a pass at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes = threading.Semaphore(0)
        self.num_begun = 0
        read, begin = batch.Batch._read, batch.Batch._begin

        def paced_read(it: batch.Batch) -> None:
            assert self.passes.acquire(timeout=60)
            read(it)

        def counted_begin(it: batch.Batch, run: Run) -> None:
            begin(it, run)
            self.num_begun += 1

        monkeypatch.setattr(batch.Batch, "_read", paced_read)
        monkeypatch.setattr(batch.Batch, "_begin", counted_begin)

    def let(self, num_passes: int) -> None:
        for _ in range(num_passes):
            self.passes.release()

    def begun(self, stream: Iterator[Step]) -> Step:
        """A run's first step; those before it go on meanwhile, as far as they must."""
        found: list[Step] = []
        thread = threading.Thread(target=lambda: found.append(next(stream)))
        thread.start()
        while thread.is_alive():
            self.let(1)
            thread.join(0.02)
        return found[0]

    def go_on(self) -> None:
        self.let(10_000)


Asked = tuple[str, list[str | RouterConfig], GenerationSettings, bool]


def alone(model: SpectrModel, asked: Asked) -> Step:
    prompt, columns, options, record = asked
    return last(model.stream(prompt, columns, options, record=record, trace_every=4))


def together(model: SpectrModel, some: Sequence[Asked], waits: Sequence[int]) -> list[Step]:
    """waits: tokens that those before write first."""
    with pytest.MonkeyPatch.context() as patch:
        pace = Paced(patch)
        streams = []
        for (prompt, columns, options, record), num in zip(some, waits, strict=True):
            pace.let(num)
            stream = model.stream(prompt, columns, options, record=record, trace_every=4)
            streams.append((stream, pace.begun(stream)))
        pace.go_on()
        return [last(stream) if not step.is_last else step for stream, step in streams]


def assert_same(found: Step, expected: Step) -> None:
    for one, other in zip(found.columns, expected.columns, strict=True):
        assert (one.text, one.num_tokens, one.is_cut) == (
            other.text,
            other.num_tokens,
            other.is_cut,
        )
    assert found.expert_shares == expected.expert_shares
    if expected.trace is None:
        assert found.trace is None
        return
    assert found.trace is not None
    assert_same_trace(found.trace, expected.trace)


def assert_same_trace(found: RoutingTrace, expected: RoutingTrace) -> None:
    for one, other in zip(found.columns, expected.columns, strict=True):
        assert (one.label, one.tokens) == (other.label, other.tokens)
        assert np.array_equal(one.token_ids, other.token_ids)
        assert np.array_equal(one.experts, other.experts)
        for name in ("weights", "scores", "logprob", "entropy", "kl"):
            np.testing.assert_allclose(
                getattr(one, name), getattr(other, name), atol=2e-4, rtol=2e-4, err_msg=name
            )


a_run = st.tuples(
    st.sampled_from(PROMPTS),
    st.sampled_from(COLUMNS),
    st.builds(
        GenerationSettings,
        max_new_tokens=st.integers(1, 14),
        temperature=st.sampled_from([0.0, 1.3]),
        seed=st.integers(0, 3),
    ),
    st.booleans(),
)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.tuples(a_run, st.integers(0, 5)), min_size=2, max_size=5))
def test_a_run_writes_what_it_writes_alone(
    routed_model: SpectrModel, some: list[tuple[Asked, int]]
) -> None:
    asked = [each for each, _ in some]
    found = together(routed_model, asked, [num for _, num in some])
    for one, each in zip(found, asked, strict=True):
        assert_same(one, alone(routed_model, each))


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> Iterator[Paced]:
    paced = Paced(monkeypatch)
    yield paced
    paced.go_on()  # whoever waits still


LONG = GenerationSettings(max_new_tokens=40)


def test_all_of_them_go_on_at_once(routed_model: SpectrModel, pace: Paced) -> None:
    streams = [routed_model.stream("hello", ["base"], LONG) for _ in range(batch.MOST_RUNS + 1)]
    firsts: list[Step] = []
    threads = [
        threading.Thread(target=lambda s=stream: firsts.append(next(s))) for stream in streams
    ]
    pace.let(20)
    for thread in threads:
        thread.start()
    wait_until(lambda: pace.passes._value == 0)  # all that were let read
    assert routed_model.most_runs == pace.num_begun == batch.MOST_RUNS
    pace.go_on()  # one ends, and the last one begins
    for thread in threads:
        thread.join()
    assert len({last(stream).columns[0].text for stream in streams}) == 1


def test_rows_beyond_the_most_wait(
    routed_model: SpectrModel, pace: Paced, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "MOST_ROWS", 3)
    first = routed_model.stream("hello", ["base", "base"], LONG)
    next(first)
    second = routed_model.stream("hello", ["base", "spectr"], LONG)
    waits = threading.Thread(target=next, args=(second,))
    waits.start()
    pace.let(10)
    wait_until(lambda: pace.passes._value == 0)
    assert pace.num_begun == 1 and waits.is_alive()
    pace.go_on()
    last(first)
    waits.join()
    last(second)


@pytest.mark.parametrize("record", [False, True])
def test_one_that_is_closed_leaves_the_others(
    routed_model: SpectrModel, pace: Paced, record: bool
) -> None:
    columns: list[str | RouterConfig] = ["spectr", "single:red"]
    streams = [routed_model.stream(prompt, columns, LONG, record=record) for prompt in PROMPTS]
    for stream in streams:
        pace.begun(stream)
    closed = threading.Thread(target=streams[1].close)
    closed.start()
    pace.go_on()
    closed.join()
    found = [last(streams[0]), last(streams[2])]
    for step, prompt in zip(found, (PROMPTS[0], PROMPTS[2]), strict=True):
        assert_same(step, alone(routed_model, (prompt, columns, LONG, record)))


def test_one_that_is_closed_before_it_begins_never_does(
    routed_model: SpectrModel, pace: Paced, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "MOST_RUNS", 1)
    first = routed_model.stream("hello", ["base"], LONG)
    next(first)
    second = routed_model.stream("hello", ["base"], LONG)
    ended = threading.Event()

    def leave() -> None:
        run = second.gi_frame.f_locals["self"]  # type: ignore[attr-defined]
        run.is_cancelled.set()
        assert not list(second)
        ended.set()

    threading.Thread(target=leave).start()
    pace.let(3)
    assert ended.wait(30) and pace.num_begun == 1
    pace.go_on()
    assert last(first).is_last


def test_an_error_of_one_is_its_own(
    routed_model: SpectrModel, pace: Paced, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, take = Run.begin, Run.take

    def broken_begin(run: Run) -> Decoding:
        if run.settings.seed == 1:
            raise RuntimeError("no memory for the prompt")
        return begin(run)

    def broken_take(run: Run, *args: Any) -> Any:
        if run.settings.seed == 2 and run.rows[0].answer[3:]:
            raise RuntimeError("no memory for a token")
        return take(run, *args)

    monkeypatch.setattr(Run, "begin", broken_begin)
    monkeypatch.setattr(Run, "take", broken_take)
    good = routed_model.stream("hello", ["spectr"], LONG, record=True)
    next(good)
    breaks = routed_model.stream("hello", ["base"], GenerationSettings(seed=2))
    pace.begun(breaks)
    never = routed_model.stream("hello", ["base"], GenerationSettings(seed=1))
    pace.go_on()
    with pytest.raises(RuntimeError, match="for a token"):
        last(breaks)
    with pytest.raises(RuntimeError, match="for the prompt"):
        last(never)
    assert_same(last(good), alone(routed_model, ("hello", ["spectr"], LONG, True)))


def test_an_error_of_a_pass_is_everybodys_and_the_next_run_goes_on(
    routed_model: SpectrModel, pace: Paced, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [routed_model.stream(prompt, ["spectr"], LONG) for prompt in PROMPTS]
    for stream in streams:
        pace.begun(stream)

    def broken(decoding: Decoding, tokens: torch.Tensor) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Decoding, "read", broken)
        pace.go_on()
        for stream in streams:
            with pytest.raises(RuntimeError, match="no memory"):
                last(stream)
    assert alone(routed_model, ("hello", ["spectr"], LONG, False)).is_last


def test_a_run_of_a_changed_library_waits_and_is_not_overtaken(
    routed_model: SpectrModel, pace: Paced
) -> None:
    first = routed_model.stream("hello", ["uniform"], LONG)
    next(first)
    routed_model.disable("red")
    changed = routed_model.stream("hello", ["uniform"], LONG)
    later = routed_model.stream("hello", ["spectr"], LONG)
    threads = [threading.Thread(target=next, args=(each,)) for each in (changed, later)]
    for thread in threads:
        thread.start()
        pace.let(5)
        wait_until(lambda: pace.passes._value == 0)
    assert pace.num_begun == 1
    pace.go_on()
    for thread in threads:
        thread.join()
    found = [last(each) for each in (first, changed, later)]
    assert_same(found[1], alone(routed_model, ("hello", ["uniform"], LONG, False)))
    assert_same(found[2], alone(routed_model, ("hello", ["spectr"], LONG, False)))
    routed_model.enable("red")
    assert_same(found[0], alone(routed_model, ("hello", ["uniform"], LONG, False)))


def test_memory_is_free_once_a_run_has_ended(routed_model: SpectrModel, pace: Paced) -> None:
    def keys(stream: Iterator[Step]) -> StorageWeakRef:
        return StorageWeakRef(
            routed_model._batch._decoding.options["past_key_values"]
            .layers[0]
            .keys.untyped_storage()
        )

    streams = [routed_model.stream(p, ["spectr"], LONG, record=True) for p in PROMPTS[:2]]
    for stream in streams:
        pace.begun(stream)
    wait_until(lambda: len(routed_model._batch._runs) == 2)
    held = keys(streams[0])
    pace.go_on()
    for stream in streams:
        last(stream)
    del streams, stream
    gc.collect()
    assert held.expired()
    wait_until(lambda: not routed_model._batch._is_working)
    assert routed_model._batch._decoding is None


def test_what_else_reads_is_called_between_two_tokens(routed_model: SpectrModel) -> None:
    stream = routed_model.stream("hello", ["base"], LONG)
    next(stream)
    names = [routed_model.between_tokens(lambda: threading.current_thread().name) for _ in range(2)]
    assert names == ["batch"] * 2
    with pytest.raises(KeyError, match="nothing there"):
        routed_model.between_tokens(_fail)
    ids = routed_model.encode("hello")  # one that is called may ask for another
    router = parse_router("spectr", routed_model.library.names)
    lanes = routed_model.between_tokens(lambda: routed_model.lanes(router, ids))
    assert [lane.ids for lane in lanes] == [ids]
    assert last(stream).is_last


def test_one_that_is_freed_by_the_thread_of_the_runs_ends(routed_model: SpectrModel) -> None:
    """As the collector of circles may do, in whichever thread it comes to run."""
    stream, other = (routed_model.stream("hello", ["base"], LONG) for _ in range(2))
    next(stream), next(other)
    routed_model.between_tokens(stream.close)  # type: ignore[attr-defined]
    assert last(other).is_last
    wait_until(lambda: not routed_model._batch._is_working)


def _fail() -> None:
    raise KeyError("nothing there")


SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def long_rope() -> LlamaForCausalLM:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=scaling))


def windows() -> Any:
    from transformers import Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16, sliding_window=4))


@pytest.mark.parametrize(
    ("make", "can_join"),
    [
        (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), True),
        (long_rope, False),
        (windows, False),
    ],
)
def test_which_bases_take_rows_in(make: Callable[[], Any], can_join: bool) -> None:
    assert rows_can_join(make().eval()) is can_join
