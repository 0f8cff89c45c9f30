"""docs/compatibility.md is what the table makes of it."""

from tests.compatibility.document import PAGE, document


def test_the_page_is_that_of_the_table() -> None:
    command = "run python -m tests.compatibility.document"
    assert PAGE.read_text(encoding="utf-8") == document(), command
