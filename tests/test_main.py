"""The command line on a real folder of a tiny base and real adapter folders, in process."""

import json
from dataclasses import replace
from pathlib import Path

import gradio as gr
import pytest

from spectr_demo.__main__ import main
from spectr_demo.config import DEFAULT_COLUMNS, DEFAULT_ROUTER
from spectr_demo.evaluation.tasks import TASKS, Item, make_split
from spectr_demo.evaluation.tasks.baselines import copy_input
from spectr_demo.trace import RoutingTrace


@pytest.fixture
def options(base_folder: str, expert_folders: list[str]) -> list[str]:
    return ["--base", base_folder, "--experts", *expert_folders, "--max-new-tokens", "6"]


def test_compare_prints_one_json_document(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace_file = tmp_path / "run.npz"
    columns = ["--columns", "base", "single:green", "uniform", "spectr"]
    command = ["compare", "Hello", *options, *columns, "--json", "--trace", str(trace_file)]
    assert main(command) == 0
    output = json.loads(capsys.readouterr().out)
    assert [column["router"] for column in output["columns"]] == columns[1:]
    for column in output["columns"]:
        assert column["num_tokens"] == 6
        assert column["tokens_per_second"] > 0
        assert column["mean_logprob"] < 0
        assert isinstance(column["text"], str)
        assert list(column["expert_share"]) == ["red", "green", "blue"]
    shares = [list(column["expert_share"].values()) for column in output["columns"]]
    assert shares[0] == [0, 0, 0]
    assert shares[1] == [0, 1, 0]
    assert shares[2] == pytest.approx([1 / 3] * 3, abs=1e-4)
    assert sum(shares[3]) == pytest.approx(1, abs=1e-4)
    assert RoutingTrace.load(trace_file).labels == tuple(columns[1:])


def test_compare_for_people_shows_every_column(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "Hello", *options, "--columns", "base", "arrow"]) == 0
    output = capsys.readouterr().out
    for part in ("base", "arrow", "tokens/s", "nats/token", "no expert", "red "):
        assert part in output


def test_demo_serves_the_page_of_this_model(
    options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []

    def launch(page: gr.Blocks, **settings: object) -> None:
        assert settings["share"] is False
        launched.append(json.dumps(page.get_config_file(), default=str))

    monkeypatch.setattr(gr.Blocks, "launch", launch)
    assert main(["demo", *options[:-2]]) == 0
    (page,) = launched
    assert all(f'"{name}"' in page for name in ("red", "green", "blue"))


def test_generate_writes_the_answer_that_json_holds(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "Hello", *options, "--router", "single:red", "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["router"] == "single:red"
    assert main(["generate", "Hello", *options, "--router", "single:red"]) == 0
    assert capsys.readouterr().out == output["text"] + "\n"


def test_options_change_the_result(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def column(*more: str) -> dict[str, object]:
        command = ["generate", "Hello", *options, "--router", "spectr", "--json", *more]
        assert main(command) == 0
        result: dict[str, object] = json.loads(capsys.readouterr().out)
        return result

    plain = column()
    assert column("--top-k", "3", "--composition", "outputs")["text"] != plain["text"]
    assert column("--temperature", "1.5", "--seed", "4")["text"] != plain["text"]
    softmax = column("--top-k", "2", "--weighting", "softmax", "--router-temperature", "9")
    assert softmax["settings"]["temperature"] == 9  # type: ignore[index]


def test_inspect(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = options[:-2]
    assert main(["inspect", *options, "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    red = output["experts"][0]
    assert (red["name"], red["rank"], red["num_layers"]) == ("red", [4, 4], 14)
    assert sum(red["spectrum"]) == pytest.approx(1, abs=1e-3)
    assert 1 < red["effective_rank"] <= 4
    overlap = output["subspace_overlap"]
    assert overlap["red"]["red"] == pytest.approx(1, abs=1e-3)
    assert 0 < overlap["red"]["blue"] < 0.3
    assert main(["inspect", *options]) == 0
    assert "subspace overlap" in capsys.readouterr().out


@pytest.fixture
def two_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The only tasks there are: `first` and `second`, both of a dozen sums."""
    sql = TASKS["sql"]
    items = [Item(text=f"{i} + {i}", answer=str(2 * i), key=str(i)) for i in range(12)]
    split = make_split(items[:8], items[8:], sql.wordings, sql.heldout_wordings, seed=0)
    tasks = {
        name: replace(
            sql,
            name=name,
            build=lambda seed: split,
            score=lambda answer, example: float(answer == example.answer),
            baselines={"copy of the input": copy_input},
        )
        for name in ("first", "second")
    }
    monkeypatch.setattr("spectr_demo.evaluation.tasks.TASKS", tasks)
    monkeypatch.setattr("spectr_demo.training.cost.PROBE_SECONDS", 0.01)


@pytest.fixture
def train(base_folder: str, two_tasks: None) -> list[str]:
    """The shortest run there is, in 2 steps; names and folders are to be added."""
    small = ["--steps", "2", "--batch-size", "2", "--num-eval", "2"]
    return ["train", "--base", base_folder, *small]


def test_train_makes_an_expert_that_can_be_used(
    train: list[str], base_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*train, "first", "--output", str(tmp_path), "--json"]
    assert main(command) == 0
    captured = capsys.readouterr()
    output = json.loads(captured.out)
    assert output["folders"] == {"first": str(tmp_path / "first")}
    scores = output["scores"]["first"]["scores"]
    assert {who: groups["all"]["num"] for who, groups in scores.items()} == {
        "base": 2,
        "copy of the input": 2,
        "expert": 2,
    }
    assert captured.err.index("Training needs: ") < captured.err.index("train_loss")

    prompt = ["generate", "Hello", "--base", base_folder, "--max-new-tokens", "2"]
    experts = ["--experts", output["folders"]["first"], "--router", "single:first"]
    assert main([*prompt, *experts]) == 0
    assert main(command) == 2
    assert "holds a finished expert" in capsys.readouterr().err


def test_train_takes_several_names_and_shows_how_they_overlap(
    train: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*train, "second", "first", "--output", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    for part in ("second: ", "first: ", "copy of the input", "subspace overlap"):
        assert part in captured.out
    assert captured.err.count("Training needs: ") == 2


def test_train_shows_the_new_expert_among_the_given_ones(
    train: list[str],
    expert_folders: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [*train, "first", "--output", str(tmp_path), "--experts", *expert_folders, "--json"]
    assert main(command) == 0
    overlap = json.loads(capsys.readouterr().out)["subspace_overlap"]
    assert list(overlap) == ["first", "red", "green", "blue"]


def test_train_all_trains_every_task_but_the_finished_ones(
    train: list[str],
    base_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    # Where experts of another base than the default go.
    second = Path("experts") / Path(base_folder).name / "second"
    assert main([*train, "second", "--json"]) == 0
    finished = (second / "adapter_model.safetensors").stat()
    capsys.readouterr()

    assert main([*train, "--all", "--json"]) == 0
    captured = capsys.readouterr()
    assert f"second: {second} is finished; --overwrite trains it again" in captured.err
    assert captured.err.count("Training needs: ") == 1
    assert (second / "adapter_model.safetensors").stat() == finished
    output = json.loads(captured.out)
    assert list(output["folders"]) == list(output["scores"]) == ["first", "second"]
    assert list(output["subspace_overlap"]) == ["first", "second"]

    assert main([*train, "--all", "--overwrite", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("Training needs: ") == 2
    assert "is finished" not in captured.err


def test_train_takes_a_users_file(
    train: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "third.csv"
    file.write_text("prompt,answer\n" + "".join(f"{i} + {i},{2 * i}\n" for i in range(12)))
    command = [*train, "first", str(file), "--output", str(tmp_path), "--json"]
    assert main(command) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["folders"] == {name: str(tmp_path / name) for name in ("first", "third")}
    assert list(output["subspace_overlap"]) == ["first", "third"]

    assert main([*train, str(file), str(tmp_path / "third.jsonl")]) == 2
    assert "experts of one name; rename a file" in capsys.readouterr().err
    file.write_text("question,answer\nHi,Ho\n")
    assert main([*train, str(file), "--output", str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("spectr-demo train: ")
    assert "line 2 has no text in prompt" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("names", [[], ["first", "--all"]])
def test_train_needs_names_or_all_and_not_both(
    train: list[str], names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*train, *names]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("spectr-demo train: ")
    assert captured.err.endswith("name at least one task, or pass --all and no name\n")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--router", "spektr"], "unknown router 'spektr'"),
        (["--router", "single:rad"], "Did you mean 'red'"),
        (["--top-k", "9"], "only 3 experts"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--experts", "/nowhere"], "there is no folder /nowhere"),
        (["--base", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    options: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "Hello", *options, *more]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("spectr-demo generate: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""


def broken(*_: object) -> None:
    raise RuntimeError("the fourth layer melted")


@pytest.mark.parametrize("debug", [False, True])
def test_debug_shows_the_traceback_that_one_line_hides(
    options: list[str],
    debug: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("spectr_demo.engine.model.load", broken)
    assert main(["generate", "Hello", *options, *["--debug"] * debug]) == 2
    *traceback, last = capsys.readouterr().err.splitlines()
    assert last == "spectr-demo generate: the fourth layer melted"
    shown = [line for line in traceback if "Traceback (most recent call last)" in line]
    assert len(shown) == debug
    assert any("in broken" in line for line in traceback) == debug


def test_what_lm_eval_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("spectr_demo.evaluation.harness.run", broken)
    assert main(["lm-eval", "--tasks", "none"]) == 2
    assert capsys.readouterr().err == "spectr-demo lm-eval: the fourth layer melted\n"


def test_defaults_are_those_of_the_configuration(
    base_folder: str, expert_folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--base", base_folder, "--experts", *expert_folders, "--max-new-tokens", "2"]
    assert main(["compare", "Hello", *options, "--json"]) == 0
    columns = json.loads(capsys.readouterr().out)["columns"]
    assert [column["router"] for column in columns] == list(DEFAULT_COLUMNS)
    assert main(["generate", "Hello", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["router"] == DEFAULT_ROUTER


def test_unknown_command_says_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generat"])
    assert caught.value.code == 2
    assert "choose from" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "compare", "inspect", "train"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    output = capsys.readouterr().out
    for option in ("--base", "--experts", "--json"):
        assert option in output
