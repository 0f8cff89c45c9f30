"""Chat template and tokenizing: from messages to token ids; the parts that all prompts share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

_MOST_LINES = 4  # of a message that may hold several requests; a longer one is a text


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message]) -> list[int]:
    """Token ids of a prompt in the base's chat template, ready for an answer.

    A base without a chat template reads plain text. Raises ValueError if the prompt is empty.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not any(message["content"].strip() for message in messages):
        raise ValueError("the prompt is empty; write a question or an instruction")
    if tokenizer.chat_template is None:
        text = "\n".join(message["content"] for message in messages)
        return list(tokenizer(text)["input_ids"])
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(cast(dict[str, list[int]], encoded)["input_ids"])


def encode_answer(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Token ids of an answer, the end token included where the base has one."""
    answer_ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return [*answer_ids, *end]


def encode_answered(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> list[int]:
    """Token ids of a prompt and its answer, the end token included where the base has one."""
    return [*encode(tokenizer, prompt), *encode_answer(tokenizer, answer)]


def pad_left(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of a batch, both (R, T) int64."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def template_opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids with which every prompt opens: the chat template's, before what is asked.

    They say nothing about the request. So routers that pool evidence leave them out.
    """
    one, other = (encode(tokenizer, word) for word in ("A", "b"))
    return one[: shared_length(one, other)]


def decoder_inputs(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """What a decoder needs to read a batch once: `pad_left`, and positions that skip padding."""
    ids, mask = (part.to(device) for part in pad_left(rows))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def user_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids that stand before what a user says, in the first turn and in later ones.

    There are none for a base without a chat template. There are none either where the template
    opens the first turn otherwise than later ones.
    """
    if tokenizer.chat_template is None:
        return []
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    one, other = (encode(tokenizer, [*turns, {"role": "user", "content": w}]) for w in ("A", "b"))
    first, later = template_opening(tokenizer), one[: shared_length(one, other)]
    length = shared_length(first[::-1], later[::-1])
    return first[len(first) - length :]


def template_closing(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids with which every prompt ends, after what is asked."""
    one, other = (encode(tokenizer, word) for word in ("A", "b"))
    return one[len(one) - shared_length(one[::-1], other[::-1]) :]


def newline_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """All tokens that end a line."""
    # As byte-level tokenizers and SentencePiece write it: to decode all tokens takes seconds.
    marks = ("\n", "Ċ", "<0x0A>")
    vocabulary = tokenizer.get_vocab().items()
    candidates = [i for token, i in vocabulary if any(mark in token for mark in marks)]
    return frozenset(i for i in candidates if "\n" in tokenizer.decode([i]))


def request_lines(
    ids: Sequence[int], start: int, closing: Sequence[int], newlines: frozenset[int]
) -> list[tuple[list[int], int]]:
    """Each line of a prompt's last request, read as if it were the last line.

    start, closing, newlines: as the functions here give them. Returns for each line the prompt's
    ids up to its end, with the closing, and where the line begins in them. If the request has one
    line, or more than a few, that is the whole prompt alone.
    """
    ids, end = list(ids), len(ids)
    if closing and ids[end - len(closing) :] == list(closing):
        end -= len(closing)
    starts = [
        t
        for t in range(start, end)
        if ids[t] not in newlines and (t == start or ids[t - 1] in newlines)
    ]
    if not 1 < len(starts) <= _MOST_LINES:
        return [(ids, start)]
    cuts = [[*ids[:later], *ids[end:]] for later in starts[1:]]
    return list(zip([*cuts, ids], starts, strict=True))


def request_start(ids: Sequence[int], opening: Sequence[int], turn: Sequence[int]) -> int:
    """Where a prompt's last request begins, in tokens.

    opening: of `template_opening`. turn: of `user_turn`.
    """
    for end in range(len(ids), len(opening), -1):
        if turn and list(ids[end - len(turn) : end]) == list(turn):
            return end
    return shared_length(opening, ids)


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common from their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


@dataclass(frozen=True, kw_only=True)
class Template:
    """What a base's prompts have around what is asked, as token ids.

    opening, closing: of every prompt. user_turn: before what a user says, in every turn.
    newline_ids: all tokens that end a line.
    """

    opening: list[int]
    closing: list[int]
    user_turn: list[int]
    newline_ids: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Template":
        return cls(
            opening=template_opening(tokenizer),
            closing=template_closing(tokenizer),
            user_turn=user_turn(tokenizer),
            newline_ids=newline_ids(tokenizer),
        )

    def request_lines(self, ids: Sequence[int]) -> list[tuple[list[int], int]]:
        """The lines of a prompt's last request, see `request_lines`."""
        start = request_start(ids, self.opening, self.user_turn)
        return request_lines(ids, start, self.closing, self.newline_ids)
