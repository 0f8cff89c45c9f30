"""Generic prompts: written by any base, kept, and shipped for the embedded default."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from spectr_demo.base import generic
from spectr_demo.base.embedded import SMOLLM2_135M
from spectr_demo.base.generic import (
    NUM_PROMPTS,
    NUM_TOKENS,
    Draw,
    generic_prompts,
    is_ordinary,
    write_prompts,
)
from spectr_demo.base.loading import LoadedBase
from spectr_demo.base.prompts import encode, template_opening
from spectr_demo.config import ASSETS
from tests.conftest import loaded_base, tiny_llama

WORDS = ("grey", "blue", "soft", "tall", "late", "warm", "kind", "open")


@pytest.fixture
def base(tokenizer: PreTrainedTokenizerFast) -> LoadedBase:
    """The tiny base, of which nothing is shipped."""
    tokenizer = deepcopy(tokenizer)
    return loaded_base(tiny_llama(len(tokenizer)), tokenizer, "new")


Speak = Callable[..., list[torch.Tensor]]


@pytest.fixture
def speak(base: LoadedBase, monkeypatch: pytest.MonkeyPatch) -> Speak:
    """A function that has the base say these texts, one in each row by turns, with an end token.

    It returns a list that the rows given to the base are added to.
    """

    def say(*texts: str, has_end: bool = True) -> list[torch.Tensor]:
        starts: list[torch.Tensor] = []
        end = [base.tokenizer.eos_token_id] if has_end else []
        written = [[*base.tokenizer(text)["input_ids"], *end] for text in texts]
        width = max(map(len, written))

        def generate(start: torch.Tensor, **options: Any) -> torch.Tensor:
            first = len(starts) * len(start)
            starts.append(start)
            rows = [written[(first + row) % len(written)] for row in range(len(start))]
            rows = [row + [base.tokenizer.pad_token_id] * (width - len(row)) for row in rows]
            return torch.cat([start, torch.tensor(rows)], dim=1)

        monkeypatch.setattr(base.model, "generate", generate)
        return starts

    return say


def no_generate(base: LoadedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.model, "generate", lambda *_, **__: pytest.fail("written again"))


def sentences() -> list[str]:
    """As many as there are to be prompts, and all different."""
    return [
        f"{a} {b} {c} houses stand by the lake. Tell me of {a} {b} {c}?"
        for a in WORDS
        for b in WORDS
        for c in WORDS
    ]


def test_any_base_has_prompts(base: LoadedBase) -> None:
    prompts = generic_prompts(base)
    assert len(prompts) == len(set(prompts)) == NUM_PROMPTS
    assert all(encode(base.tokenizer, prompt) for prompt in prompts)


def test_they_are_the_same_each_time_and_draw_from_no_other_generator(base: LoadedBase) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    prompts = write_prompts(base)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert write_prompts(base) == prompts


def test_what_the_bases_authors_set_changes_nothing(base: LoadedBase) -> None:
    prompts = write_prompts(base)
    base.model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        repetition_penalty=5.0,
        no_repeat_ngram_size=2,
        min_new_tokens=9,
        use_cache=False,
    )
    assert write_prompts(base) == prompts


@pytest.mark.parametrize("begin", ["bos_token", "eos_token", None])
def test_a_base_without_a_chat_template(base: LoadedBase, speak: Speak, begin: str | None) -> None:
    """It begins a text: after the token for that, or after the end of another, or with a word."""
    tokenizer = base.tokenizer
    tokenizer.chat_template = None
    ids = {"bos_token": tokenizer.bos_token_id, "eos_token": tokenizer.eos_token_id}
    if begin != "bos_token":
        tokenizer.bos_token = None
    if begin is None:
        tokenizer.eos_token = None
    assert len(write_prompts(base)) == NUM_PROMPTS
    starts = speak(*sentences(), has_end=begin is not None)
    prompts = write_prompts(base)
    if begin is not None:
        assert {tuple(row) for row in starts[0].tolist()} == {(ids[begin],)}
        assert prompts[0] == sentences()[0]
    else:
        words = [str(tokenizer.decode(row)) for row in starts[0]]
        assert all(word.isalpha() for word in words) and len(set(words)) > 20
        assert prompts[0][0] == words[0], "it is part of the text"


def test_they_follow_the_templates_opening(base: LoadedBase, speak: Speak) -> None:
    starts = speak(*sentences())
    write_prompts(base)
    assert all(row == template_opening(base.tokenizer) for row in starts[0].tolist())


def test_half_of_them_are_cut_short(base: LoadedBase, speak: Speak) -> None:
    speak(*sentences())
    prompts, written = write_prompts(base), sentences()[:NUM_PROMPTS]
    assert prompts[0::2] == written[0::2]
    assert prompts[1::4] == [f"Tell me of {' '.join(t.split()[:3])}?" for t in written[1::4]]
    nums = [2, 3, 4, 5] * (NUM_PROMPTS // 16)
    words = [" ".join(t.split()[:n]) for t, n in zip(written[3::4], nums, strict=True)]
    assert prompts[3::4] == words


def test_what_is_there_already_is_not_cut(base: LoadedBase, speak: Speak) -> None:
    speak(*(f"Tell me of {text}" for text in sentences()))
    prompts = write_prompts(base)
    assert len(prompts) == NUM_PROMPTS
    assert prompts[3] == "Tell me" and prompts[19] == f"Tell me of {sentences()[19]}"


def test_a_script_without_spaces_is_cut_by_characters(base: LoadedBase, speak: Speak) -> None:
    speak(*(f"我想知道{chr(ord('一') + i)}今天天气怎么样呢你能告诉我吗" for i in range(300)))
    prompts = write_prompts(base)
    assert len(prompts) == NUM_PROMPTS
    assert {len(text) for text in prompts[0::2]} == {19}
    assert {len(text) for text in prompts[3::4]} <= {6, 9, 12, 15}


def test_a_turn_without_an_end_has_whole_words(base: LoadedBase, speak: Speak) -> None:
    speak(
        *(
            f"A {a} {b} day. We went {c} and then we saw the bri"
            for a in WORDS
            for b in WORDS
            for c in WORDS
        ),
        has_end=False,
    )
    assert write_prompts(base)[0] == "A grey grey day."
    speak(
        *(
            f"Some {a} {b} people went {c} and then saw the bri"
            for a in WORDS
            for b in WORDS
            for c in WORDS
        ),
        has_end=False,
    )
    assert write_prompts(base)[0] == "Some grey grey people went grey and then saw the"


def test_only_the_first_line_counts(base: LoadedBase, speak: Speak) -> None:
    speak(*(f"\n- {text}\nassistant\nNo." for text in sentences()))
    assert write_prompts(base)[0] == sentences()[0]


def test_a_base_that_says_one_thing(base: LoadedBase, speak: Speak) -> None:
    speak("What is the time?")
    assert write_prompts(base) == ["What is the time?", "What is"]


@pytest.mark.parametrize("text", ["", "\n \n", "�"])
def test_a_base_that_says_nothing_has_words_of_its_vocabulary(
    base: LoadedBase, speak: Speak, text: str
) -> None:
    speak(text)
    prompts = write_prompts(base)
    assert len(prompts) > 20 and all(map(str.isalpha, prompts))


def test_rubbish_is_better_than_nothing(base: LoadedBase, speak: Speak) -> None:
    speak("{[(1)]}", "x = {1: 2}", "What is the time?")
    best = ["What is the time?", "What is"]
    assert write_prompts(base) == [*best, "x = {1: 2}", "(1)]}"]


def test_they_fit_a_small_context(base: LoadedBase) -> None:
    base.model.config.max_position_embeddings = 48
    room = 48 - len(encode(base.tokenizer, "A")) + 1
    assert 0 < room < NUM_TOKENS
    prompts = write_prompts(base)
    assert len(prompts) == NUM_PROMPTS
    assert max(len(encode(base.tokenizer, text)) for text in prompts) <= 48


def test_they_are_written_once(base: LoadedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = generic_prompts(base)
    no_generate(base, monkeypatch)
    assert generic_prompts(base) == prompts


def test_another_base_writes_its_own(base: LoadedBase, speak: Speak) -> None:
    first = generic_prompts(base)
    speak(*sentences())
    assert generic_prompts(base) == first
    for other in (replace(base, fingerprint="other"), replace(base, name="other")):
        assert generic_prompts(other)[0] in sentences()
    assert generic_prompts(base) == first


def test_half_a_file_is_written_again(base: LoadedBase, cache_folder: Path) -> None:
    prompts = generic_prompts(base)
    (file,) = (cache_folder / "generic").iterdir()
    file.write_text(file.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    assert generic_prompts(base) == prompts


def test_a_cache_that_cannot_be_written_to(
    base: LoadedBase, cache_folder: Path, speak: Speak
) -> None:
    speak(*sentences())
    cache_folder.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="SPECTR_CACHE"):
        assert len(generic_prompts(base)) == NUM_PROMPTS


@pytest.mark.parametrize(
    "text",
    [
        "Hello",
        "你好",
        "Как дела?",
        "मौसम कैसा है?",
        "كيف حالك اليوم؟",
        "สวัสดีครับ วันนี้เป็นอย่างไร",
        "Who wrote Hamlet, and when?",
    ],
)
def test_ordinary_in_any_script(text: str) -> None:
    assert is_ordinary(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "🎉🎉🎉🎉",
        "x = {1: 2}",
        "ha ha ha ha ha ha",
        "no\x07w",
        "cut of\ufffd",
        "哈哈哈哈哈哈",
    ],
)
def test_not_ordinary(text: str) -> None:
    assert not is_ordinary(text)


def test_tokens_are_drawn_from_the_nucleus_the_first_one_more_evenly() -> None:
    p = torch.tensor([0.80, 0.16, 0.03, 0.01])  # before the third token 0.96 are reached
    scores, num = p.log().repeat(20000, 1), 20000

    def shares(num_start: int) -> torch.Tensor:
        draw = Draw(torch.Generator().manual_seed(0), num_start)
        drawn = draw(torch.zeros(num, 3, dtype=torch.long), scores)
        assert (drawn > -torch.inf).sum(-1).eq(1).all()
        return drawn.argmax(-1).bincount(minlength=4) / num

    later, first = shares(num_start=1), shares(num_start=3)
    expected = p[:2] / p[:2].sum(), p[:2].sqrt() / p[:2].sqrt().sum()
    torch.testing.assert_close(later, torch.tensor([*expected[0], 0, 0]), atol=0.015, rtol=0)
    torch.testing.assert_close(first, torch.tensor([*expected[1], 0, 0]), atol=0.015, rtol=0)


def test_the_embedded_defaults_are_shipped(
    base: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generic, "GENERIC_TEXT", ASSETS / "generic_text.json")
    no_generate(base, monkeypatch)
    fingerprint = f"gguf-sha256:{SMOLLM2_135M.member_sha256}"
    prompts = generic_prompts(replace(base, fingerprint=fingerprint))
    assert len(prompts) == len(set(prompts)) >= 256
    assert sum(len(prompt.split()) <= 5 for prompt in prompts) >= 60
    assert sum(len(prompt.split()) >= 12 for prompt in prompts) >= 60
    assert max(prompts.count(prompt) for prompt in prompts) == 1
    content = json.loads((ASSETS / "generic_text.json").read_text(encoding="utf-8"))
    assert content.keys() == {"about", "bases"}
