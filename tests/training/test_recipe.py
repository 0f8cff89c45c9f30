"""The recipe's settings: what is refused, and how long a run is."""

import json

import pytest

from spectr_demo.training.recipe import PAPER_RECIPE, Recipe


@pytest.mark.parametrize("setting", ["steps", "batch_size", "learning_rate", "rank", "alpha"])
def test_recipe_refuses_what_is_not_positive(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting}=0"):
        Recipe(**{setting: 0})


def test_an_epoch_is_every_example_once() -> None:
    assert (PAPER_RECIPE.rank, PAPER_RECIPE.alpha, PAPER_RECIPE.batch_size) == (8, 16, 8)
    assert PAPER_RECIPE.num_steps(3668) == 459
    assert Recipe().num_steps(3668) == 300
    with pytest.raises(ValueError, match="epochs=0"):
        Recipe(epochs=0)


def test_the_default_recipes_run_folder_is_what_it_was_before_there_were_epochs() -> None:
    assert json.dumps(Recipe().to_json()) == (
        '{"steps": 300, "batch_size": 8, "learning_rate": 0.0005, "warmup_fraction": 0.06, '
        '"rank": 8, "alpha": 16, "seed": 0}'
    )
