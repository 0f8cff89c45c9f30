"""What `train` wrote beside an adapter."""

import json
import re
from pathlib import Path
from typing import Any

from spectr_demo.experts.adapters import Adapter

_HEAD = 20_000  # characters of a model card that are looked at


def training_record(adapter: Adapter) -> dict[str, Any] | None:
    """The adapter's task, an example, and scores; None where there is no such file, or it is
    someone else's."""
    try:
        record = json.loads(Path(adapter.source, "scores.json").read_text(encoding="utf-8"))
        is_ours = all(
            isinstance(record["scores"][name]["all"]["mean"], float) for name in ("expert", "base")
        ) and all(isinstance(record["example"][side], str) for side in ("prompt", "answer"))
        has_words = all(isinstance(record[name], str) for name in ("task", "metric"))
        return record if is_ours and has_words else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def licence_of(adapter: Adapter) -> str | None:
    """What the model card beside an adapter says; None where there is none, or it says nothing."""
    try:
        with Path(adapter.source, "README.md").open(encoding="utf-8-sig") as card:
            head = card.read(_HEAD)
    except (OSError, ValueError):
        return None
    if not head.startswith("---\n"):
        return None
    found = re.search(r"^license: *(\S.*)$", head.split("\n---", 1)[0], re.MULTILINE)
    return found[1].strip(" \"'") if found else None
