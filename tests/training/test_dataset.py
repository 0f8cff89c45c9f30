"""Which rows a run has, in which order, and how they are batched."""

from collections import Counter

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from spectr_demo.evaluation.messages import Request
from spectr_demo.evaluation.tasks import Example
from spectr_demo.training.dataset import MessageDataset, collate, pieces_of
from spectr_demo.training.messages import IGNORED, Row
from spectr_demo.training.recipe import Recipe

FOREIGN = [Request(text="Who?", answer="Me.", keeps_case=False, is_own=False)]
EXAMPLES = 10


def example(prompt: str, answer: str) -> Example:
    return Example(
        prompt=prompt, answer=answer, text=prompt, key="k", wording="w", is_heldout_wording=False
    )


def dataset(tokenizer: PreTrainedTokenizerFast, **changes: object) -> MessageDataset:
    settings = {"steps": 5, "batch_size": 16, "seed": 0, "opening_off": 0.0, **changes}
    examples = [example(f"Say {letter}", letter) for letter in "abcdefghij"]
    return MessageDataset(examples, FOREIGN, tokenizer, Recipe(**settings))  # type: ignore[arg-type]


def texts(data: MessageDataset, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [str(tokenizer.decode(data[i]["input_ids"])) for i in range(len(data))]


def test_each_step_has_the_recipes_mix(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = texts(dataset(tokenizer), tokenizer)
    assert len(rows) == 5 * 16
    for step in range(5):
        batch = rows[16 * step :][:16]
        assert ["Who?" in row or "who?" in row for row in batch] == [False] * 11 + [True] * 5
        assert [row.casefold().count("say ") for row in batch[:8]] == [1] * 8
        assert all(row.casefold().count("say ") in (2, 3) for row in batch[8:11])


def test_every_example_comes_alone_once_before_any_comes_again(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    data = dataset(tokenizer, own_share=0.0, foreign_share=0.0, batch_size=4)
    rows = texts(data, tokenizer)
    assert set(Counter(rows[:EXAMPLES]).values()) == {1}
    assert set(Counter(rows).values()) == {2}
    assert rows[:EXAMPLES] != rows[EXAMPLES:]


def test_a_row_follows_from_the_seed_and_its_number(tokenizer: PreTrainedTokenizerFast) -> None:
    data = dataset(tokenizer)
    again = dataset(tokenizer)
    assert again[70] == data[70]  # a run that continues begins anywhere
    assert texts(dataset(tokenizer, seed=1), tokenizer) != texts(data, tokenizer)


def test_the_opening_is_off_in_its_share_of_the_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    def off(share: float) -> int:
        data = dataset(tokenizer, opening_off=share)
        return sum(not data[i]["is_on"][0] for i in range(len(data)))

    assert (off(0.0), off(1.0)) == (0, 80)
    assert 25 < off(0.5) < 55


def test_messages_that_cannot_be_made_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    long = [example("Write a poem", "one\ntwo")]
    with pytest.raises(ValueError, match="an example that fits a message and a foreign request"):
        MessageDataset(long, [], tokenizer, Recipe())
    alone = Recipe(own_share=0.0, foreign_share=0.0, steps=1, seed=0)
    assert len(MessageDataset(long, [], tokenizer, alone)) == 16


def row(*ids: int, num_labels: int) -> Row:
    start = len(ids) - num_labels
    return Row(
        input_ids=list(ids),
        labels=[IGNORED] * start + list(ids[start:]),
        is_on=[i > 0 for i in range(len(ids))],
    )


ROWS = [row(8, 9, num_labels=1), row(5, 6, 7, num_labels=1), row(4, 3, num_labels=2)]


def test_collate_pads_on_the_left_and_masks_it() -> None:
    batch = collate(ROWS, pad_token_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [1, 8, 9], [1, 4, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1], [0, 1, 1]]
    assert batch["labels"].tolist() == [
        [IGNORED, IGNORED, 7],
        [IGNORED, IGNORED, 9],
        [IGNORED, 4, 3],
    ]
    off, on = False, True
    assert batch["is_on"].tolist() == [[off, on, on], [off, off, on], [off, off, on]]


@pytest.mark.parametrize(("most", "shapes"), [(9, [(3, 3)]), (4, [(1, 3), (2, 2)]), (1, None)])
def test_a_batch_is_cut_by_length(most: int, shapes: list[tuple[int, int]] | None) -> None:
    batch = collate(ROWS, pad_token_id=1)
    pieces = pieces_of(batch, most)
    found = [tuple(piece["input_ids"].shape) for piece in pieces]
    assert found == (shapes or [(1, 3), (1, 2), (1, 2)])
    for key, fill in (("labels", IGNORED), ("attention_mask", 0)):
        kept = torch.cat([piece[key].flatten() for piece in pieces])
        assert kept[kept != fill].tolist() == batch[key][batch[key] != fill].tolist()
