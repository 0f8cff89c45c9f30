"""The command line on a real folder of a tiny base and real adapter folders, in process."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from spectr_demo.__main__ import main
from spectr_demo.trace import RoutingTrace
from tests.conftest import tiny_llama


@pytest.fixture(scope="module")
def base_folder(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


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
        assert main(["generate", "Hello", *options, "--json", *more]) == 0
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


def test_train_makes_an_expert_and_shows_it_among_the_others(
    base_folder: str,
    expert_folders: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["train", "cron", "--base", base_folder, "--experts", *expert_folders]
    command += ["--output", str(tmp_path / "cron"), "--steps", "2", "--num-eval", "2", "--json"]
    assert main(command) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["scores"]["scores"]["expert"]["all"]["num"] == 2
    assert list(output["subspace_overlap"]) == ["cron", "red", "green", "blue"]
    prompt = ["generate", "Hello", "--base", base_folder, "--max-new-tokens", "2"]
    assert main([*prompt, "--experts", output["folder"], "--router", "single:cron"]) == 0
    assert main(command) == 2
    assert "holds a finished expert" in capsys.readouterr().err


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
