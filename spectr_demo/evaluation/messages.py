"""Messages that hold one to three requests: how they are worded, and whose each token is.

An answer has one line for each request, in the order of the message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

# The ways in which requests are put into one message. The last one is never trained.
TRAINED_FORMATS = ("lines", "numbered", "then", "sentence")
FORMATS = (*TRAINED_FORMATS, "bulleted")
# Owners of a prompt's tokens that belong to no request.
OPENING, CLOSING = -1, -2
_MARKER = "XYZZY"

Piece = tuple[str, int]  # a text, and its owner: the number of the request it belongs to


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request and its answer.

    keeps_case: whether it begins with a text whose case counts, not with an instruction.
    is_own: whether it is of the domain of the expert that is trained. is_answered: whether the
    answer has a line for it.
    """

    text: str
    answer: str
    keeps_case: bool
    is_own: bool = True
    is_answered: bool = True


@dataclass(frozen=True, kw_only=True)
class Style:
    """How requests are put into one message.

    format: one of `FORMATS`. mark: of a number in a numbered list. line_break: between lines.
    after_stop, after_word: what joins two requests in one sentence, after a full stop and after a
    word. lowers: whether a joined request begins in lower case. intro: a line before the first
    request. asks_numbers: a wish for numbered answers, after the last one.
    Raises ValueError for an unknown format.
    """

    format: str
    mark: str = "{}. "
    line_break: str = "\n"
    after_stop: str = " Then "
    after_word: str = ", and then "
    lowers: bool = True
    intro: str = ""
    asks_numbers: str = ""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(
                f"style: the format is {self.format!r}; one of {', '.join(FORMATS)} was needed; "
                "choose one"
            )


def pieces(requests: Sequence[Request], style: Style) -> list[Piece]:
    """The user turn, piece by piece.

    Marks and connecting words belong to the request that they introduce; an intro belongs to the
    first one, a wish at the end to the last one.
    """
    out = [(style.intro + "\n", 0)] if style.intro else []
    for i, request in enumerate(requests):
        before, text = "", request.text
        if style.format == "sentence" and i > 0:
            stops = out[-1][0][-1] in ".?!"
            before = style.after_stop if stops else style.after_word
            if style.lowers and not request.keeps_case and text[1:2].islower():
                text = text[0].lower() + text[1:]
        elif i > 0:
            before = style.line_break
        if style.format == "numbered":
            before += style.mark.format(i + 1)
        elif style.format == "bulleted":
            before += "- "
        elif style.format == "then" and i > 0:
            before += "Then: "
        out.append((before + text, i))
    if style.asks_numbers:
        out.append((style.line_break + style.asks_numbers, len(requests) - 1))
    return out


def owned_tokens(
    tokenizer: PreTrainedTokenizerBase, parts: Sequence[Piece], *, add_special_tokens: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids of the joined pieces, and the owner of each token.

    A token that spans two pieces belongs to the one in which it begins. The ids are those of the
    whole text. So many tokens as the text up to a piece's end has are taken as that piece's and
    those before it: this asks the tokenizer for no offsets.
    """
    prefixes, text = [], ""
    for part, _ in parts:
        text += part
        prefixes.append(text)
    encoded = tokenizer(prefixes, add_special_tokens=add_special_tokens)["input_ids"]
    ids = list(encoded[-1])
    owners: list[int] = []
    for (_, owner), prefix_ids in zip(parts, encoded, strict=True):
        owners += [owner] * (min(len(prefix_ids), len(ids)) - len(owners))
    return ids, owners


class PromptEncoder:
    """Encodes user turns as the base reads them (see `base.prompts.encode`), with owners.

    Raises ValueError if the chat template does not hold what the user says exactly once.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.has_template = tokenizer.chat_template is not None
        around = ["", ""]
        if self.has_template:
            turn = [{"role": "user", "content": _MARKER}]
            whole = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            around = str(whole).split(_MARKER)
        if len(around) != 2:
            raise ValueError(
                f"base: its chat template holds what the user says {len(around) - 1} times; once "
                "was needed; give it another chat template"
            )
        self.before, self.after = around

    def __call__(self, parts: Sequence[Piece]) -> tuple[list[int], list[int]]:
        """Token ids of a prompt, ready for an answer, and the owner of each.

        An owner is the number of a request, OPENING for the template before what is asked, or
        CLOSING for the template after it. A base without a chat template has no closing: there the
        last token, from which the answer begins, counts as that.
        """
        ids, owners = owned_tokens(
            self.tokenizer,
            [(self.before, OPENING), *parts, (self.after, CLOSING)],
            add_special_tokens=not self.has_template,
        )
        return ids, owners if owners[-1] == CLOSING else [*owners[:-1], CLOSING]
