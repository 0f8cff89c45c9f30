"""Two answers word by word: what one says and the other does not."""

import difflib
import html
import re

_WORDS = re.compile(r"\s+|\w+|[^\w\s]")


def word_diff(old: str, new: str) -> tuple[str, str]:
    """Both as HTML: in the first what is left out of the second is struck out (`<del>`), in the
    second what is new is underlined (`<ins>`)."""
    words = _WORDS.findall(old), _WORDS.findall(new)
    matcher = difflib.SequenceMatcher(None, *words, autojunk=False)
    sides: tuple[list[str], list[str]] = ([], [])
    for kind, start, stop, new_start, new_stop in matcher.get_opcodes():
        parts = words[0][start:stop], words[1][new_start:new_stop]
        for side, part, mark in zip(sides, parts, ("del", "ins"), strict=True):
            text = html.escape("".join(part))
            side.append(f"<{mark}>{text}</{mark}>" if text and kind != "equal" else text)
    return "".join(sides[0]), "".join(sides[1])
