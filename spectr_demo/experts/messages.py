"""What people are told about adapters: one error for all that is wrong, printable and short.

Names and values in these messages come from strangers' files.
"""

import reprlib
from collections.abc import Sequence
from typing import Any

MOST_SHOWN = 200  # characters of one name
MOST_SAID = 2000  # characters of one problem

_values = reprlib.Repr()  # of any depth and size, in bounded time
_values.maxlevel, _values.maxstring, _values.maxother = 4, 60, 60
_values.maxdict = _values.maxlist = _values.maxtuple = _values.maxset = 8


class AdapterError(ValueError):
    """Everything that is wrong with the adapters asked for, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = [shown(problem, MOST_SAID) for problem in problems]
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type["AdapterError"], tuple[list[str]]]:
        """For other processes: made of the problems again, not of their text."""
        return type(self), (self.problems,)


def shown(text: object, most: int = MOST_SHOWN) -> str:
    """A text in one line: what is not printable is escaped, and the middle of a long one left
    out."""
    line = str(text)
    if len(line) > most:
        line = f"{line[: most // 2]}...{line[-(most // 2) :]}"
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def short(value: Any) -> str:
    """A value of a configuration."""
    text = _values.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def first(found: Sequence[str], what: str) -> str:
    """The first of several, and how many there are."""
    return found[0] if len(found) == 1 else f"{found[0]} (as {len(found)} {what} do)"
