"""Text as Plotly has to be given it: escaped, its spaces kept, cut to a width."""

import html
import unicodedata


def escape(text: str) -> str:
    """Text safe in Plotly's labels, which read <tags>, &entities; and, with MathJax, $formulas$.

    "%{" is split too: Plotly reads it as a variable in a hover template.
    """
    return html.escape(text, quote=False).replace("$", "&#36;").replace("{", "&#123;")


def literal(text: str) -> str:
    """Text that Plotly draws as it is, its spaces included."""
    return escape(text).replace(" ", "\u00a0")


def axis_label(token: str) -> str:
    """A token as a tick label: short, and never blank."""
    text = visible(token).strip(" ") or "␣" * min(3, max(1, len(token)))
    return literal(shorten(text, 14))


def visible(text: str) -> str:
    """Text with its line breaks, tabs and other control characters made visible."""
    text = text.replace("\n", "↵").replace("\t", "⇥   ")
    return "".join(
        chr(0x2400 + ord(c)) if ord(c) < 32 else "\ufffd" if 0xD800 <= ord(c) < 0xE000 else c
        for c in text
    )


def shorten(text: str, max_chars: int) -> str:
    """Text cut to a number of cells, the cut shown by "…"; a final line break is kept."""
    if num_cells(text) <= max_chars:
        return text
    tail = "…↵" if text.endswith("↵") else "…"
    cut = text[: max_chars - len(tail)]
    while num_cells(cut) > max_chars - len(tail):
        cut = cut[:-1]
    return cut + tail


def num_cells(text: str) -> int:
    """The width of a text in a monospaced font: wide characters take two cells."""
    cells = 0
    for c in text:
        if unicodedata.category(c) not in {"Mn", "Me", "Cf"}:
            cells += 2 if unicodedata.east_asian_width(c) in "WF" else 1
    return cells


def counted(num: int, noun: str) -> str:
    """A number and its noun, such as "1 layer" and "2 layers"."""
    return f"{num} {noun}" if num == 1 else f"{num} {noun}s"
