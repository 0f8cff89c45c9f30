"""Reading: padding changes nothing, choices are those of the trace, accuracy counts them."""

from dataclasses import replace

import numpy as np
import pytest

from spectr_demo.base.prompts import encode
from spectr_demo.config import RouterConfig
from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation.accuracy import routing_accuracy
from spectr_demo.evaluation.reading import Reading, Text, read
from spectr_demo.routing.routers import parse_router
from spectr_demo.trace import NOT_ROUTED
from tests.conftest import IN_CONTEXT

CONSTANT = ["base", "single:red", "uniform"]
ROUTERS = [*CONSTANT, "arrow", "spectr", "spectr-calibrated", IN_CONTEXT]


def texts(engine: SpectrModel) -> list[Text]:
    pairs = [("Hi", "yes"), ("A much longer question than the other", "no"), ("Why?", "who knows")]
    return [
        Text(
            prompt_ids=tuple(encode(engine.tokenizer, prompt)),
            answer_ids=tuple(engine.tokenizer(answer)["input_ids"]),
        )
        for prompt, answer in pairs
    ]


def test_a_text_from_chat_is_the_prompt_in_the_template_and_the_answer_with_its_end(
    routed_model: SpectrModel,
) -> None:
    tokenizer = routed_model.tokenizer
    text = Text.from_chat(routed_model, "Why?", "who knows")
    assert text.prompt_ids == tuple(encode(tokenizer, "Why?"))
    assert text.answer_ids == (*tokenizer("who knows")["input_ids"], tokenizer.eos_token_id)


@pytest.mark.parametrize("spec", ROUTERS)
def test_a_batch_reads_as_its_texts_alone(
    routed_model: SpectrModel, spec: str | RouterConfig
) -> None:
    router = parse_router(spec, routed_model.library.names)
    together = read(routed_model, router, texts(routed_model), with_base=True)
    alone = read(routed_model, router, texts(routed_model), with_base=True, batch_size=1)
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.logprob, other.logprob, atol=1e-4)
        np.testing.assert_allclose(one.kl, other.kl, atol=1e-4)
        if one.choices is not None and other.choices is not None:
            np.testing.assert_array_equal(one.choices, other.choices)
        assert (one.choices is None) == (spec in CONSTANT)
        assert (one.kl.max() == 0) == (spec == "base")
        assert one.agrees.shape == one.logprob.shape
    base = read(routed_model, parse_router("base", routed_model.library.names), texts(routed_model))
    for one, other in zip(together, base, strict=True):
        np.testing.assert_allclose(one.base_logprob, other.logprob, atol=1e-4)


@pytest.mark.parametrize("spec", ["spectr", "arrow", IN_CONTEXT])
def test_reading_an_answer_repeats_the_run_that_wrote_it(
    routed_model: SpectrModel, spec: str | RouterConfig
) -> None:
    step = routed_model.compare("What is it?", [spec], max_new_tokens=8)
    assert step.trace is not None
    (column,) = step.trace.columns
    ids = tuple(column.token_ids.tolist())
    text = Text(prompt_ids=ids[: column.num_prompt], answer_ids=ids[column.num_prompt :])
    router = parse_router(spec, routed_model.library.names)
    (reading,) = read(routed_model, router, [text], with_base=True)
    assert reading.choices is not None
    np.testing.assert_array_equal(reading.choices, column.experts[:-1])
    np.testing.assert_allclose(reading.logprob, column.logprob[column.num_prompt :], atol=1e-4)
    np.testing.assert_allclose(reading.kl, column.kl[column.num_prompt :], atol=1e-4)


def test_where_no_expert_stands_out_it_reads_as_the_base(routed_model: SpectrModel) -> None:
    """With a confidence of 1 none does, nor is one chosen."""
    names = routed_model.library.names
    unsure = parse_router(replace(IN_CONTEXT, confidence=1.0), names)
    rows = read(routed_model, unsure, texts(routed_model)[:1], with_base=True)
    assert rows[0].choices is not None and (rows[0].choices == NOT_ROUTED).all()
    np.testing.assert_allclose(rows[0].kl, 0, atol=1e-5)


def test_a_router_that_reads_the_request_does_not_see_the_answer(
    routed_model: SpectrModel,
) -> None:
    """Its choice is that of the prompt, in every layer and for every token."""
    router = parse_router(IN_CONTEXT, routed_model.library.names)
    first, second = texts(routed_model)[:2]
    swapped = [replace(first, answer_ids=second.answer_ids * 5), second]
    rows = read(routed_model, router, [first, second])
    for one, other in zip(rows, read(routed_model, router, swapped), strict=True):
        assert one.choices is not None and other.choices is not None
        assert len(np.unique(one.choices)) == 1
        assert np.unique(one.choices) == np.unique(other.choices)
    lane = routed_model.reader.whole(router, first.prompt_ids)
    assert rows[0].choices is not None and rows[0].choices[0, 0, 0, 0] == lane.expert


def reading(choices: list[list[int]], num_prompt: int) -> Reading:
    """One layer and one projection; choices by token, best first."""
    return Reading(
        logprob=np.zeros(2, np.float32),
        kl=np.zeros(0, np.float32),
        agrees=np.zeros(0, np.bool_),
        base_logprob=np.zeros(0, np.float32),
        choices=np.array(choices, np.int16)[:, None, None],
        num_prompt=num_prompt,
        num_opening=1,
    )


def test_accuracy_counts_prompt_and_answer_apart() -> None:
    # Opening, three prompt tokens of which the last makes the first answer token, one answer token.
    result = routing_accuracy([reading([[9, 9], [0, 1], [1, 0], [1, 0], [0, 1]], 4)], expert=0)
    assert result["prompt"] == 0.5
    assert result["answer"] == 0.5
    assert result["among_top_k"] == 1.0
    assert result["by_layer"] == [0.5]
    assert result["by_projection"] == [0.5]


def test_deciding_for_no_expert_is_not_right() -> None:
    none = NOT_ROUTED
    result = routing_accuracy([reading([[none]] * 4 + [[0]], 3)], expert=0)
    assert result["answer"] == pytest.approx(1 / 3)
    assert result["unrouted"] == pytest.approx(2 / 3)
    assert result["majority"] == 1.0
    assert routing_accuracy([reading([[none]] * 5, 3)], expert=0)["majority"] == 0.0
