"""Numbers that are no longer finite: the column ends and says why, the others go on as alone."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spectr_demo.__main__ import main
from spectr_demo.config import GenerationSettings
from spectr_demo.engine.faults import FiniteLogits
from spectr_demo.engine.model import SpectrModel
from spectr_demo.experts import library
from spectr_demo.experts.adapters import AdapterError
from spectr_demo.experts.library import load_experts
from spectr_demo.trace import mean_logprob
from tests.conftest import BuildModel, SaveExpert
from tests.experts.test_library import spoil_weights

LAYER = "model.layers.1.mlp.down_proj"
SETTINGS = GenerationSettings(max_new_tokens=6)
SOUND = ["base", "single:red", "single:blue"]


@pytest.fixture(params=[1e22, 1e30, 1e37])
def broken(routed_model: SpectrModel, request: pytest.FixtureRequest) -> SpectrModel:
    """Its expert `green` has one direction at one layer that is too long; each number is finite."""
    for bank in routed_model.library.banks:
        if LAYER in bank.paths:
            _, E, r = bank.singular_values.shape
            place = bank.paths.index(LAYER)
            bank.B[place].view(E, r, -1)[1, 2] *= request.param
            bank.singular_values[place, 1, 2] *= request.param
    return routed_model


@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_column_with_nan_ends_and_the_others_are_as_alone(
    broken: SpectrModel, record: bool, temperature: float
) -> None:
    columns = ["base", "single:red", "uniform", "single:green", "single:blue", "spectr"]
    run = {"max_new_tokens": 6, "temperature": temperature, "record": record}
    step = broken.compare("Hello", columns, **run)
    by_label = {column.label: column for column in step.columns}
    for label in SOUND:
        (alone,) = broken.compare("Hello", [label], **run).columns
        assert by_label[label].text == alone.text
        assert by_label[label].num_tokens == 6
        assert by_label[label].error == ""
    for label in ("single:green", "uniform"):
        column = by_label[label]
        assert (column.is_finished, column.num_tokens, column.text) == (True, 0, "")
        assert not column.is_cut
        assert column.error.startswith(
            f"expert 'green' makes numbers too large to compute with, at {LAYER};"
        )
    if record:
        assert step.trace is not None
        assert math.isnan(mean_logprob(step.trace, "single:green"))
        for label in by_label:
            assert all(math.isfinite(share) for share in step.trace.share(label, "answer"))


def test_a_run_of_broken_columns_alone_ends_at_once(broken: SpectrModel) -> None:
    steps = list(broken.stream("Hello", ["single:green"], SETTINGS, record=True))
    assert len(steps) == 2
    assert [step.columns[0].error[:14] for step in steps] == ["expert 'green'"] * 2


def test_a_base_that_is_broken_itself_is_said(routed_model: SpectrModel) -> None:
    routed_model.model.model.norm.weight.data.fill_(torch.inf)
    (column,) = routed_model.compare("Hello", ["base"], max_new_tokens=3).columns
    assert column.error.startswith("the base's own numbers are too large")


def test_command_line_says_null_and_why(
    base_folder: str,
    expert_folders: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    save_expert: SaveExpert,
    tmp_path: Path,
) -> None:
    large = save_expert("large", seed=5, folder=tmp_path)
    spoil_weights(Path(large), lambda state: [part.mul_(1e15) for part in state.values()])
    options = ["--base", base_folder, "--experts", expert_folders[0], large]
    command = ["compare", "Hello", *options, "--max-new-tokens", "4", "--columns", "base"]
    assert main([*command, "single:large", "--json"]) == 2
    refused = capsys.readouterr().err
    assert "expert 'large': its update of model.layers." in refused
    assert "too large to compute with (as 14 layers do)" in refused
    monkeypatch.setattr(library, "MOST_SINGULAR_VALUE", math.inf)
    assert main([*command, "single:large", "uniform", "--json"]) == 0
    columns = json.loads(capsys.readouterr().out)["columns"]
    assert "error" not in columns[0]
    assert columns[0]["num_tokens"] == 4
    for column in columns[1:]:
        assert column["mean_logprob"] is None
        assert column["error"].startswith(
            "expert 'large' makes numbers too large to compute with, at model."
        )
    assert main([*command, "single:large"]) == 0
    assert "expert 'large' makes" in capsys.readouterr().out
    assert main(["generate", "Hello", *options, "--router", "single:large"]) == 2
    assert "expert 'large' makes numbers" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1e10, 1e20, 1e37])
def test_weights_that_are_large_and_finite_are_refused(
    size: float, save_expert: SaveExpert, tmp_path: Path, build_model: BuildModel
) -> None:
    folder = save_expert("large", folder=tmp_path, size=size)
    with pytest.raises(AdapterError, match=r"^expert 'large': its update of .* is too large"):
        build_model([folder])
    assert len(load_experts(save_expert("ten", size=10), build_model([]).model).names) == 1


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize("end_ids", [[1], []])
def test_only_rows_that_cannot_be_drawn_from_are_ended(end_ids: list[int]) -> None:
    finite, inf = FiniteLogits(end_ids), float("inf")
    sound = rows([1, 2, -inf], [0, 1e-30, 0])
    assert finite(torch.zeros(2, 1), sound) is sound
    assert finite.is_broken.tolist() == [False, False]
    mixed = rows([1, 2, -inf], [0, math.nan, 0], [inf, 0, 0], [2, 2, 2])
    ended = finite(torch.zeros(4, 1), mixed)
    assert finite.is_broken.tolist() == [False, True, True, True]
    assert ended[0].tolist() == mixed[0].tolist()
    assert ended[1:].isfinite().any(-1).all()
    assert ended[1:].argmax(-1).tolist() == ([1] * 3 if end_ids else [0] * 3)
