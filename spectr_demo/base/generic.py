"""Ordinary prompts that a base writes itself: `generic_prompts`.

After the opening of a user's turn, a chat model goes on with what users ask (Magpie, Xu et al.
2024, arXiv 2406.08464). So these prompts fit any base and language, and need no data. They are
written once for each base and kept in the cache. Those of the embedded default are shipped.
"""

import json
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

from spectr_demo.base.files import keep_json, kept_json, named_for
from spectr_demo.base.loading import LoadedBase
from spectr_demo.base.prompts import template_closing, template_opening
from spectr_demo.config import ASSETS, cache_dir

GENERIC_TEXT = ASSETS / "generic_text.json"
NUM_PROMPTS = 256
NUM_TOKENS = 40  # of a turn, at most
_ROWS, _MOST_BATCHES = 64, 8
_TOP_P, _TOP_K = 0.95, 512  # to sort all tokens of a vocabulary takes ten times as long
_SEED = 0
_EDITION = 1  # of this recipe; a new one writes every base's prompts anew

_MARKS = ".?!。？！؟।"
_SENTENCE = re.compile(rf"[^{_MARKS}]+[{_MARKS}]+")
_SENTENCES = re.compile(rf".*[{_MARKS}]")
_BEFORE_WORDS = re.compile(r"^[^\w\"'(¿¡]+")
_REPEATED = re.compile(r"(.+?)\1{4}")  # anything, five times in a row


def generic_prompts(base: LoadedBase) -> list[str]:
    """Ordinary prompts in the base's own words, long and short, none of them twice.

    There are 256 of them, or fewer if the base has little to say; one at least. They are the
    shipped ones, those in the cache, or written now, which takes a minute on a CPU.
    """
    shipped = json.loads(GENERIC_TEXT.read_bytes())["bases"].get(base.fingerprint)
    if shipped:
        return list(shipped)
    # The name too: a base from the Hub may have no commit that is known. And the chat template,
    # which a base may have from its experts.
    template = base.tokenizer.chat_template
    facts = [base.fingerprint, base.name, _EDITION, template]
    file = named_for(facts, cache_dir() / "generic", ".json")
    kept = kept_json(file)
    if kept:
        return list(kept)
    prompts = write_prompts(base)
    _keep(prompts, file)
    return prompts


def _keep(prompts: Sequence[str], file: Path) -> None:
    try:
        keep_json(list(prompts), file)
    except OSError as error:
        warnings.warn(
            f"generic prompts: they could not be cached in {file.parent} ({error}); the base "
            "writes them again at each start. Set SPECTR_CACHE to a writable folder",
            stacklevel=3,
        )


def write_prompts(base: LoadedBase) -> list[str]:
    """What the base writes now, the same each time on one machine; see `generic_prompts`."""
    prompts: dict[str, None] = {}
    others: list[str] = []
    with tqdm(
        total=NUM_PROMPTS, unit="prompt", desc=f"{base.name} writes prompts", file=sys.stderr
    ) as bar:
        for text in _turns(base):
            if is_ordinary(text):
                cut = _cut(len(prompts), text)
                prompts.setdefault(text if cut in prompts else cut)
                bar.update(len(prompts) - bar.n)
            else:
                others.append(_clean(text).strip())
            if len(prompts) == NUM_PROMPTS:
                return list(prompts)
    # The base writes rubbish, or little else: then that is what it knows, the best of it first.
    others = sorted(filter(None, others), key=_letters, reverse=True)
    if not prompts and not others:
        others = [_text(base, [i]) for i in _words(base, _generator())]
    return list(dict.fromkeys([*prompts, *others]))[:NUM_PROMPTS]


def is_ordinary(text: str) -> bool:
    """Whether a text is mostly letters, of any script, and no part is repeated over and over."""
    is_clean = text == _clean(text)
    return is_clean and len(text) >= 2 and _letters(text) > 0.8 and not _REPEATED.search(text)


def _clean(text: str) -> str:
    """Without control characters, parts of characters, and what is no character at all."""
    bad = {"Cc", "Cn", "Co", "Cs"}
    return "".join(c for c in text if c != "\ufffd" and unicodedata.category(c) not in bad)


def _letters(text: str) -> float:
    """The share of letters, of the marks on them, and of spaces."""
    return sum(unicodedata.category(c)[0] in "LMZ" for c in text) / max(1, len(text))


def _cut(number: int, text: str) -> str:
    """Every other text is cut short: to its last short sentence, or to two to five words."""
    if number % 2 == 0:
        return text
    sentences = [s.strip() for s in _SENTENCE.findall(text) if len(s) <= 60]
    if number % 4 == 1 and sentences and sentences[-1] != text:
        return sentences[-1]
    num, words = 2 + number // 4 % 4, text.split()
    if len(text) > 15 * len(words):  # a script without spaces
        return text[: 3 * num]
    return " ".join(words[:num])


def user_turns(base: LoadedBase, num: int, num_tokens: int = NUM_TOKENS) -> list[str]:
    """The first lines of what is written in a user's place, in one batch of `num` rows; some may be
    empty. Where experts are on (`engine.layers.routed`), they write it. num_tokens: of each, at
    most."""
    return list(_batch(base, num, num_tokens, _generator(base.device), _generator()))


def _turns(base: LoadedBase) -> Iterator[str]:
    noise, words = _generator(base.device), _generator()
    for _ in range(_MOST_BATCHES):
        yield from _batch(base, _ROWS, NUM_TOKENS, noise, words)


def _batch(
    base: LoadedBase,
    num_rows: int,
    num_tokens: int,
    noise: torch.Generator,
    words: torch.Generator,
) -> Iterator[str]:
    tokenizer = base.tokenizer
    closing = template_closing(tokenizer)
    ends = {*closing[:1], tokenizer.eos_token_id} - {None}
    start, num_given = _start(base, words, num_rows)
    room = base.context - start.shape[1] - len(closing)
    written = _generate(base, start, min(num_tokens, max(1, room)), ends, noise)
    for ids in written[:, num_given:].tolist():
        end = next((i for i, token in enumerate(ids) if token in ends), None)
        yield _tidy(_text(base, ids[:end]), is_whole=end is not None)


def _start(base: LoadedBase, words: torch.Generator, num_rows: int) -> tuple[Tensor, int]:
    """What the rows of a batch begin with, (R, T), and how many of these tokens are not the user's.

    That is the template's opening. Without one it is the token that begins a text, or that ends
    the text before. Without these it is a word of the vocabulary, another one in each row.
    """
    tokenizer = base.tokenizer
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    opening = template_opening(tokenizer) or ([] if begin is None else [begin])
    if not opening:
        return torch.tensor([[i] for i in _words(base, words, num_rows)]), 0
    opening = opening[: base.context - 1]
    return torch.tensor([opening] * num_rows), len(opening)


def _text(base: LoadedBase, ids: list[int]) -> str:
    return str(base.tokenizer.decode(ids, skip_special_tokens=True))


def _words(base: LoadedBase, generator: torch.Generator, num: int = _ROWS) -> list[int]:
    """So many words of the vocabulary, any tokens if it has no words."""
    ids = torch.randperm(len(base.tokenizer), generator=generator).tolist()
    words = (i for i in ids if _text(base, [i]).strip().isalpha())
    found = list(islice(words, num)) or ids
    return list(islice(cycle(found), num))


def _generator(device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(_SEED)


@torch.inference_mode()
def _generate(
    base: LoadedBase, start: Tensor, num_tokens: int, ends: set[int], noise: torch.Generator
) -> Tensor:
    """Rows of token ids, `start` included. Nothing that the base's authors set changes them."""
    model: Any = base.model
    start = start.to(base.device)
    config = GenerationConfig(
        max_new_tokens=num_tokens,
        min_new_tokens=min(2, num_tokens),
        do_sample=False,  # sampling is the processor's, with a generator of its own
        num_beams=1,
        use_cache=True,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=sorted(ends) or None,
        pad_token_id=base.tokenizer.pad_token_id or 0,
    )
    rows: Tensor = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        generation_config=config,
        logits_processor=LogitsProcessorList([Draw(noise, start.shape[1])]),
    )
    return rows


class Draw(LogitsProcessor):
    """Draws each row's token from the likeliest ones, and leaves it as the only one.

    The first token has temperature 2, the others 1: SmolLM2 begins two turns of three with "I".
    """

    def __init__(self, noise: torch.Generator, num_start: int) -> None:
        self.noise = noise
        self.num_start = num_start  # tokens in the rows before the first one is drawn

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        p, ids = scores.float().softmax(-1).topk(min(_TOP_K, scores.shape[-1]))
        p = p * (p.cumsum(-1) - p < _TOP_P)
        if input_ids.shape[1] == self.num_start:
            p = p.sqrt()
        drawn = ids.gather(-1, torch.multinomial(p, 1, generator=self.noise))
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0)


def _tidy(text: str, *, is_whole: bool) -> str:
    """The first line. Where the base had no room to end it, its whole sentences, or whole words."""
    lines = text.strip().splitlines()
    line = _BEFORE_WORDS.sub("", " ".join("".join(lines[:1]).split()))
    if is_whole or len(lines) > 1:
        return line
    sentences = _SENTENCES.match(line)
    return sentences.group() if sentences else line.rpartition(" ")[0] or line
