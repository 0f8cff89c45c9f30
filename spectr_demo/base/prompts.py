"""Chat template and tokenizing: from messages to token ids; the parts that all prompts share."""

import bisect
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spectr_demo.base.templates import apply_template, check_shown

Message = dict[str, str]
CHARACTERS_PER_TOKEN = 16  # at most, in the mean of a prompt; English has four to five


def check_prompt(prompt: str | Sequence[Message], context: int | None = None) -> None:
    """Raise ValueError for a prompt that is empty or no text, or has too many characters.

    context: of the base, in tokens; None leaves the length alone. A tokenizer is not asked: of
    megabytes of text it takes minutes and gigabytes.
    """
    messages = _messages(prompt)
    num = sum(len(message["content"]) for message in messages)
    if context is not None and num > CHARACTERS_PER_TOKEN * context:
        raise ValueError(
            f"the prompt has {num:,} characters; a base with a context of {context:,} tokens takes "
            f"at most {CHARACTERS_PER_TOKEN * context:,}: shorten the prompt"
        )
    if not any(message["content"].strip() for message in messages):
        raise ValueError("the prompt is empty; write a question or an instruction")
    for message in messages:
        _check_text(message["content"])


def _messages(prompt: str | Sequence[Message]) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message]) -> list[int]:
    """Token ids of a prompt in the base's chat template, ready for an answer.

    A base without a chat template reads plain text. What a message holds is text: "<|im_end|>" in
    it ends nothing. Raises ValueError if the prompt is empty or no text, and where the template
    refuses one of several messages or leaves it out.
    """
    check_prompt(prompt)
    messages = _messages(prompt)
    if tokenizer.chat_template is None:
        text = "\n".join(message["content"] for message in messages)
        return list(tokenizer(text, split_special_tokens=True)["input_ids"])
    if len(messages) > 1:  # that it shows one message is known since it was loaded
        check_shown(tokenizer, messages)
    options = {"return_dict": True, "sanitize_control_tokens": True}
    return list(apply_template(tokenizer, messages, **options)["input_ids"])


def _check_text(text: str) -> None:
    """Raise ValueError for half of a surrogate pair, as JSON and a command line may hand it on."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt has half a character at place {error.start} ({text[error.start]!r}); "
            "leave it out, since it is no text"
        ) from error


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

    They say nothing about the request, and are read once for many of them.
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

    There are none for a base without a chat template, or with one that takes a single message.
    There are none either where the template opens the first turn otherwise than later ones.
    """
    if tokenizer.chat_template is None:
        return []
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    try:
        one, other = (
            encode(tokenizer, [*turns, {"role": "user", "content": word}]) for word in ("A", "b")
        )
    except ValueError:
        return []
    first, later = template_opening(tokenizer), one[: shared_length(one, other)]
    length = shared_length(first[::-1], later[::-1])
    return first[len(first) - length :]


def template_closing(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids with which every prompt ends, after what is asked."""
    one, other = (encode(tokenizer, word) for word in ("A", "b"))
    return one[len(one) - shared_length(one[::-1], other[::-1]) :]


# Where one request may end and the next begin: at the end of a line or of a sentence, or before a
# word that joins two. The mark of a list item ("2. ") ends no sentence.
_NEXT = (
    "then|also|next|finally|dann|außerdem|puis|ensuite|aussi|luego|después|también|poi|inoltre|"
    "então|depois|também"
)
_AND = "and|und|et|y|e"
_WORD = rf"(?:{_NEXT}|{_AND})\b(?!\.)"  # no "e.g."
_QUOTES = "\"'”’»)」』"
_BOUNDARY = re.compile(
    rf"\n+|(?<=[.?!;。？！；।؟])[{_QUOTES}]*\s+(?=\S)|(?<=[。？！；])[{_QUOTES}]*+(?=[^\s。？！；])"
    rf"|,?(?<!\s)\s+(?={_WORD})",
    re.IGNORECASE,
)
_JOINS = re.compile(rf"[\s,;]*(?:{_WORD}[\s,:]*)*", re.IGNORECASE)
_GOES_ON = re.compile(rf"\s*\n|[\s,;.]*(?:(?:{_AND})\s+)?(?:{_NEXT})\b", re.IGNORECASE)
_BEGINS = re.compile(_WORD, re.IGNORECASE)
_MARK = re.compile(r"(?:\d+|[a-z])[.)]|[-*•]", re.IGNORECASE)
LIST_MARK = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s+")
MOST_PARTS = 8  # of a request; one with more is a text, and is not taken apart


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a request that may be a request of its own: tokens start to stop of the prompt.

    is_next: it begins with a new line, or with a word such as "then". is_item: with a list mark.
    """

    start: int
    stop: int
    is_next: bool
    is_item: bool = False


def parts(pieces: Sequence[str], start: int, stop: int) -> list[Part]:
    """The parts of a request, one after the other without a gap.

    pieces: what each token of the prompt adds to its text. start, stop: of the request's tokens. A
    part that ends with a colon goes on in the next one. A request of many parts is one.
    """
    text = "".join(pieces[start:stop])
    ends = list(itertools.accumulate(len(piece) for piece in pieces[start:stop]))
    # A token belongs to the part in which it begins: the space before a word to the word, all bytes
    # of a character to the character, and a stop with a line end (".\n") to what it ends.
    begins = [0, *ends[:-1]]
    is_next = {0: bool(_GOES_ON.match(text))}
    for cut in _cuts(text):
        first = bisect.bisect_left(begins, cut)
        if first < len(begins):
            is_next[first] = is_next.get(first, False) or bool(_GOES_ON.match(text, cut))
    if len(is_next) > MOST_PARTS:
        is_next = {0: is_next[0]}
    bounds = itertools.pairwise([*is_next, stop - start])
    return [
        Part(
            start=start + a,
            stop=start + b,
            is_next=is_next[a],
            is_item=bool(LIST_MARK.match("".join(pieces[start + a : start + b]))),
        )
        for a, b in bounds
    ]


def _cuts(text: str) -> list[int]:
    """Where parts begin after the first one, in characters; those of too many are not all found."""
    cuts: list[int] = []
    length = len(text.rstrip())
    words = _JOINS.match(text)  # with which the part begins that goes on
    for match in _BOUNDARY.finditer(text):
        # Quotation marks belong to what they end.
        cut = match.start() + len(match.group()) - len(match.group().lstrip(_QUOTES))
        before, after = text[: match.start()].rstrip(), text[match.end() : match.end() + 1]
        is_inside = (
            (words is not None and cut <= words.end())
            or before.endswith((":", "："))
            or _MARK.fullmatch(before[before.rfind("\n") + 1 :].strip())
            or (before.endswith(".") and after.islower() and not _BEGINS.match(text, match.end()))
        )
        if not is_inside and match.end() < length:
            cuts.append(cut)
            words = _JOINS.match(text, cut)
        if len(cuts) == MOST_PARTS:
            break
    return cuts


def request_start(ids: Sequence[int], opening: Sequence[int], turn: Sequence[int]) -> int:
    """Where a prompt's last request begins, in tokens.

    opening: of `template_opening`. turn: of `user_turn`.
    """
    for end in range(len(ids), len(opening), -1):
        if turn and list(ids[end - len(turn) : end]) == list(turn):
            return end
    return shared_length(opening, ids)


def token_pieces(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds; pieces join to the whole text, special tokens included.

    A character spread over several tokens belongs to the last of them; the others are empty.
    """

    def decode(first: int, last: int) -> str:
        return str(tokenizer.decode(list(token_ids[first:last]), skip_special_tokens=False))

    pieces = []
    context = done = 0  # text before `done` is out; decoding starts at `context` to keep spaces
    for end in range(1, len(token_ids) + 1):
        before, text = decode(context, done), decode(context, end)
        is_whole = not text.endswith("�") or end == len(token_ids)
        pieces.append(text[len(before) :] if is_whole else "")
        if is_whole:
            context, done = done, end
    return pieces


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common from their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


@dataclass(frozen=True, kw_only=True)
class Template:
    """What a base's prompts have around what is asked, as token ids.

    opening, closing: of every prompt. user_turn: before what a user says, in every turn.
    """

    opening: list[int]
    closing: list[int]
    user_turn: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Template":
        return cls(
            opening=template_opening(tokenizer),
            closing=template_closing(tokenizer),
            user_turn=user_turn(tokenizer),
        )

    def request(self, ids: Sequence[int]) -> tuple[int, int]:
        """Where the last request of a prompt begins and ends, in tokens."""
        start, stop = request_start(ids, self.opening, self.user_turn), len(ids)
        num = len(self.closing)
        if num and list(ids[stop - num :]) == self.closing and start < stop - num:
            stop -= num
        return min(start, stop - 1), stop
