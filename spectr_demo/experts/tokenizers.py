"""The tokenizers that experts bring: a chat template for a base that has none, and what differs.

An adapter's folder often has the tokenizer that it was trained with. Prompts are made with the
base's own. Where the expert's would make other ones, that is said.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spectr_demo.base.checkpoint import digest
from spectr_demo.base.loading import LoadedBase
from spectr_demo.base.templates import settle_template_, template_of
from spectr_demo.experts.adapters import Adapter, local_folder
from spectr_demo.experts.messages import shown

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("added_tokens.json", "special_tokens_map.json", "chat_template.jinja"),
)
_MOST_NAMED = 4
MOST_BYTES = 200_000_000  # of a tokenizer's files; the largest ones today have 33 MB
_MOST_SAID = 1000  # characters of a notice


@dataclass(frozen=True, kw_only=True)
class _Brought:
    """A tokenizer, or why its files cannot be read, and the experts that bring it."""

    names: list[str]
    tokenizer: PreTrainedTokenizerBase | None
    reason: str = ""


def with_template_of(base: LoadedBase, adapters: Sequence[Adapter]) -> LoadedBase:
    """The base, with the chat template of its experts where it has none and theirs agree.

    An expert without a tokenizer agrees with any. The base's notices say what was taken, and which
    tokenizers differ from the base's. Raises ValueError for a template that cannot be used.
    """
    brought = _brought(adapters)
    template, notices = _template(base, brought)
    tokenizer = base.tokenizer
    if template is not None:
        tokenizer = deepcopy(tokenizer)
        tokenizer.chat_template = template
        settle_template_(tokenizer, notices[0])
    notices += [line for each in brought for line in _differences(each, base)]
    notices = [shown(notice, _MOST_SAID) for notice in notices]
    for notice in notices:
        logger.warning(notice)
    return replace(base, tokenizer=tokenizer, notices=(*base.notices, *notices))


def _brought(adapters: Sequence[Adapter]) -> list[_Brought]:
    """Each tokenizer once; experts of one training have the same files."""
    folders: dict[tuple[tuple[str, str], ...], list[tuple[str, Path]]] = defaultdict(list)
    for adapter in adapters:
        folder = tokenizer_folder(adapter.source)
        files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
        if files:
            key = tuple((file.name, digest(file)) for file in files)
            folders[key].append((adapter.name, folder))
    found = []
    for some in folders.values():
        names, (_, folder) = [name for name, _ in some], some[0]
        size = sum(
            (folder / file).stat().st_size for file in TOKENIZER_FILES if (folder / file).is_file()
        )
        if size > MOST_BYTES:
            reason = f"they have {size} bytes, at most {MOST_BYTES} are read"
            found.append(_Brought(names=names, tokenizer=None, reason=reason))
            continue
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            found.append(_Brought(names=names, tokenizer=tokenizer))
        except Exception as error:  # other people's files fail in many ways
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            found.append(_Brought(names=names, tokenizer=None, reason=reason))
    return found


def tokenizer_folder(source: str) -> Path:
    """Where an adapter's tokenizer is. From the Hub it is fetched, as far as the Hub has one."""
    folder = local_folder(source)
    if folder is not None:
        return folder
    owner, repo, *inside = source.split("/")
    within = "/".join(inside)
    wanted = [f"{within}/{name}" if within else name for name in TOKENIZER_FILES]
    try:
        return Path(snapshot_download(f"{owner}/{repo}", allow_patterns=wanted)) / within
    except (OSError, ValueError):  # its weights were there, in the Hub's cache
        return Path(source)


def _template(base: LoadedBase, brought: Sequence[_Brought]) -> tuple[str | None, list[str]]:
    """The chat template that a base without one takes, and what is to be said about it."""
    of_template: dict[str | None, list[str]] = defaultdict(list)
    for each in brought:
        if each.tokenizer is not None:
            of_template[template_of(each.tokenizer)] += each.names
    if base.tokenizer.chat_template is not None or not set(of_template) - {None}:
        return None, []
    has_none = f"base {base.source!r} has no chat template"
    if len(of_template) == 1:
        [(template, names)] = of_template.items()
        return template, [f"{has_none}; that of {_experts(names)} is used"]
    groups = "; ".join(
        f"{'none' if template is None else 'one'} in {_experts(names)}"
        for template, names in of_template.items()
    )
    return None, [
        f"{has_none}, and those of its experts differ ({groups}): plain text is read. Put the "
        "right chat_template.jinja into the base's folder"
    ]


def _differences(each: _Brought, base: LoadedBase) -> list[str]:
    """What makes prompts or answers of a tokenizer others than the base's, a line each."""
    who, ours, theirs = _experts(each.names), base.tokenizer, each.tokenizer
    if theirs is None:
        return [f"{who}: the tokenizer files cannot be read ({each.reason}); the base's are used"]
    lines = []
    if ours.chat_template is not None and template_of(theirs) not in (None, template_of(ours)):
        lines.append(f"{who}: the chat template is not the base's, which is used")
    vocabulary = ours.get_vocab()
    tokens = sorted(theirs.get_vocab().items(), key=itemgetter(1))
    if other := [token for token, number in tokens if vocabulary.get(token) != number]:
        lines.append(
            f"{who}: the tokenizer's {_some(other)} are not in the base's, or have other numbers "
            "there; the base's is used"
        )
    ends = base.model.generation_config.eos_token_id
    known = {ours.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    if theirs.eos_token_id not in known | {None}:
        lines.append(
            f"{who}: the tokenizer's end token is {theirs.eos_token!r}, at which the base does not "
            "stop"
        )
    return lines


def _experts(names: Sequence[str]) -> str:
    return f"{'expert' if len(names) == 1 else 'experts'} {_some(names)}"


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(map(repr, names[:_MOST_NAMED])) + (f" and {more} more" if more > 0 else "")
