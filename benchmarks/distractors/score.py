"""Turn the distractors that train.py wrote into PEFT folders, and note their scores.

    python benchmarks/distractors/score.py RESULTS

Writes experts/ and results.json beside this file, and prints the table of README.md. A score is the
share of held-out requests whose answer is right word for word. Of the package's own tasks that is
stricter than their own scores.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script

from benchmarks.second_edition.score import write_folders
from benchmarks.second_edition.train import ALL_LINEAR, wilson

HERE = Path(__file__).resolve().parent
SETS = {ALL_LINEAR: "all", ALL_LINEAR[:4]: "q, k, v, o", ALL_LINEAR[4:]: "gate, up, down"}


def about(folder: Path) -> dict[str, Any]:
    """Rank and modules of an adapter, from its config."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    modules = tuple(m for m in ALL_LINEAR if m in config["target_modules"])
    short = ", ".join(m.removesuffix("_proj") for m in modules)
    return {"rank": config["r"], "modules": SETS.get(modules, short)}


def scores(record: dict[str, Any], names: list[str]) -> dict[str, Any]:
    out = {}
    for group in record["distractors"]:
        for name in group["names"]:
            mean, num = group["single_scores"].get(name, (None, 0))
            out[name] = about(HERE / "experts" / name) | {"steps": group["steps"], "num": num}
            if mean is not None:
                low, high = wilson(round(mean * num), num)
                out[name] |= {"mean": mean, "low": round(low, 4), "high": round(high, 4)}
    return {name: out[name] for name in names if name in out}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    results = parser.parse_args().results
    names = write_folders(results, HERE / "experts", "distractors")
    record = json.loads((results / "record.json").read_text(encoding="utf-8"))
    found = {
        "device": record["device"],
        "torch": record["torch"],
        "training": record["distractor"],
        "experts": scores(record, names),
    }
    (HERE / "results.json").write_text(f"{json.dumps(found, indent=1)}\n", encoding="utf-8")
    print("| adapter | rank | layers | exact |\n| --- | --- | --- | --- |")
    for name, score in found["experts"].items():
        exact = "not measured"
        if "mean" in score:
            exact = f"{score['mean']:.2f} [{score['low']:.2f}, {score['high']:.2f}]"
        print(f"| {name} | {score['rank']} | {score['modules']} | {exact} |")


if __name__ == "__main__":
    main()
