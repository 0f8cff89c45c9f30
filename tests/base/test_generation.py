"""A base's own generation settings: its end and pad tokens are taken, the rest changes nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectr_demo.base.loading import LoadedBase, load_base
from spectr_demo.config import GenerationSettings
from spectr_demo.engine import reading
from spectr_demo.engine.model import SpectrModel, load
from spectr_demo.evaluation.generation import generate_answers
from tests.conftest import IN_CONTEXT

SETTINGS: list[dict[str, Any]] = [
    {"use_cache": False},
    {"repetition_penalty": 5.0, "guidance_scale": 3.0, "no_repeat_ngram_size": 1},
    {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True},
    {"stop_strings": ["e"], "penalty_alpha": 0.6, "top_k": 4, "min_length": 90},
    {"max_new_tokens": -1, "cache_implementation": "none such", "watermarking_config": {"a": 1}},
    {"do_sample": True, "temperature": 9.0, "output_hidden_states": True, "max_length": 2},
]
# What training leaves behind in config.json.
SWITCHED_OFF: list[dict[str, Any]] = [
    {"use_cache": False, "gradient_checkpointing": True},
    {"return_dict": False},
    {"output_hidden_states": True, "output_attentions": True},
]


def change(file: Path, **values: object) -> None:
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | values))


def observed(model: SpectrModel) -> list[Any]:
    """All that a run tells: texts, log-probabilities, decisions."""
    columns = ["base", "spectr", IN_CONTEXT]
    with pytest.MonkeyPatch.context() as patch:  # to write many takes seconds
        patch.setattr(reading, "generic_prompts", lambda base: ["Who are you?", "Help me", "So"])
        step = model.compare("Tell me, please", columns, max_new_tokens=6)
    assert step.trace is not None
    answers = generate_answers(model.model, model.tokenizer, ["Hi", "Who is it?"], max_new_tokens=6)
    texts = [column.text for column in step.columns]
    arrays = [[c.logprob, c.kl, c.experts, c.weights] for c in step.trace.columns]
    return [answers, texts, *(array.tolist() for some in arrays for array in some)]


@pytest.fixture(scope="module")
def expected(base_folder: str, expert_folders: list[str]) -> list[Any]:
    return observed(load(base_folder, expert_folders))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings)))
def test_they_change_nothing_and_are_named(
    folder: Path,
    expert_folders: list[str],
    expected: list[Any],
    settings: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    change(folder / "generation_config.json", **settings)
    model = load(str(folder), expert_folders)
    np.testing.assert_equal(observed(model), expected)
    (notice,) = model.base.notices
    assert "in its generation_config.json only the end and pad tokens are used" in notice
    assert all(f"{name}=" in notice for name in settings)
    assert [record.message for record in caplog.records] == [notice]


@pytest.mark.parametrize("has_file", [True, False])
@pytest.mark.parametrize("settings", SWITCHED_OFF, ids=lambda settings: next(iter(settings)))
def test_what_the_config_switches_changes_nothing(
    folder: Path,
    expert_folders: list[str],
    expected: list[Any],
    settings: dict[str, Any],
    has_file: bool,
) -> None:
    change(folder / "config.json", **settings)
    if not has_file:
        (folder / "generation_config.json").unlink()
    np.testing.assert_equal(observed(load(str(folder), expert_folders)), expected)


def loaded(folder: Path) -> LoadedBase:
    return load_base(str(folder), device="cpu")


def test_older_bases_have_settings_in_their_config(
    folder: Path, expert_folders: list[str], expected: list[Any]
) -> None:
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", repetition_penalty=5.0, do_sample=True, num_beams=1)
    model = load(str(folder), expert_folders)
    np.testing.assert_equal(observed(model), expected)
    (notice,) = model.base.notices
    assert "in its config.json only" in notice
    assert notice.endswith("Not used: repetition_penalty=5.0, do_sample=True")


def test_nothing_is_said_of_settings_that_say_what_holds_anyway(folder: Path) -> None:
    change(
        folder / "generation_config.json",
        use_cache=True,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        bos_token_id=0,
        transformers_version="4.40.0",
        suppress_tokens=[],
    )
    assert loaded(folder).notices == ()


def test_a_long_setting_is_shortened(folder: Path) -> None:
    change(folder / "generation_config.json", suppress_tokens=list(range(1000)))
    assert len(loaded(folder).notices[0]) < 400


def test_end_and_pad_tokens_are_those_of_the_file_or_else_of_the_config(folder: Path) -> None:
    file = folder / "generation_config.json"
    change(file, eos_token_id=[5, 1], pad_token_id=7)
    change(folder / "config.json", eos_token_id=9, pad_token_id=8)
    settings = loaded(folder).model.generation_config
    assert (settings.eos_token_id, settings.pad_token_id) == ([5, 1], 7)
    file.unlink()
    settings = loaded(folder).model.generation_config
    assert (settings.eos_token_id, settings.pad_token_id) == (9, 8)


def test_an_answer_ends_at_each_end_token_of_the_file(
    folder: Path, expert_folders: list[str]
) -> None:
    prompt, settings = "Tell me, please", GenerationSettings(max_new_tokens=6)
    model = load(str(folder), expert_folders)
    whole = model.compare(prompt, ["base"], **settings.to_json()).trace.columns[0].token_ids
    num_prompt = len(model.encode(prompt))
    end = int(whole[num_prompt + 2])
    change(folder / "generation_config.json", eos_token_id=[1, end])
    cut = load(str(folder), expert_folders).compare(prompt, ["base"], **settings.to_json())
    first = whole.tolist().index(end, num_prompt)
    assert cut.trace.columns[0].token_ids.tolist() == whole[: first + 1].tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"its generation_config\.json is no JSON object"),
        ("[]", r"its generation_config\.json is no JSON object"),
        ('{"eos_token_id": "</s>"}', r"the eos_token_id of its generation_config\.json is '</s>'"),
        ('{"eos_token_id": [1, 2.5]}', r"the eos_token_id of its generation_config\.json is \[1,"),
        ('{"pad_token_id": [1]}', r"the pad_token_id of its generation_config\.json is \[1\]"),
    ],
)
def test_a_file_that_makes_no_sense(folder: Path, content: str, message: str) -> None:
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        loaded(folder)
    assert str(caught.value).startswith(f"base {str(folder)!r}: ")
