"""What is counted of runs, by hand."""

from asyncio import CancelledError
from contextlib import suppress
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request

from spectr_demo.engine.run import ColumnOutput, Step
from spectr_demo.metrics import MOST_EXPERTS, NOT_KNOWN, OTHERS, Metrics
from tests.trace_samples import sample_trace

PREFIX = "spectr_"
MARK = "zebra"  # of what no metric may hold


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def step(*num_tokens: int, **settings: Any) -> Step:
    """One with a column for each number of tokens; error and rate are those of all."""
    error, rate = settings.pop("error", ""), settings.pop("rate", 0.0)
    columns = [
        ColumnOutput(
            label=f"column {number}",
            text=MARK,
            num_settled=0,
            num_tokens=num,
            is_finished=False,
            tokens_per_second=rate,
            error=error,
        )
        for number, num in enumerate(num_tokens)
    ]
    return Step(columns=tuple(columns), **settings)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(PREFIX + name, labels)


def mendable(error: Exception) -> bool:
    return isinstance(error, ValueError)


def scraped(url: str) -> dict[tuple[str, str], float]:
    """The samples of this project's metrics, by name and label."""
    response = httpx.get(url)
    assert response.status_code == 200
    assert MARK not in response.text
    return {
        (sample.name.removeprefix(PREFIX), "".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
        if sample.name.startswith(PREFIX) and "le" not in sample.labels
    }


def test_a_run_waits_then_goes_on_then_is_over() -> None:
    clock = Clock()
    metrics = Metrics(clock=clock)
    with metrics.run(mendable) as run:
        assert (value(metrics, "runs_waiting"), value(metrics, "runs_running")) == (1, 0)
        clock.now = 4
        run.begin()
        assert (value(metrics, "runs_waiting"), value(metrics, "runs_running")) == (0, 1)
        clock.now = 7
        run.add(step(1, 1))
        run.add(step(2, 1))
        assert value(metrics, "generated_tokens_total") == 3  # while it goes on
        clock.now = 9
        run.add(step(3, 1, is_last=True, rate=20))
    assert (value(metrics, "runs_waiting"), value(metrics, "runs_running")) == (0, 0)
    assert value(metrics, "runs_total", outcome="finished") == 1
    assert value(metrics, "generated_tokens_total") == 4
    for name, num, total in (
        ("in_line_seconds", 1, 4),
        ("first_token_seconds", 1, 7),
        ("answer_tokens_per_second", 2, 40),
    ):
        assert value(metrics, f"{name}_count") == num
        assert value(metrics, f"{name}_sum") == total


@pytest.mark.parametrize(
    ("steps", "error", "is_gone", "outcome"),
    [
        ([step(1)], None, False, "finished"),
        ([step(1), step(2, is_last=True)], GeneratorExit(), True, "finished"),
        ([], None, False, "finished"),  # nothing was to be generated
        ([step(1)], GeneratorExit(), False, "stopped"),
        ([step(1)], GeneratorExit(), True, "left"),
        ([], None, True, "left"),
        ([step(1)], CancelledError(), False, "left"),
        ([], ValueError(MARK), False, "refused"),
        ([step(1)], RuntimeError(MARK), False, "failed"),
        ([step(1), step(2, is_last=True, error="NaN")], None, False, "failed"),
    ],
)
def test_how_a_run_ended(
    steps: list[Step], error: BaseException | None, is_gone: bool, outcome: str
) -> None:
    metrics = Metrics()
    with suppress(BaseException), metrics.run(mendable, lambda: is_gone) as run:
        run.begin()
        for each in steps:
            run.add(each)
        if error is not None:
            raise error
    outcomes = ("finished", "stopped", "left", "refused", "failed")
    counted = {name: value(metrics, "runs_total", outcome=name) for name in outcomes}
    assert counted == {name: float(name == outcome) for name in outcomes}


def test_one_that_never_began_waits_no_more() -> None:
    metrics = Metrics()
    with pytest.raises(ValueError, match="no place"), metrics.run(mendable):
        raise ValueError("no place")
    assert (value(metrics, "runs_waiting"), value(metrics, "runs_running")) == (0, 0)
    assert value(metrics, "in_line_seconds_count") == 0


def over(metrics: Metrics, *steps: Step) -> None:
    with metrics.run(mendable) as run:
        run.begin()
        for each in steps:
            run.add(each)


def of_experts(metrics: Metrics) -> dict[str, float]:
    (family,) = (f for f in metrics.registry.collect() if f.name == "spectr_expert_tokens")
    return {s.labels["expert"]: s.value for s in family.samples if s.name.endswith("_total")}


def test_tokens_are_counted_by_the_expert_that_served_them() -> None:
    metrics = Metrics(("red", "blue"))
    assert of_experts(metrics) == {"base": 0, "red": 0, "blue": 0}
    shares = ({"red": 0.25, "green": 0.5}, {}, None)
    over(metrics, step(1, 1, 1, expert_shares=shares), step(8, 4, 2, expert_shares=shares))
    assert of_experts(metrics) == {
        "red": 2,
        "blue": 0,
        "green": 4,
        "base": 2 + 4,
        NOT_KNOWN: 2,
    }


def test_a_trace_says_what_the_step_does_not() -> None:
    trace = sample_trace()
    metrics = Metrics()
    labels = trace.labels
    ended = step(*[100] * len(labels), expert_shares=(None,) * len(labels))
    over(metrics, step(*[1] * len(labels), trace=trace), ended)
    total = {"base": 0.0}
    for label in labels:
        share = trace.share(label, "answer").tolist()
        total["base"] += 100 * max(0.0, 1 - sum(share))
        for name, part in zip(trace.expert_names, share, strict=True):
            total[name] = total.get(name, 0) + 100 * part
    got = of_experts(metrics)
    assert got == pytest.approx({name: num for name, num in total.items() if num or name == "base"})
    assert len(got) > 2


def test_the_number_of_labels_is_bounded() -> None:
    metrics = Metrics(f"expert {n}" for n in range(MOST_EXPERTS + 50))
    over(metrics, step(3, expert_shares=({"late": 1.0},)))
    got = of_experts(metrics)
    assert len(got) == MOST_EXPERTS + 2  # and "base", and all others
    assert got[OTHERS] == 3


def test_servers_do_not_share_what_they_count() -> None:
    one, other = Metrics(), Metrics()
    over(one, step(5))
    assert value(one, "generated_tokens_total") == 5
    assert value(other, "generated_tokens_total") == 0


def test_the_format_is_the_one_that_is_asked_for() -> None:
    def told(accept: str) -> tuple[str, str]:
        headers = [(b"accept", accept.encode())]
        response = Metrics().response(Request({"type": "http", "headers": headers}))
        return response.headers["content-type"], bytes(response.body).decode()

    kind, text = told("*/*")
    assert kind.startswith("text/plain; version=")
    assert "# EOF" not in text
    kind, text = told("application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")
