"""The names that PEFT's patterns match, in bounded time.

A configuration has regular expressions, and a layer has the value of the first one that matches
its name. PEFT asks Python's `re`, which can take for ever. Here the answers are the same, and the
expressions of an adapter have a time limit. Most patterns are plain names. These are compared
without an engine, so that thousands of them take milliseconds.
"""

import re
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod
from typing import Generic, TypeVar

import regex

MOST_PATTERNS = 10_000  # in one field; large models have a name for each of their layers
MOST_EXPRESSIONS = 2000  # of these
MOST_CHARACTERS = 20_000  # of one pattern
# Characters times the product of all counts in braces: the engine makes copies of what is repeated.
MOST_COPIES = 200_000
SECONDS = 4.0  # for all patterns of an adapter

_PLAIN = re.compile(r"[\w.-]+")
# Characters that no name has, and ranges of which take `re` a while each.
_FOREIGN = re.compile(r"[^\x20-\x7e]|\\[uUN]")
_COUNT = re.compile(r"\{(\d*)(?:(,)(\d*))?\}")
# What `re` takes for characters, and `regex` for something else.
_OTHERWISE = re.compile(r"\{(?!\d*(?:,\d*)?\})|\[:")

Value = TypeVar("Value")


class PatternError(ValueError):
    """A pattern that is no regular expression, or one that takes too long."""


class Clock:
    """The time that the expressions of one adapter have together: of this thread, so that a busy
    machine refuses no more than an idle one."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._end = time.thread_time() + seconds

    def left(self) -> float:
        """Seconds. Raises PatternError where there are none."""
        left = self._end - time.thread_time()
        if left <= 0:
            raise PatternError("its patterns take too long; name the layers instead")
        return left


def is_plain(pattern: str) -> bool:
    """Whether it is a name, in which a dot may stand for any character."""
    return _PLAIN.fullmatch(pattern) is not None


def of_value(pattern: str) -> str:
    """The expression for which PEFT takes a key of `rank_pattern` and `alpha_pattern`."""
    return rf"(.*\.)?({pattern})$"


def of_layers(pattern: str) -> str:
    """The expression for which PEFT takes an entry of `layers_pattern`."""
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def check_expression(expression: str, pattern: str, clock: Clock) -> None:
    """Raises PatternError where Python's `re` takes no such expression, or it is too long or too
    much to compile. pattern: what the file has of it."""
    clock.left()
    if len(pattern) > MOST_CHARACTERS:
        raise PatternError(f"a pattern has {len(pattern)} characters, {MOST_CHARACTERS} are read")
    if _FOREIGN.search(pattern):
        raise PatternError(f"{pattern[:60]!r} has characters that no layer's name has")
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError, Warning) as error:
        reason = str(error) or type(error).__name__
        raise PatternError(f"{pattern[:60]!r} is no regular expression ({reason})") from None
    counts = (int(upper or lower or 1) for lower, _, upper in _COUNT.findall(pattern))
    if len(pattern) * prod(filter(None, counts)) > MOST_COPIES:
        raise PatternError(f"{pattern[:60]!r} repeats its parts too often")
    if _OTHERWISE.search(pattern.replace(r"\{", "")):
        raise PatternError(f"{pattern[:60]!r} has a brace that is no count, or a class in a class")


class Expression:
    """One expression, and the time it may take."""

    def __init__(self, expression: str, clock: Clock) -> None:
        self._clock = clock
        clock.left()
        try:
            self._compiled = regex.compile(expression)
        except (regex.error, OverflowError, RecursionError, MemoryError) as error:
            raise PatternError(f"{expression[:60]!r} cannot be compiled ({error})") from None

    def match(self, name: str, *, is_whole: bool = False) -> "regex.Match[str] | None":
        """At the beginning of a name; is_whole: of all of it."""
        run = self._compiled.fullmatch if is_whole else self._compiled.match
        try:
            return run(name, timeout=self._clock.left())
        except (TimeoutError, MemoryError):
            raise PatternError("its patterns take too long; name the layers instead") from None


class Values(Generic[Value]):
    """The values of `rank_pattern` or `alpha_pattern`, by layer."""

    def __init__(self, patterns: Mapping[str, Value], clock: Clock) -> None:
        self._patterns = patterns
        self._clock = clock
        self._place = {pattern: place for place, pattern in enumerate(patterns)}
        # Of plain patterns: where they may have their dots, by their length.
        self._dots: dict[int, set[tuple[int, ...]]] = defaultdict(set)
        self._expressions: dict[str, Expression] = {}
        for pattern in patterns:
            if is_plain(pattern):
                self._dots[len(pattern)].add(_dots(pattern))
            else:
                self._expressions[pattern] = Expression(of_value(pattern), clock)

    def of(self, names: Sequence[str], default: Value) -> Value:
        """The value of the first pattern that matches one of the names of a layer."""
        for name in names:
            self._clock.left()
            matching = min(self._matching(name), key=self._place.__getitem__, default=name)
            if matching in self._patterns:
                return self._patterns[matching]
        return default

    def _matching(self, name: str) -> Iterator[str]:
        """The first expression, and all names."""
        for ending in endings(name):
            for dots in self._dots.get(len(ending), ()):
                pattern = _with_dots(ending, dots)
                if pattern in self._place:
                    yield pattern
        for pattern, expression in self._expressions.items():
            if expression.match(name):
                yield pattern
                break


class Targets:
    """The layers that a configuration names."""

    def __init__(
        self,
        targets: str | Collection[str],
        excluded: str | Collection[str],
        layers: Collection[int],
        layers_patterns: Sequence[str],
        clock: Clock,
    ) -> None:
        """Names, or an expression of whole names; nothing is excluded by an empty one. layers:
        numbers of decoder layers, empty for all. layers_patterns: where that number stands."""
        self._targets = _names_or_expression(targets, clock)
        self._excluded = _names_or_expression(excluded, clock) if excluded else frozenset()
        self._layers = frozenset(layers)
        expressions = map(of_layers, layers_patterns) if layers_patterns else [_ANY_LAYER]
        self._places = [Expression(each, clock) for each in expressions] if layers else []

    def has(self, name: str) -> bool:
        """Whether PEFT would give this layer an adapter."""
        if _is_among(name, self._excluded) or not _is_among(name, self._targets):
            return False
        if not self._layers or isinstance(self._targets, Expression) or name in self._targets:
            return True
        found = next(filter(None, (place.match(name) for place in self._places)), None)
        number = found["idx"] if found else None
        return number is not None and int(number) in self._layers


_ANY_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."


def _names_or_expression(
    names: str | Collection[str], clock: Clock
) -> "frozenset[str] | Expression":
    return Expression(names, clock) if isinstance(names, str) else frozenset(names)


def _is_among(name: str, names: "frozenset[str] | Expression") -> bool:
    if isinstance(names, Expression):
        return names.match(name, is_whole=True) is not None
    return not names.isdisjoint(endings(name))


def endings(name: str) -> Iterator[str]:
    """A name, and what is left of it after each of its dots."""
    yield name
    while name:
        _, dot, name = name.partition(".")
        if dot:
            yield name


def _dots(pattern: str) -> tuple[int, ...]:
    return tuple(place for place, character in enumerate(pattern) if character == ".")


def _with_dots(name: str, dots: Sequence[int]) -> str:
    characters = list(name)
    for place in dots:
        characters[place] = "."
    return "".join(characters)
