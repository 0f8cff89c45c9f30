"""How an answer's pieces and its ending are found, on the tiny model and by hand."""

from typing import Any

import pytest

from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.run import ColumnOutput, Step
from spectr_demo.serving.answer import Piece, first_of, num_held_back, pieces
from spectr_demo.serving.errors import ApiError
from spectr_demo.serving.request import Asked, ChatRequest, understood


def asked(model: SpectrModel, **settings: Any) -> Asked:
    body = {"model": "base", "messages": [{"role": "user", "content": "hello"}], **settings}
    return understood(ChatRequest(**body), model)


class Written:
    """A model whose steps are written by hand: texts, how much of each is settled, and whether the
    answer has ended."""

    def __init__(self, model: SpectrModel, *steps: tuple[str, int, bool]) -> None:
        self.model, self.steps = model, steps
        self.num_asked = self.num_made = 0

    def stream(self, messages: Any, routers: Any, settings: Any) -> Any:
        self.num_asked = settings.max_new_tokens
        for number, (text, num_settled, has_end) in enumerate(self.steps, start=1):
            self.num_made = number
            column = ColumnOutput(
                label="base",
                text=text,
                num_settled=num_settled,
                num_tokens=number,
                is_finished=has_end,
                tokens_per_second=0.0,
            )
            yield Step(columns=(column,))


def written(model: SpectrModel, *steps: tuple[str, int, bool], **settings: Any) -> list[Piece]:
    made: Any = Written(model, *steps)
    return list(pieces(asked(model, **settings), made))


def texts(found: list[Piece]) -> list[str]:
    return [piece.text for piece in found]


@pytest.mark.parametrize(
    ("max_tokens", "ending"),
    [(2, "length"), (3, "stop"), (4, "stop")],  # an end token at the last place ends it, too
)
def test_an_answer_that_ends_at_its_length_was_not_cut(
    routed_model: SpectrModel, max_tokens: int, ending: str
) -> None:
    steps = ("a", 1, False), ("ab", 2, False), ("ab", 2, True), ("never", 5, False)
    found = written(routed_model, *steps, max_tokens=max_tokens)
    assert [piece.ending for piece in found] == [None] * (len(found) - 1) + [ending]
    assert len(found) == min(3, max_tokens)
    assert "".join(texts(found)) == "ab"


def test_of_answers_side_by_side_the_first_is_written_first(routed_model: SpectrModel) -> None:
    steps = ("a\nx", 1, False), ("ab\nxy", 2, False), ("ab\nxyz", 6, False), ("ab\nxyz", 6, True)
    found = written(routed_model, *steps)
    assert texts(found) == ["a", "b", "\nxyz", ""]
    cut = written(routed_model, *steps, max_tokens=2)
    assert texts(cut) == ["a", "b\nxy"]


def test_a_stop_text_is_never_begun(routed_model: SpectrModel) -> None:
    steps = ("one <e", 6, False), ("one <en", 7, False), ("one <end> two", 13, False), ("", 0, True)
    found = written(routed_model, *steps, stop="<end>")
    assert texts(found) == ["one ", "", ""]
    assert found[-1].ending == "stop"
    other = written(routed_model, *steps[:2], ("one <enter", 10, True), stop="<end>")
    assert texts(other) == ["one ", "", "<enter"]


def test_stop_texts() -> None:
    assert first_of(["c", "b"], "abcabc") == 1
    assert first_of(["d"], "abc") is None
    assert first_of([], "abc") is None
    assert num_held_back(["abc", "bd"], "xxab") == 2
    assert num_held_back(["abc", "bd"], "xxb") == 1
    assert num_held_back(["abc"], "xxabd") == 0
    assert num_held_back([], "abc") == 0


def test_an_answer_may_fill_the_context(routed_model: SpectrModel) -> None:
    num_prompt = asked(routed_model).num_prompt
    assert asked(routed_model).settings.max_new_tokens == 511 - num_prompt
    full = asked(routed_model, max_tokens=511 - num_prompt)
    first = next(pieces(full, routed_model))
    assert first.step.columns[0].num_tokens == 1


def test_an_answer_that_has_to_end_is_an_error(routed_model: SpectrModel) -> None:
    class Broken:
        def stream(self, *_: Any) -> Any:
            column = ColumnOutput(
                label="base",
                text="",
                num_settled=0,
                num_tokens=0,
                is_finished=True,
                tokens_per_second=0.0,
                error="expert 'sql' makes numbers too large",
            )
            yield Step(columns=(column,))

    made: Any = Broken()
    with pytest.raises(ApiError, match="expert 'sql' makes numbers too large") as caught:
        list(pieces(asked(routed_model), made))
    assert caught.value.status == 500
