"""Two replicas of a tiny base: many clients, a replica that dies, experts that change."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any

import openai
import pytest

from spectr_demo.config import GenerationSettings, RouterConfig
from spectr_demo.engine.listing import Listing
from spectr_demo.engine.model import SpectrModel, load
from spectr_demo.replicas import ReplicatedModel
from tests.conftest import SaveExpert
from tests.deploy.watched import LATE, SLOW, Seen, watched
from tests.serving.conftest import ServeModel

pytestmark = pytest.mark.slow

COLUMNS = ["base", "single:green", "spectr-paper", "uniform"]
FEW, MANY = GenerationSettings(max_new_tokens=6), GenerationSettings(max_new_tokens=300)
PATIENCE = 180.0  # seconds; on a busy machine a replica starts late


@pytest.fixture(scope="module")
def front(ray: Any, base_folder: str, expert_folders: list[str]) -> Iterator[ReplicatedModel]:
    with watched(base_folder, expert_folders, least=2) as front:
        yield front


@pytest.fixture(scope="module")
def alone(front: ReplicatedModel, base_folder: str, expert_folders: list[str]) -> SpectrModel:
    """The same model in this process."""
    return load(base_folder, expert_folders)


@pytest.fixture(autouse=True)
def two_replicas(front: ReplicatedModel, expert_folders: list[str]) -> Iterator[None]:
    """Each test begins with both replicas at rest, and leaves the experts as they were."""
    wait_for(lambda: len(seen(front)) == 2 and not any(r.num_going for r in seen(front)))
    before = front.listing
    yield
    if front.listing != before:
        front.become(before)


def seen(front: ReplicatedModel) -> list[Seen]:
    """What each replica says; one that dies says nothing."""
    told = front._handle.broadcast("seen").results(timeout_s=PATIENCE, return_exceptions=True)
    return [each for each in told if isinstance(each, Seen)]


def wait_for(is_so: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := is_so()):
        assert time.monotonic() < end, "it has not come true"
        time.sleep(0.1)
    return found


def kill(replica: Seen) -> None:
    os.kill(replica.pid, signal.SIGKILL)


def texts(
    model: SpectrModel, prompt: str, columns: Sequence[str | RouterConfig] = COLUMNS
) -> list[str]:
    *_, last = model.stream(prompt, columns, FEW)
    return [column.text for column in last.columns]


def test_ten_clients_have_the_answers_that_each_has_alone(
    front: ReplicatedModel, alone: SpectrModel, serve_model: ServeModel
) -> None:
    assert front.most_runs == 2 * alone.most_runs > 10
    before = {replica.pid: replica.num_begun for replica in seen(front)}
    prompts = [f"Paint {number}" for number in range(10)]
    with ThreadPoolExecutor(10) as clients:
        found = list(clients.map(lambda prompt: texts(front, prompt), prompts))
    assert found == [texts(alone, prompt) for prompt in prompts]

    def answers_of(model: SpectrModel) -> list[str | None]:
        client = serve_model(model)

        def ask(prompt: str) -> str | None:
            answer = client.chat.completions.create(
                model="single:green", messages=[{"role": "user", "content": prompt}], max_tokens=6
            )
            return answer.choices[0].message.content

        with ThreadPoolExecutor(10) as clients:
            return list(clients.map(ask, prompts))

    assert answers_of(front) == answers_of(alone)
    assert all(replica.num_begun > before[replica.pid] for replica in seen(front))


def test_steps_come_one_by_one_with_their_traces(
    front: ReplicatedModel, alone: SpectrModel
) -> None:
    steps, expected = (
        list(model.stream("Hello", COLUMNS, FEW, record=True, trace_every=2))
        for model in (front, alone)
    )
    assert len(steps) == 7
    assert [step.trace is None for step in steps] == [step.trace is None for step in expected]
    trace, other = steps[-1].trace, expected[-1].trace
    assert trace is not None and other is not None
    assert trace.expert_names == other.expert_names
    assert (trace.share("spectr-paper") == other.share("spectr-paper")).all()


def test_what_is_wrong_is_said_at_once(front: ReplicatedModel) -> None:
    num_begun = sum(replica.num_begun for replica in seen(front))
    with pytest.raises(ValueError, match="unknown router 'spektr'"):
        front.stream("Hello", ["spektr"])
    with pytest.raises(ValueError, match="no column to run"):
        front.stream("Hello", [])
    assert sum(replica.num_begun for replica in seen(front)) == num_begun


def test_a_client_that_leaves_ends_its_run_in_the_replica(front: ReplicatedModel) -> None:
    before = sum(replica.num_steps for replica in seen(front))
    with closing(front.stream(SLOW, ["base"], MANY)) as run:  # type: ignore[type-var]
        for _ in range(3):
            next(run)
    wait_for(lambda: not any(replica.num_going for replica in seen(front)))
    made = sum(replica.num_steps for replica in seen(front)) - before
    assert 3 <= made <= 3 + 2 + 2, "two tokens, and two that were made while the word came"


def test_a_replica_that_dies_is_a_clear_error_and_the_next_run_is_served(
    front: ReplicatedModel, alone: SpectrModel, serve_model: ServeModel
) -> None:
    client = serve_model(front)
    stream = client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": SLOW}], max_tokens=300, stream=True
    )
    for _ in range(2):
        next(stream)
    (writer,) = [replica for replica in seen(front) if replica.num_going]
    kill(writer)
    with pytest.raises(openai.APIError, match="the replica that wrote the answer has died"):
        list(stream)
    assert texts(front, "Hello") == texts(alone, "Hello")
    wait_for(lambda: writer.pid not in {r.pid for r in seen(front)} and len(seen(front)) == 2)


def test_a_run_whose_replica_dies_before_its_first_token_begins_in_another(
    front: ReplicatedModel, alone: SpectrModel
) -> None:
    with ThreadPoolExecutor(1) as client:
        found = client.submit(texts, front, LATE)
        reader = wait_for(lambda: [replica for replica in seen(front) if replica.num_going])[0]
        kill(reader)
        assert found.result(PATIENCE) == texts(alone, LATE)


def test_an_expert_added_once_reaches_all(
    front: ReplicatedModel, base_folder: str, expert_folders: list[str], save_expert: SaveExpert
) -> None:
    added = save_expert("violet", seed=7)
    with closing(front.stream(SLOW, ["uniform"], MANY, record=True, trace_every=1)) as run:  # type: ignore[type-var]
        next(run)
        assert front.add(added) == ("violet",)
        names = ("red", "green", "blue", "violet")
        assert [replica.experts for replica in seen(front)] == [names] * 2
        for _ in range(3):
            next(run)
        trace = next(run).trace
    assert trace is not None and trace.expert_names == names[:3], "it keeps to its experts"
    column = ["single:violet", "uniform"]
    expected = load(base_folder, [*expert_folders, added])
    assert texts(front, "Hello", column) == texts(expected, "Hello", column)
    front.disable("violet")
    assert [replica.experts for replica in seen(front)] == [names[:3]] * 2
    # A replica that starts later has what the others have.
    front.enable("violet")
    first, _ = seen(front)
    kill(first)
    others = wait_for(lambda: (r := seen(front)) and len(r) == 2 and first not in r and r)
    wait_for(lambda: first.pid not in {replica.pid for replica in seen(front)})
    assert [replica.experts for replica in others] == [names] * 2
    front.remove("violet")
    with pytest.raises(ValueError, match="violet"):
        front.stream("Hello", ["single:violet"])


def test_no_run_mixes_two_libraries(
    front: ReplicatedModel, base_folder: str, expert_folders: list[str], save_expert: SaveExpert
) -> None:
    """Clients ask without a pause while an expert is replaced, there and back."""
    other = save_expert("green", seed=11, size=0.4)
    asked = ["single:green", "uniform"]
    red, green, blue = expert_folders
    models = [load(base_folder, [red, each, blue]) for each in (green, other)]
    expected = [texts(model, "Hello", asked) for model in models]
    assert expected[0] != expected[1]
    is_over = threading.Event()

    def ask() -> list[list[str]]:
        found = []
        while not is_over.is_set():
            found.append(texts(front, "Hello", asked))
        return found

    with ThreadPoolExecutor(4) as clients:
        answering = [clients.submit(ask) for _ in range(4)]
        try:
            for source in (other, green, other):
                front.replace("green", source)
                assert texts(front, "Hello", asked) == expected[source == other]
        finally:
            is_over.set()
        found = [each for client in answering for each in client.result()]
    assert all(each in expected for each in found)
    assert all(each in found for each in expected)


def test_a_change_that_a_replica_cannot_make_changes_nothing(
    front: ReplicatedModel, save_expert: SaveExpert, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, answer = front.listing, texts(front, "Hello")
    listing_of = Listing.of

    def of(*args: Any) -> Listing:
        """As if the folder held other files at the replica's machine."""
        listing = listing_of(*args)
        *others, last = listing.experts
        return replace(listing, experts=(*others, replace(last, sha256="0" * 64)))

    with monkeypatch.context() as patch:
        patch.setattr(Listing, "of", of)
        patch.setattr(ReplicatedModel, "listing", before)
        with pytest.raises(RuntimeError, match=r"'violet': .* holds another adapter here"):
            front.add(save_expert("violet", seed=7))
    assert front.listing == before
    assert [replica.experts for replica in seen(front)] == [front.library.names] * 2
    assert texts(front, "Hello") == answer
