"""Writes the tables of README.md and docs/ from the JSON files that hold the measurements.

    python benchmarks/tables.py

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`. What stood there is
replaced. The sources are `assets/results/evaluation.json`, `assets/experts/*/scores.json` and
`benchmarks/results/*.json`. tests/test_docs.py fails where a page differs from what this writes.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from benchmarks import speed_tables
from benchmarks.speed_tables import markdown

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "performance.md",
    ROOT / "docs" / "training.md",
)

# The rows of the evaluation that the README shows, where they were measured; docs/results.md has
# all.
README_ROUTERS = (
    "base",
    "uniform (outputs)",
    "TIES",
    "arrow",
    "norm",
    "lag",
    "spectr-paper",
    "spectr",
    "spectr-calibrated",
    "spectr-context",
    "oracle",
)
# --- the routers and the experts --------------------------------------------------------------


def results_table() -> str:
    path = ROOT / "assets" / "results" / "evaluation.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for label in (label for label in README_ROUTERS if label in results["scores"]):
        score = results["scores"][label].get("of_oracle")
        accuracy = results["accuracy"].get(label)
        chat = results["offdomain"].get(label)
        of_domains = [part["all"]["answer"] for part in (accuracy or {}).values()]
        rows.append(
            [
                f"`{label}`" if label in README_ROUTERS[3:] else label,
                f"{score['mean']:.2f} ({score['low']:.2f}-{score['high']:.2f})" if score else "-",
                f"{results['likelihood'][label]['way']:.1%}",
                f"{sum(of_domains) / len(of_domains):.1%}" if accuracy else "-",
                f"{chat['kl']:.2f}" if chat else "-",
            ]
        )
    header = ("router", "score, oracle = 1", "likelihood gained", "decisions right", "KL on chat")
    return markdown(header, rows)


def experts_table() -> str:
    def score(value: Mapping[str, float] | None) -> str:
        return f"{value['mean']:.2f} ({value['low']:.2f}-{value['high']:.2f})" if value else "-"

    groups = ("all", "seen wording", "held-out wording", "own part of a message")
    rows = []
    for path in sorted((ROOT / "assets" / "experts").glob("*/scores.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        scores = record["scores"]
        baselines = [name for name in scores if name not in ("base", "expert")]
        named = [f"{name} {scores[name]['all']['mean']:.2f}" for name in baselines]
        rows.append(
            [
                f"`{record['task']}`",
                record["metric"],
                score(scores["base"]["all"]),
                "; ".join(named) or "-",
                *(score(scores["expert"].get(group)) for group in groups),
                str(scores["expert"]["all"]["num"]),
            ]
        )
    header = ["expert", "score", "base", "baselines", "expert", "seen wordings"]
    return markdown([*header, "held-out wordings", "own part of a message", "examples"], rows)


# --- the pages --------------------------------------------------------------------------------

TABLES: dict[str, Callable[[], str]] = {
    "results": results_table,
    "experts": experts_table,
    **speed_tables.TABLES,
}
MARKED = re.compile(r"(<!-- table: ([^>]*) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def written(page: str) -> str:
    """The page with its tables as the JSON files have them."""
    return MARKED.sub(lambda match: match[1] + TABLES[match[2]]() + match[4], page)


def main() -> None:
    for path in PAGES:
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
