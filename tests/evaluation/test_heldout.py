"""Intervals by hand-computed values; generation on the tiny model."""

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from spectr_demo.evaluation.heldout import generate_answers, score_answers, summarize
from spectr_demo.evaluation.tasks import TASKS, Example


def test_wilson_interval_of_half() -> None:
    # 5 of 10: centre 0.5, half width 0.2634 (Wilson 1927).
    score = summarize([1.0] * 5 + [0.0] * 5)
    assert (score.mean, score.num) == (0.5, 10)
    assert score.low == pytest.approx(0.2366, abs=1e-3)
    assert score.high == pytest.approx(0.7634, abs=1e-3)


def test_all_wrong_still_has_an_interval() -> None:
    score = summarize([0.0] * 200)
    assert (score.mean, score.low) == (0.0, 0.0)
    assert score.high == pytest.approx(0.0188, abs=1e-3)


def test_graded_scores_are_bootstrapped() -> None:
    score = summarize([0.4, 0.5, 0.6, 0.7] * 25)
    assert score.mean == pytest.approx(0.55)
    # 1.96 standard errors of the mean: 1.96 * 0.1118 / 10 = 0.0219.
    assert score.low == pytest.approx(0.528, abs=4e-3)
    assert score.high == pytest.approx(0.572, abs=4e-3)
    assert summarize([0.4, 0.5, 0.6, 0.7] * 25) == score


def test_no_scores_is_an_error() -> None:
    with pytest.raises(ValueError, match="got none"):
        summarize([])


def test_answers_come_back_in_order_and_do_not_depend_on_the_batch(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = ["a longer question about ships", "hi", "three words here", "x"]
    together = generate_answers(llama, tokenizer, prompts, max_new_tokens=6, batch_size=3)
    alone = [generate_answers(llama, tokenizer, [p], max_new_tokens=6)[0] for p in prompts]
    assert together == alone
    assert len(set(alone)) > 1


def test_generation_follows_the_weights(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = generate_answers(llama, tokenizer, ["hello there"], max_new_tokens=6)
    with torch.no_grad():
        llama.lm_head.weight.neg_()
    assert generate_answers(llama, tokenizer, ["hello there"], max_new_tokens=6) != before


def test_scores_are_kept_apart_by_wording() -> None:
    examples = [
        Example(
            prompt="p",
            answer='{"intent": "TurnOn"}',
            text="t",
            key="k",
            wording="w",
            is_heldout_wording=bool(i % 2),
        )
        for i in range(4)
    ]
    right, wrong = '{"intent": "TurnOn"}', "no"
    scores = score_answers(TASKS["smart_home"], examples, [right, wrong, right, right])
    assert {group: score.mean for group, score in scores.items()} == {
        "all": 0.75,
        "seen wording": 1.0,
        "held-out wording": 0.5,
    }
