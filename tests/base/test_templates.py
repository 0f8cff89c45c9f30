"""Chat templates of other people: content in parts, roles that are refused, text that is lost."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from spectr_demo.base.loading import load_base
from spectr_demo.base.prompts import Message, Template, encode
from spectr_demo.base.templates import settle_template_, template_of
from spectr_demo.engine.model import load
from tests.conftest import CHAT_TEMPLATE

TURN = "<|im_start|>{{ m['role'] }}\n%s<|im_end|>\n"
END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# Of bases that also see: what is no text is left out, and a text is no list of parts.
IN_PARTS = (
    "{% for m in messages %}"
    + TURN % "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    + "{% endfor %}"
    + END
)
PARTS_BY_INDEX = (
    "{% for m in messages %}" + TURN % "{{ m.content[0]['text'] }}" + "{% endfor %}" + END
)
ONE_MESSAGE = (
    "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}"
    + CHAT_TEMPLATE
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + CHAT_TEMPLATE
)
SILENT_ON_SYSTEM = CHAT_TEMPLATE.replace("in messages", "in messages if m.role != 'system'")
FIRST_ONLY = CHAT_TEMPLATE.replace("in messages", "in messages[:1]")
WITHOUT_TEXT = CHAT_TEMPLATE.replace("{{ m['content'] }}", "")
FAILING = "{{ raise_exception('never') }}" + CHAT_TEMPLATE
BROKEN = CHAT_TEMPLATE + "{% if %}"

CONVERSATION: list[Message] = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "You."},
    {"role": "user", "content": "Why?"},
]
WITH_SYSTEM: list[Message] = [{"role": "system", "content": "Be brief."}, *CONVERSATION[:1]]


@pytest.fixture
def ours(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return copy.deepcopy(tokenizer)


@pytest.mark.parametrize("template", [IN_PARTS, PARTS_BY_INDEX])
@pytest.mark.parametrize("prompt", ["Who?", CONVERSATION, WITH_SYSTEM])
def test_a_text_is_made_a_part_where_the_template_expects_parts(
    ours: PreTrainedTokenizerFast,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    prompt: str | list[Message],
) -> None:
    ours.chat_template = template
    settle_template_(ours, "base")
    assert encode(ours, prompt) == encode(tokenizer, prompt)
    assert Template.of(ours) == Template.of(tokenizer)
    assert template_of(ours) == template.strip()
    settle_template_(ours, "base")  # a second time it stays as it is
    assert encode(ours, prompt) == encode(tokenizer, prompt)


def test_a_template_that_takes_text_stays_as_it_is(ours: PreTrainedTokenizerFast) -> None:
    both = IN_PARTS.replace(
        "{% for part", "{% if m.content is string %}{{ m.content }}{% else %}{% for part"
    ).replace("{% endfor %}<|im_end|>", "{% endfor %}{% endif %}<|im_end|>")
    lower = CHAT_TEMPLATE.replace("m['content']", "m['content'] | trim | lower")
    for template in (CHAT_TEMPLATE, both, lower):
        ours.chat_template = template
        settle_template_(ours, "base")
        assert ours.chat_template == template


def test_of_several_templates_the_default_one_is_taken(
    ours: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast
) -> None:
    ours.chat_template = {"default": IN_PARTS, "tool_use": FAILING}
    settle_template_(ours, "base")
    assert encode(ours, CONVERSATION) == encode(tokenizer, CONVERSATION)
    ours.chat_template = {"rag": CHAT_TEMPLATE, "tool_use": CHAT_TEMPLATE}
    with pytest.raises(ValueError, match="base: it has no default chat template"):
        settle_template_(ours, "base")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (WITHOUT_TEXT, r"leaves out what message 1 \(user\) of 1 says"),
        (FAILING, r"refuses messages of these roles: user \(never\)"),
        (BROKEN, r"refuses messages of these roles: user \(Expected an expression"),
    ],
)
def test_a_template_that_loses_what_is_asked_is_an_error_at_load(
    folder: Path, template: str, reason: str
) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=reason) as caught:
        load_base(str(folder), device="cpu")
    assert str(caught.value).startswith(f"base {str(folder)!r}: the chat template ")
    assert "remove it: plain text is read then" in str(caught.value)


@pytest.mark.parametrize(
    ("template", "refused", "reason"),
    [
        (ONE_MESSAGE, CONVERSATION, r"roles: user, assistant, user \(one message only\)"),
        (NO_SYSTEM, WITH_SYSTEM, r"roles: system, user \(no system role\)"),
        (SILENT_ON_SYSTEM, WITH_SYSTEM, r"leaves out what message 1 \(system\) of 2 says"),
        (FIRST_ONLY, CONVERSATION, r"message 2 \(assistant\), 3 \(user\) of 3 says"),
    ],
)
def test_a_template_that_refuses_some_messages_serves_the_others(
    folder: Path,
    expert_folders: list[str],
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    refused: list[Message],
    reason: str,
) -> None:
    (folder / "chat_template.jinja").write_text(template)
    model = load(str(folder), expert_folders)
    assert model.encode("Who?") == encode(tokenizer, "Who?")
    ids = model.encode("Who?")
    assert tokenizer.decode(ids[slice(*model.template.request(ids))]) == "Who?"
    with pytest.raises(ValueError, match=reason):
        model.stream(refused, ["base"])
    takes_turns = template in (NO_SYSTEM, SILENT_ON_SYSTEM)
    assert bool(model.template.user_turn) == takes_turns


def test_the_request_reaches_a_base_that_expects_parts(
    folder: Path, expert_folders: list[str]
) -> None:
    """From its file, through a run and the trace, as with the usual template."""

    def observed() -> list[Any]:
        step = load(str(folder), expert_folders).compare("Who?", ["spectr"], max_new_tokens=4)
        assert step.trace is not None
        return [step.columns[0].text, step.trace.columns[0].token_ids.tolist()]

    expected = observed()
    (folder / "chat_template.jinja").unlink()
    plain = observed()
    assert plain != expected
    # Where older bases have it: with the tokenizer, or with the processor of pictures.
    in_parts = {"chat_template": IN_PARTS}
    file = folder / "tokenizer_config.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | in_parts))
    assert observed() == expected
    file.write_text(before)
    (folder / "chat_template.json").write_text(json.dumps(in_parts))
    assert observed() == expected
