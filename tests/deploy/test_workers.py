"""Work that is shared among processes: the same numbers, and it goes on where it was."""

import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from spectr_demo import __main__
from spectr_demo.__main__ import main
from spectr_demo.evaluation.parts import Parts
from spectr_demo.workers import each_finished
from tests.conftest import BuildModel, SaveExpert
from tests.evaluation.conftest import build_engine

__all__ = ["build_engine"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As a worker has: another number of threads adds in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def evaluation(
    base_folder: str, save_expert: SaveExpert, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The smallest evaluation that has a merge. Workers see no test's changes of the package."""
    monkeypatch.undo()
    experts = [save_expert(name, seed=seed) for seed, name in enumerate(["sql", "chords"])]
    rows = ["--routers", "base", "oracle", "spectr", "TIES"]
    few = ["--quick", "--num-examples", "2", "--num-pairs", "2"]
    return ["evaluate", "--base", base_folder, "--experts", *experts, *few, *rows]


@pytest.mark.slow
def test_an_evaluation_in_workers_has_the_numbers_of_one_process(
    ray: Any,
    evaluation: list[str],
    one_thread: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(cache: str, *more: str) -> Any:
        monkeypatch.setenv("SPECTR_CACHE", str(tmp_path / cache))
        output = tmp_path / "results.json"
        assert main([*evaluation, "--output", str(output), *more]) == 0
        return json.loads(output.read_text())

    whole = run("one")
    measured: list[str] = []
    get = Parts.get

    def counting(parts: Parts, kind: str, config: Any, compute: Any, *of: Any) -> Any:
        def counted(config: Any) -> Any:
            if (result := compute(config)) is not None:  # as where nothing is routed
                measured.append(kind)
            return result

        return get(parts, kind, config, counted, *of)

    monkeypatch.setattr(Parts, "get", counting)
    assert run("two", "--workers", "2") == whole
    assert measured == [], "the workers have measured all of it"
    alone = run("three", "--workers", "2", "--only", "composition")
    assert alone["composition"]["rows"] == whole["composition"]["rows"]
    assert measured == []


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(
    ray: Any, evaluation: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECTR_CACHE", str(tmp_path / "cache"))
    # Parts that no other test has measured.
    command = [*evaluation, "--num-examples", "3", "--output", str(tmp_path / "results.json")]
    with ThreadPoolExecutor(1) as thread:
        evaluating = thread.submit(main, [*command, "--workers", "2"])
        while not (workers := [p for p in psutil.process_iter() if is_measuring(p)]):
            assert not evaluating.done()
            time.sleep(0.05)
        workers[0].kill()
        assert evaluating.result() == 0
    assert (
        json.loads((tmp_path / "results.json").read_text())["meta"]["settings"]["num_examples"] == 3
    )


def is_measuring(process: psutil.Process) -> bool:
    """Whether a process of Ray measures a part at this moment: then its title says so."""
    with suppress(psutil.Error):
        return process.name().startswith("ray::_Evaluato") and ".measure" in process.cmdline()[0]
    return False


@pytest.fixture
def train(base_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shortest training of two experts, of files. Workers share its cache: the prompts in it
    are those of the process that came first, here or there."""
    monkeypatch.undo()
    monkeypatch.setattr("spectr_demo.training.cost.PROBE_SECONDS", 0.01)
    files = [tmp_path / f"{name}.csv" for name in ("first", "second")]
    for number, file in enumerate(files):
        rows = [f"{i} + {number},{i + number}\n" for i in range(12)]
        file.write_text("prompt,answer\n" + "".join(rows))
    small = ["--steps", "2", "--batch-size", "2", "--num-eval", "2"]
    return ["train", *map(str, files), "--base", base_folder, *small]


@pytest.mark.slow
def test_experts_that_are_trained_side_by_side_are_those_of_one_process(
    ray: Any,
    train: list[str],
    one_thread: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*train, "--output", "one"]) == 0
    assert main([*train, "--output", "two", "--workers", "2"]) == 0
    assert "second: two/second is trained" in capsys.readouterr().err
    for name in ("first", "second"):
        one, two = (load_file(Path(x, name, "adapter_model.safetensors")) for x in ("one", "two"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
        scores = [json.loads(Path(x, name, "scores.json").read_text()) for x in ("one", "two")]
        assert scores[0]["scores"] == scores[1]["scores"]


def fail_or_not(number: int) -> None:
    if number == 1:
        raise ValueError("one is no number")
    if number == 2:
        os._exit(1)


@pytest.mark.slow
def test_all_that_failed_is_said_at_the_end(ray: Any) -> None:
    calls = {f"call {number}": {"number": number} for number in range(4)}
    finished = []
    with pytest.raises(RuntimeError, match="call 1: one is no number") as caught:
        finished.extend(each_finished(fail_or_not, calls, 2))
    assert "call 2: its process has died" in str(caught.value)
    assert "call 3" not in str(caught.value)


@pytest.mark.parametrize("command", [["evaluate", "--quick"], ["train", "sql"]])
def test_without_ray_one_message_says_what_to_install(
    command: list[str],
    build_engine: BuildModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(__main__, "_load", lambda arguments: build_engine())
    output = ["--output", str(tmp_path / "output")]
    assert main([*command, *output, "--workers", "2"]) == 2
    error = capsys.readouterr().err
    assert error.endswith("requirements-ray.txt, or spectr-demo[ray]\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize(("number", "message"), [("0", "at least 1"), ("two", "invalid")])
def test_a_number_of_workers_that_is_none(
    number: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--workers", number])
    assert message in capsys.readouterr().err
