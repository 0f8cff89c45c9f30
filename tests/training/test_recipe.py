"""The recipe's settings: what is refused, how long a run is, and where its seed comes from."""

import pytest

from spectr_demo.training.recipe import PAPER_RECIPE, Recipe, seed_of


@pytest.mark.parametrize("setting", ["steps", "batch_size", "learning_rate", "rank", "alpha"])
def test_recipe_refuses_what_is_not_positive(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting}=0"):
        Recipe(**{setting: 0})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"own_share": -0.1}, "own_share=-0.1"),
        ({"opening_off": 1.5}, "opening_off=1.5"),
        ({"own_share": 0.6, "foreign_share": 0.6}, "own_share=0.6, foreign_share=0.6"),
    ],
)
def test_recipe_refuses_shares_that_no_batch_has(settings: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Recipe(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("batch_size", "mix"),
    [(32, (16, 6, 10)), (16, (8, 3, 5)), (8, (4, 2, 2)), (2, (1, 0, 1)), (1, (1, 0, 0))],
)
def test_a_batch_of_any_size_keeps_the_proportions(
    batch_size: int, mix: tuple[int, int, int]
) -> None:
    recipe = Recipe(batch_size=batch_size)
    assert (recipe.num_single, recipe.num_own, recipe.num_foreign) == mix


def test_all_rows_may_be_messages() -> None:
    recipe = Recipe(batch_size=1, own_share=0.5, foreign_share=0.5)
    assert recipe.num_single + recipe.num_own + recipe.num_foreign == 1
    recipe = Recipe(batch_size=3, own_share=0.5, foreign_share=0.5)
    assert (recipe.num_single, recipe.num_own, recipe.num_foreign) == (0, 2, 1)


def test_an_epoch_is_every_example_once() -> None:
    assert (PAPER_RECIPE.rank, PAPER_RECIPE.alpha, PAPER_RECIPE.batch_size) == (8, 16, 8)
    assert PAPER_RECIPE.num_single == 8
    assert PAPER_RECIPE.num_steps(3668) == 459
    assert Recipe().num_steps(3668) == 300
    with pytest.raises(ValueError, match="epochs=0"):
        Recipe(epochs=0)


def test_the_seed_comes_from_the_name_unless_it_is_given() -> None:
    # The first four bytes of the SHA-256 of "cron".
    assert seed_of("cron") == 0xC374EEA5
    assert Recipe().for_expert("cron").seed == seed_of("cron") != seed_of("sql")
    assert Recipe(seed=0).for_expert("cron").seed == 0
    assert "epochs" not in Recipe().to_json()
