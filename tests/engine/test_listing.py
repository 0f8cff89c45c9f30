"""A model that has the experts of another one."""

from dataclasses import replace
from pathlib import Path

import pytest

from spectr_demo.engine.model import SpectrModel
from spectr_demo.experts.adapters import AdapterError
from tests.conftest import BuildModel, SaveExpert

COLUMNS = ["uniform", "spectr-paper"]


def texts(model: SpectrModel) -> list[str]:
    return [c.text for c in model.compare("Paint it", COLUMNS, max_new_tokens=6).columns]


def test_a_model_becomes_another(
    build_model: BuildModel, expert_folders: list[str], save_expert: SaveExpert
) -> None:
    front, follower = build_model(expert_folders), build_model([])
    follower.become(front.listing)
    assert follower.library.names == ("red", "green", "blue")
    assert texts(follower) == texts(front)
    front.add(save_expert("violet", seed=7))
    front.disable("green")
    front.replace("red", save_expert("red", seed=9))
    front.remove("blue")
    follower.become(front.listing)
    assert follower.library.names == ("red", "violet")
    assert follower.disabled == ("green",)
    assert follower.listing == front.listing
    assert texts(follower) == texts(front)


def test_experts_that_are_there_are_not_read_again(
    build_model: BuildModel, save_expert: SaveExpert, tmp_path: Path
) -> None:
    folder = Path(save_expert("red", folder=tmp_path))
    model = build_model([str(folder)])
    before = model.listing
    model.add(save_expert("blue", seed=1))
    folder.rename(tmp_path / "gone")
    model.become(before)
    assert model.library.names == ("red",)


def test_other_files_under_the_same_path_change_nothing(
    build_model: BuildModel, expert_folders: list[str]
) -> None:
    model, follower = build_model(expert_folders), build_model([])
    first, *others = model.listing.experts
    listing = replace(model.listing, experts=(replace(first, sha256="0" * 64), *others))
    with pytest.raises(AdapterError, match=r"'red': .*red holds another adapter here"):
        follower.become(listing)
    assert follower.library.names == ()


def test_a_listing_names_folders_in_full(
    build_model: BuildModel,
    save_expert: SaveExpert,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_expert("red", folder=tmp_path)
    monkeypatch.chdir(tmp_path)
    (expert,) = build_model(["red"]).listing.experts
    assert expert.source == str((tmp_path / "red").resolve())
