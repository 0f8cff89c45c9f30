"""A base's chat template: made fit for plain text, and checked before anything is asked.

A template is a program that came with the base. It may refuse some messages, or leave them out.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, cached_file

# What a template is asked to show. Letters and digits alone, so that none has to be escaped.
_MARKER = "Marker{}Text"
# Put before a template that expects the content of a message as a list of parts, as bases do that
# also see or hear: it makes one part of a text.
_IN_PARTS = (
    "{%- set spread = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set parts = [{'type': 'text', 'text': message['content']}] -%}"
    "{%- set spread.messages = spread.messages + [dict(message, content=parts)] -%}"
    "{%- endfor -%}"
    "{%- set messages = spread.messages -%}"
)


def read_processor_template(where: str | Path) -> str | None:
    """The chat template that a base which also sees or hears has beside its tokenizer, if any.

    where: the base's folder or Hub id.
    """
    try:
        file = cached_file(str(where), LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE)
        return str(json.loads(Path(str(file)).read_bytes())["chat_template"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A tokenizer's chat template as its file has it, the default one of several."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return None if template is None else template.removeprefix(_IN_PARTS).strip()


def settle_template_(tokenizer: PreTrainedTokenizerBase, owner: str) -> None:
    """Have a tokenizer's chat template take messages whose content is text.

    owner: whose template it is, for messages. Raises ValueError for a template that fails on what a
    user says, or leaves it out.
    """
    if tokenizer.chat_template is None:
        return
    remedy = "Correct the template, or remove it: plain text is read then."
    try:
        template = tokenizer.get_chat_template()  # the default one of several
    except ValueError as error:
        raise ValueError(f"{owner}: it has no default chat template ({error}). {remedy}") from None
    user, reasons = [{"role": "user", "content": "?"}], []
    for beginning in ("", _IN_PARTS):
        tokenizer.chat_template = beginning + template
        try:
            check_shown(tokenizer, user)
        except ValueError as error:
            reasons.append(str(error))
        else:
            return
    raise ValueError(f"{owner}: {reasons[0]}. {remedy}")


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], **options: Any
) -> Any:
    """What the chat template makes of messages, ready for an answer.

    options: of `apply_chat_template`. Raises ValueError where the template refuses the messages.
    """
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, **options
        )
    except Exception as error:  # other people's programs fail in many ways
        reason = " ".join(str(error).split()) or type(error).__name__
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"the chat template refuses messages of these roles: {roles} ({reason})"
        ) from error


def check_shown(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> None:
    """Raise ValueError where the chat template leaves out one of these messages."""
    markers = [_MARKER.format(i) for i in range(len(messages))]
    marked = [{**m, "content": marker} for m, marker in zip(messages, markers, strict=True)]
    text = apply_template(tokenizer, marked, tokenize=False).lower()  # as a template may do, too
    left_out = [i for i, marker in enumerate(markers) if marker.lower() not in text]
    if left_out:
        which = ", ".join(f"{i + 1} ({messages[i]['role']})" for i in left_out)
        raise ValueError(
            f"the chat template leaves out what message {which} of {len(messages)} says"
        )
