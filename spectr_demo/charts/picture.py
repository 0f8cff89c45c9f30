"""A Plotly figure with what it says in words and its numbers as a table."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go


@dataclass(frozen=True, kw_only=True)
class Picture:
    """title: states the finding. note: how to read it. header, rows: the same numbers as text."""

    title: str
    figure: go.Figure
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    @property
    def heading(self) -> str:
        """Title and note as HTML."""
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        return f'<div class="finding"><h3>{html.escape(self.title)}</h3>{note}</div>'

    @property
    def twin(self) -> str:
        """The numbers as an HTML table that opens with a click or a key."""
        return (
            f'<details class="twin"><summary>As a table</summary>{table(self.header, self.rows)}'
            "</details>"
        )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table in a box of its own, which scrolls where the page is too narrow."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{html.escape(first)}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return (
        '<div class="table" tabindex="0" role="group" aria-label="Table">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
