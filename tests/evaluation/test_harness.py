"""The harness's numbers are the engine's own, for every kind of router and any batch size."""

import builtins
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from spectr_demo.__main__ import main
from spectr_demo.config import DEFAULT_ROUTER, RouterConfig
from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation.reading import Text, read
from spectr_demo.routing.routers import parse_router
from tests.conftest import IN_CONTEXT, tiny_llama

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from spectr_demo.evaluation.harness import SpectrLM  # noqa: E402

ROOT = Path(__file__).parents[2]
TASKS = str(Path(__file__).parent / "lm_eval_task")
ROUTERS = ["base", "spectr", IN_CONTEXT]
QUESTIONS = [
    "Which colour is the sky?",
    "Grass?",
    "hi",
    "Tell me of ships, of the sea and of rain.",
]
ANSWERS = ["blue", "a long shade of green", "x", "no"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Relative paths of the tasks begin at the root; no Hub, and a data cache of the test's own."""
    import datasets

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=i)
        for i, args in enumerate(arguments)
    ]


def text_of(engine: SpectrModel, prompt: str, answer: str) -> Text:
    prompt_ids, answer_ids = (
        tuple(engine.tokenizer(part)["input_ids"]) for part in (prompt, answer)
    )
    return Text(prompt_ids=prompt_ids, answer_ids=answer_ids)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("is_chat", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
def test_loglikelihood_is_the_engines(
    routed_model: SpectrModel, router: str | RouterConfig, is_chat: bool, batch_size: int
) -> None:
    lm = SpectrLM(routed_model, router=router, batch_size=batch_size)
    prompts = [
        lm.apply_chat_template([{"role": "user", "content": q}]) if is_chat else q
        for q in QUESTIONS
    ]
    # Space at the end of a prompt is, to the harness, the beginning of what is read after it.
    texts = [
        text_of(routed_model, prompt.rstrip(), prompt[len(prompt.rstrip()) :] + answer)
        for prompt, answer in zip(prompts, ANSWERS, strict=True)
    ]
    own = read(routed_model, parse_router(router, routed_model.library.names), texts, batch_size=1)
    found = lm.loglikelihood(
        requests("loglikelihood", list(zip(prompts, ANSWERS, strict=True))), disable_tqdm=True
    )
    expected = [float(reading.logprob.sum()) for reading in own]
    assert [logprob for logprob, _ in found] == pytest.approx(expected, abs=1e-4)


def test_routers_differ_and_base_is_the_bare_model(routed_model: SpectrModel) -> None:
    pair = requests("loglikelihood", [(QUESTIONS[0], ANSWERS[0])])
    found = {
        router: SpectrLM(routed_model, router=router).loglikelihood(pair, disable_tqdm=True)[0][0]
        for router in ROUTERS
    }
    assert len({round(value, 3) for value in found.values()}) == len(ROUTERS)


def test_rolling_likelihood_does_not_depend_on_the_batch(routed_model: SpectrModel) -> None:
    texts = requests("loglikelihood_rolling", [(text * 30,) for text in QUESTIONS[:2]])
    one, four = (
        SpectrLM(routed_model, router=IN_CONTEXT, batch_size=size, max_length=128)
        for size in (1, 4)
    )
    assert four.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(
        one.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-2
    )


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("router", ROUTERS)
def test_generation_is_the_engines(
    routed_model: SpectrModel, router: str | RouterConfig, batch_size: int
) -> None:
    lm = SpectrLM(routed_model, router=router, batch_size=batch_size)
    prompts = [lm.apply_chat_template([{"role": "user", "content": q}]) for q in QUESTIONS]
    options = {"until": [], "max_gen_toks": 8}
    found = lm.generate_until(
        requests("generate_until", [(prompt, dict(options)) for prompt in prompts]),
        disable_tqdm=True,
    )
    own = [routed_model.generate(q, router, max_new_tokens=8) for q in QUESTIONS]
    assert [text.rstrip("�") for text in found] == own
    assert len(set(own)) > 1


def test_the_default_router_is_that_of_all_front_ends(routed_model: SpectrModel) -> None:
    default = parse_router(DEFAULT_ROUTER, routed_model.library.names)
    assert SpectrLM(routed_model).router == default


def test_beams_are_refused(routed_model: SpectrModel) -> None:
    options = {"until": [], "max_gen_toks": 4, "num_beams": 2}
    with pytest.raises(ValueError, match="num_beams"):
        SpectrLM(routed_model).generate_until(
            requests("generate_until", [("hi", options)]), disable_tqdm=True
        )


def test_unknown_router_is_the_usual_error(routed_model: SpectrModel) -> None:
    with pytest.raises(ValueError, match="unknown router 'spektr'"):
        SpectrLM(routed_model, router="spektr")


def test_a_local_task_is_evaluated_offline(routed_model: SpectrModel) -> None:
    results = lm_eval.simple_evaluate(
        model=SpectrLM(routed_model, router=IN_CONTEXT, batch_size=2),
        tasks=["spectr_choice", "spectr_words"],
        task_manager=TaskManager(include_path=TASKS, include_defaults=False),
        bootstrap_iters=0,
    )
    assert set(results["results"]) == {"spectr_choice", "spectr_words"}
    samples = results["samples"]["spectr_choice"]
    assert len(samples) == 3
    doc = samples[0]["doc"]
    text = text_of(routed_model, f"{doc['question']}\nAnswer:", f" {doc['options'][0]}")
    router = parse_router(IN_CONTEXT, routed_model.library.names)
    expected = read(routed_model, router, [text])[0].logprob.sum()
    assert samples[0]["filtered_resps"][0][0] == pytest.approx(expected, abs=1e-4)


def test_the_command_hands_its_arguments_on(
    tokenizer: PreTrainedTokenizerFast,
    expert_folders: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    experts = ";".join(expert_folders)
    model = f"base={tmp_path / 'base'},experts={experts},router=spectr-context"
    command = ["lm-eval", "--model", "spectr", "--model_args", model, "--tasks", "spectr_choice"]
    command += ["--include_path", TASKS, "--batch_size", "2", "--output_path", str(tmp_path)]
    before = sys.argv
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "spectr_choice" in output and "acc_norm" in output
    assert sys.argv is before
    assert list(tmp_path.rglob("results*.json"))


def test_without_the_package_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import_module = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return import_module(name, *args, **kwargs)

    harness = importlib.import_module("spectr_demo.evaluation.harness")
    monkeypatch.delitem(sys.modules, "spectr_demo.evaluation.harness")
    monkeypatch.delattr("spectr_demo.evaluation.harness")
    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["lm-eval", "--help"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("spectr-demo lm-eval: ")
    assert captured.err.endswith("requirements-eval.txt, or spectr-demo[eval]\n")
    assert harness.SpectrLM is SpectrLM
