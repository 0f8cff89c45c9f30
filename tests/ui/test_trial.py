"""The small evaluation: its prompts, its grades, and how it ends."""

import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

import gradio as gr
import pytest

from spectr_demo.config import GenerationSettings, RouterConfig
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.run import ColumnOutput, Step
from spectr_demo.evaluation.tasks import SPLIT_SEED, TASKS
from spectr_demo.ui import evidence_tab, trial
from spectr_demo.ui.libraries import Libraries
from spectr_demo.ui.run import Waiting, model_steps
from spectr_demo.ui.trial import Trial, check_routers, chosen_prompts, held_out, run_trial

BASE, SPECTR = RouterConfig(name="base"), RouterConfig(name="spectr")


class Scripted:
    """Steps that answer with the reference in one column, and with nothing in the other."""

    def __init__(self, answers: dict[str, str], num_steps: int = 3) -> None:
        self.answers, self.num_steps = answers, num_steps
        self.num_made = self.num_closed = 0
        self.settings: list[GenerationSettings] = []

    def __call__(
        self, prompt: str, routers: Sequence[RouterConfig], settings: GenerationSettings
    ) -> Generator[Any, None, None]:
        self.settings.append(settings)
        try:
            for number in range(self.num_steps):
                self.num_made += 1
                texts = ("", self.answers[prompt])
                columns = [
                    ColumnOutput(
                        label=str(i),
                        text=text,
                        num_settled=0,
                        num_tokens=number,
                        is_finished=False,
                        tokens_per_second=0.0,
                    )
                    for i, text in enumerate(texts)
                ]
                yield Step(columns=tuple(columns), is_last=number == self.num_steps - 1)
        finally:
            self.num_closed += 1


def references() -> dict[str, str]:
    return {
        example.prompt: example.requests[0].answer
        for of_domain in held_out().values()
        for example in of_domain
    }


def run(steps: Scripted, stop: threading.Event, **options: Any) -> list[Trial]:
    examples = chosen_prompts(["cron", "sql"], 2)
    return list(run_trial(steps, examples, [BASE, SPECTR], stop, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["cron", "sql"])
def test_prompts_are_those_that_no_expert_was_trained_on(name: str) -> None:
    TASKS[name].check_packages()
    heldout = TASKS[name].build(SPLIT_SEED).heldout[: trial.NUM_PROMPTS]
    found = held_out()[name]
    assert [example.prompt for example in found] == [example.prompt for example in heldout]
    assert [example.requests[0].answer for example in found] == [e.answer for e in heldout]
    assert set(held_out()) == set(TASKS)
    assert {len(of_domain) for of_domain in held_out().values()} == {trial.NUM_PROMPTS}


def test_answers_are_graded_prompt_by_prompt() -> None:
    steps = Scripted(references())
    trials = run(steps, threading.Event())
    last = trials[-1]
    assert last.status == "finished"
    assert [row.domain for row in last.rows] == ["cron", "sql", "cron", "sql"]
    assert {row.verdicts for row in last.rows} == {("wrong", "right")}
    assert [len(each.graded) for each in trials if not each.rows[-1].verdicts] == [0, 1, 2, 3]
    assert steps.num_closed == 4
    assert [each.max_new_tokens for each in steps.settings[:2]] == [
        TASKS[name].max_new_tokens for name in ("cron", "sql")
    ]
    assert {each.temperature for each in steps.settings} == {0}


def test_who_waits_is_told_where_in_line() -> None:
    inner = Scripted(references())

    def steps(*args: Any) -> Generator[Any, None, None]:
        yield Waiting(place=2, seconds=12.0)
        yield from inner(*args)

    trials = list(run_trial(steps, chosen_prompts(["cron"], 1), [BASE, SPECTR], threading.Event()))
    assert [bool(each.in_line) for each in trials] == [False, True, False, False]
    assert "number 2 in line, about 12 s" in evidence_tab.trial_html(trials[1])
    assert "in line" not in evidence_tab.trial_html(trials[2])


def test_a_stopped_trial_keeps_what_was_graded_and_makes_no_more_tokens() -> None:
    steps, stop = Scripted(references(), num_steps=50), threading.Event()
    examples = chosen_prompts(["cron"], 3)
    going = run_trial(steps, examples, [BASE, SPECTR], stop, clock=Ticks())  # type: ignore[arg-type]
    for shown in going:
        if len(shown.graded) == 1 and len(shown.rows) == 2 and shown.rows[1].answers:
            stop.set()
            num_made = steps.num_made
    assert shown.status == "stopped"
    assert len(shown.rows) == len(shown.graded) == 1
    assert steps.num_made <= num_made + 1
    assert steps.num_closed == 2


def test_a_trial_that_is_stopped_between_prompts_reads_no_other() -> None:
    steps, stop = Scripted(references()), threading.Event()
    for shown in run_trial(steps, chosen_prompts(["cron"], 3), [BASE, SPECTR], stop):  # type: ignore[arg-type]
        if len(shown.graded) == 1:
            stop.set()
    assert (shown.status, len(shown.rows), steps.num_closed) == ("stopped", 1, 1)


def test_who_leaves_ends_the_run() -> None:
    steps = Scripted(references(), num_steps=50)
    going = run_trial(
        steps,  # type: ignore[arg-type]
        chosen_prompts(["cron"], 1),
        [BASE, SPECTR],
        threading.Event(),
        clock=Ticks(),
    )
    next(going), next(going)
    going.close()  # type: ignore[attr-defined]
    assert steps.num_closed == 1
    assert steps.num_made <= 3


class Ticks:
    """A clock by which each token takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def test_what_cannot_be_evaluated_is_said() -> None:
    with pytest.raises(ValueError, match="no domain"):
        chosen_prompts([], 1)
    with pytest.raises(ValueError, match="11 prompts"):
        chosen_prompts(["cron"], 11)
    with pytest.raises(ValueError, match="0 routers"):
        check_routers([])
    with pytest.raises(ValueError, match="7 routers"):
        check_routers([BASE] * 7)
    assert trial.domains_for(["sql", "mine"]) == ["sql"]


def handlers(model: SpectrModel, monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[..., Any]]:
    """Of a tab whose experts all count as experts for cron."""
    monkeypatch.setattr(evidence_tab, "domains_for", lambda names: ["cron"])
    with gr.Blocks() as page, gr.Tabs(), gr.Tab("Evidence") as tab:
        evidence_tab.lay_out(tab, Libraries(model), model_steps(model), {})
    return {fn.name: fn.fn for fn in page.fns.values() if fn.fn}  # type: ignore[misc]


def test_the_real_model_is_evaluated(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = handlers(routed_model, monkeypatch)["evaluate"]
    updates = list(evaluate(["cron"], ["spectr", "single", "base"], 1))
    pages = [value for update in updates for value in update.values() if isinstance(value, str)]
    # In the order of the table of routers, not of ticks.
    order = [
        pages[-1].index(f"<b>{name}</b>") for name in ("Base model", "Single expert", "SpectR")
    ]
    assert order == sorted(order)
    assert pages[-1].count("wrong</b>") == 3
    assert "✓ finished" in pages[-1]
    assert "prompt 1 of 1" in pages[0]


@pytest.mark.parametrize(
    ("domains", "routers", "message"),
    [([], ["base"], "no domain"), (["cron"], [], "0 routers"), (["cron"], None, "broke off")],
)
def test_an_error_is_a_message(
    routed_model: SpectrModel,
    monkeypatch: pytest.MonkeyPatch,
    domains: list[str],
    routers: list[str] | None,
    message: str,
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(routed_model, "stream", broken)
    chosen = ["base"] if routers is None else routers
    *_, last = handlers(routed_model, monkeypatch)["evaluate"](domains, chosen, 1)
    told = [new["value"] for new in last.values() if isinstance(new, dict) and "value" in new]
    assert message in told[0]
    assert 'role="alert"' in told[0]


def test_strangers_experts_have_no_held_out_prompts(routed_model: SpectrModel) -> None:
    with gr.Blocks() as page, gr.Tabs(), gr.Tab("Evidence") as tab:
        evidence_tab.lay_out(tab, Libraries(routed_model), model_steps(routed_model), {})
    texts = [str(block.value) for block in page.blocks.values() if isinstance(block, gr.HTML)]
    assert any("None of the loaded experts" in text for text in texts)
    assert "evaluate" not in {fn.name for fn in page.fns.values()}


def test_what_a_model_wrote_is_escaped() -> None:
    row = trial.Row(
        example=chosen_prompts(["cron"], 1)[0], answers=("<script>x</script>",), verdicts=("wrong",)
    )
    shown = evidence_tab.trial_html(Trial(routers=(BASE,), num=1, rows=(row,), status="finished"))
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
