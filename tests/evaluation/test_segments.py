"""The segment oracle: each token by the expert of its part, and where a part ends."""

import pytest
import torch

from spectr_demo.config import RouterConfig
from spectr_demo.engine.layers import routed
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.sampling import end_token_ids
from spectr_demo.evaluation.generation import routed_answers
from spectr_demo.evaluation.messages import CLOSING, OPENING
from spectr_demo.evaluation.segments import (
    SegmentPlan,
    Segments,
    newline_id,
    newline_ids,
    segment_answers,
)

NEWLINE, END, WORD, OTHER = 10, 1, 5, 6
VOCABULARY = 12


def segments(*experts: int, caps: tuple[int, ...] | None = None) -> Segments:
    owners = (OPENING, *range(len(experts)), CLOSING)
    ids = (WORD,) * len(owners)
    return Segments(ids=ids, owners=owners, experts=experts, caps=caps or (9,) * len(experts))


def plan_of(*rows: Segments) -> SegmentPlan:
    plan = SegmentPlan(
        rows, newline_ids=[NEWLINE], newline_id=NEWLINE, end_ids=[END], device=torch.device("cpu")
    )
    plan.begin_pass(torch.full((len(rows), max(len(row.ids) for row in rows)), WORD))
    return plan


def say(plan: SegmentPlan, *wishes: int) -> list[int]:
    """What the rows say where the model would say these tokens."""
    scores = torch.nn.functional.one_hot(torch.tensor(wishes), VOCABULARY).float()
    said = plan(torch.zeros(len(wishes), 1), scores).argmax(-1)
    plan.begin_pass(said[:, None])
    return said.tolist()


def parts_of(plan: SegmentPlan, num_tokens: int) -> list[int]:
    return plan.owners_of_answer(num_tokens)[0].tolist()


def test_a_line_ends_a_part_and_its_newline_is_the_next_ones(routed_model: SpectrModel) -> None:
    plan, bank = plan_of(segments(2, 0)), routed_model.library.banks[0]
    assert bank.expert_ids.tolist() == [0, 1, 2]
    # The opening is the base's, then the two requests, then the closing: the first part's.
    prompt = [[0, 0, 0], [0, 0, 1], [1, 0, 0], [0, 0, 1]]
    assert plan.weights(bank)[0].int().tolist() == prompt
    assert say(plan, WORD) == [WORD]
    assert plan.weights(bank)[0].int().tolist() == [[0, 0, 1]]
    assert say(plan, NEWLINE) == [NEWLINE]
    assert plan.weights(bank)[0].int().tolist() == [[1, 0, 0]]
    assert say(plan, OTHER) == [OTHER]
    assert parts_of(plan, 3) == [0, 0, 1]


def test_an_end_becomes_a_newline_where_a_part_follows() -> None:
    plan = plan_of(segments(0, 1))
    assert [say(plan, wish) for wish in (WORD, END, WORD, END)] == [[5], [NEWLINE], [5], [END]]
    assert parts_of(plan, 4) == [0, 0, 1, 1]


def test_rows_go_on_by_themselves() -> None:
    plan = plan_of(segments(0, 1), segments(0, 1, 2))
    assert say(plan, WORD, END) == [WORD, NEWLINE]
    assert say(plan, END, END) == [NEWLINE, NEWLINE]
    assert say(plan, END, END) == [END, END]
    assert plan.owners_of_answer(3).tolist() == [[0, 0, 1], [0, 1, 2]]


def test_a_newline_before_anything_is_said_ends_nothing() -> None:
    plan = plan_of(segments(0, 1))
    for wish in (NEWLINE, WORD, NEWLINE, NEWLINE, WORD):
        say(plan, wish)
    assert parts_of(plan, 5) == [0, 0, 0, 1, 1]


def test_a_part_is_cut_at_its_cap() -> None:
    plan = plan_of(segments(0, 1, caps=(2, 1)))
    said = [say(plan, WORD)[0] for _ in range(5)]
    assert said == [WORD, WORD, NEWLINE, WORD, END]


def test_newlines_are_tokens_that_decode_to_one(routed_model: SpectrModel) -> None:
    tokenizer = routed_model.tokenizer
    assert [tokenizer.decode([i]) for i in newline_ids(tokenizer)] == ["\n"]
    assert newline_ids(tokenizer) == [newline_id(routed_model)]


@pytest.mark.parametrize("expert", ["red", "blue"])
def test_one_part_is_a_single_expert_token_by_token(routed_model: SpectrModel, expert: str) -> None:
    ids = tuple(routed_model.encode("a request about ships"))
    one = Segments(
        ids=ids,
        owners=(0,) * len(ids),
        experts=(routed_model.library.index(expert),),
        caps=(12,),
    )
    router = RouterConfig(name="single", expert=expert)
    hidden = []
    plan = SegmentPlan(
        [one],
        newline_ids=newline_ids(routed_model.tokenizer),
        newline_id=newline_id(routed_model),
        end_ids=sorted(end_token_ids(routed_model.base)),
        device=routed_model.base.device,
    )
    for either in (plan, routed_model.plan([router], [ids])):
        with torch.inference_mode(), routed(either):
            hidden.append(routed_model.model.get_decoder()(torch.tensor([ids])).last_hidden_state)
    torch.testing.assert_close(*hidden)
    with torch.inference_mode(), routed(None):
        base = routed_model.model.get_decoder()(torch.tensor([ids])).last_hidden_state
    assert not torch.allclose(hidden[0], base)
    ((answer,),) = segment_answers(routed_model, [one])
    assert [answer] == routed_answers(routed_model, router, [list(ids)], max_new_tokens=12)


def test_answers_do_not_depend_on_the_batch_and_experts_matter(routed_model: SpectrModel) -> None:
    def asked(text: str, *experts: int) -> Segments:
        ids = tuple(routed_model.encode(text))
        half = len(ids) // 2
        owners = (0,) * half + (1,) * (len(ids) - half)
        return Segments(ids=ids, owners=owners, experts=experts, caps=(6, 6))

    rows = [asked("ships\nand boats", 0, 1), asked("x\ny", 1, 2), asked("ships\nand boats", 1, 0)]
    together = segment_answers(routed_model, rows)
    assert together == [segment_answers(routed_model, [row])[0] for row in rows]
    assert together[0] != together[2]
    assert all(len(parts) == 2 for parts in together)


def test_a_base_without_a_newline_token_is_refused(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        type(routed_model.tokenizer), "__call__", lambda *a, **k: {"input_ids": [7]}
    )
    with pytest.raises(ValueError, match="tiny: its tokenizer has no token that ends a line"):
        newline_id(routed_model)
