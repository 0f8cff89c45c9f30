"""A form as an address, and back."""

import pytest

from spectr_demo.ui.address import MAX_LENGTH, form_of, query_of
from tests.ui import conftest

OPENING = conftest.OPENING


def test_only_what_was_changed_is_in_the_address() -> None:
    form = conftest.form_of(prompt="a & b?\nü", seed=3, columns=["base", "lag"], temperature=0.5)
    query = query_of(form, OPENING)
    assert query == "prompt=a+%26+b%3F%0A%C3%BC&columns=base%2Clag&temperature=0.5&seed=3"
    assert form_of(f"?{query}", OPENING) == form
    assert query_of(conftest.form_of(prompt="hi"), OPENING) == "prompt=hi"


@pytest.mark.parametrize("query", ["", "?", "?run=abc&token=3", "?__theme=dark"])
def test_an_address_that_asks_nothing(query: str) -> None:
    assert form_of(query, OPENING) is None


def test_what_is_wrong_in_an_address_is_as_the_page_opens() -> None:
    form = form_of("?prompt=hi&seed=many&top_k=2&columns=,,&max_new_tokens=1e400", OPENING)
    assert form is not None
    assert (form.seed, form.top_k, list(form.columns)) == (OPENING["seed"], 2, [])
    assert form.max_new_tokens == OPENING["max_new_tokens"]


def test_a_long_prompt_is_left_out() -> None:
    form = conftest.form_of(prompt="x" * MAX_LENGTH, seed=3)
    assert query_of(form, OPENING) == "seed=3"
