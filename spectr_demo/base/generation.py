"""What is taken of the generation settings that a base brings: its end and pad tokens, no more.

A run has settings of its own. transformers would fill in from the base whatever they leave open:
penalties, beams, or no cache at all.
"""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file

_TAKEN = ("eos_token_id", "pad_token_id")
_NO_SETTINGS = {*_TAKEN, "bos_token_id", "transformers_version", "_from_model_config"}
# Off where they are 1.
_FACTORS = {
    *("num_beams", "num_beam_groups", "num_return_sequences", "temperature", "top_p", "typical_p"),
    *("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "guidance_scale"),
}


def read_generation(
    base: str, where: str | Path, config: PretrainedConfig
) -> tuple[GenerationConfig, list[str]]:
    """What a base generates by, and what is to be said about its other settings.

    base: for messages. where: its folder or Hub id. Without a generation_config.json its settings
    are those of its config. Raises ValueError for a file or tokens that make no sense.
    """
    file, stored = GENERATION_CONFIG_NAME, _read(base, where, GENERATION_CONFIG_NAME)
    if stored is None:
        file, stored = CONFIG_NAME, _settings_in(_read(base, where, CONFIG_NAME) or {}, config)
    tokens = {name: stored.get(name) for name in _TAKEN}
    for name, value in tokens.items():
        ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if not all(token is None or isinstance(token, int) for token in ids):
            raise ValueError(
                f"base {base!r}: the {name} of its {file} is {value!r}, a token's number was "
                "needed, or a list of them for the end. Correct the file."
            )
    unused = ", ".join(
        f"{name}={reprlib.repr(value)}"
        for name, value in stored.items()
        if name not in _NO_SETTINGS and not _changes_nothing(name, value)
    )
    notices = [
        f"base {base!r}: of the generation settings in its {file} only the end and pad tokens are "
        f"used; a run has settings of its own. Not used: {unused}"
    ]
    return GenerationConfig(**tokens), notices if unused else []


def _read(base: str, where: str | Path, name: str) -> dict[str, Any] | None:
    """The content of one of the base's files; None where it has none of this name."""
    try:
        file = cached_file(str(where), name)
    except OSError:
        return None
    try:
        content = json.loads(Path(str(file)).read_bytes())
    except ValueError as error:
        content = error
    if not isinstance(content, dict):
        raise ValueError(
            f"base {base!r}: its {name} is no JSON object ({content}). Correct the file."
        )
    return content


def _settings_in(content: Mapping[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """The generation settings in a config's file: older bases have them there."""
    text, names = config.get_text_config(), GenerationConfig().to_dict()
    tokens = {name: getattr(text, name, None) for name in _TAKEN}
    # What the architecture itself has under such a name is no setting.
    return tokens | {k: v for k, v in content.items() if k in names and not hasattr(config, k)}


def _changes_nothing(name: str, value: Any) -> bool:
    """Whether a setting says what holds without it: there is a cache, and nothing else is on."""
    if name == "use_cache":
        return value is True
    return not value or (name in _FACTORS and value == 1)
