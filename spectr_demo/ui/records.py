"""What `train` wrote beside an adapter."""

import json
from pathlib import Path
from typing import Any

from spectr_demo.experts.adapters import Adapter


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
