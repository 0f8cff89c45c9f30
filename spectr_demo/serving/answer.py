"""An answer as it is written: the text that is new, and why it ended."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Literal

from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.run import Step
from spectr_demo.serving.errors import ApiError
from spectr_demo.serving.request import Asked

Ending = Literal["stop", "length"]  # by itself or at a stop text; at its length


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one more token adds. text: may be empty. step: the run's own. ending: of the last
    piece."""

    text: str
    step: Step
    ending: Ending | None


def pieces(asked: Asked, model: SpectrModel) -> Generator[Piece, None, None]:
    """The answer to a request, a piece for each token; closing it ends the run.

    A step does not say whether an answer that is full has ended, too. So the run may go one token
    further than is asked for, and is left there: what has not ended by then was cut.
    Raises ApiError where the answer has to end before.
    """
    num_most = asked.settings.max_new_tokens
    settings = replace(asked.settings, max_new_tokens=num_most + 1)
    written = 0
    with closing(model.stream(asked.messages, [asked.router], settings)) as run:  # type: ignore[type-var]
        for num, step in enumerate(run, start=1):
            column = step.columns[0]
            if column.error:
                raise ApiError(column.error, status=500)
            is_full = num == num_most
            ending: Ending | None = "stop" if column.is_finished else "length" if is_full else None
            # Of several answers that grow side by side, the first is settled first.
            text = column.text if ending else column.text[: column.num_settled]
            stop = first_of(asked.stop, text)
            if stop is not None:
                text, ending = text[:stop], "stop"
            elif ending is None:
                text = text[: len(text) - num_held_back(asked.stop, text)]
            yield Piece(text=text[written:], step=step, ending=ending)
            written = max(written, len(text))
            if ending:
                return


def first_of(stops: Sequence[str], text: str) -> int | None:
    """Where the first of the stop texts begins."""
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(found, default=None)


def num_held_back(stops: Sequence[str], text: str) -> int:
    """Characters at the end of a text that may be the beginning of a stop text."""
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )
