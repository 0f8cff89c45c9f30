"""Record the examples of the page anew, with the embedded base and the shipped experts.

    python scripts/record_examples.py

Run it after a change of the experts, of a router or of an example; commit the experts before. It
writes `assets/recorded/`, says how each answer is graded, and takes some minutes.
"""

import datetime
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from spectr_demo.config import ASSETS, shipped_experts
from spectr_demo.engine.model import load
from spectr_demo.ui import recorded
from spectr_demo.ui.examples import EXAMPLES
from spectr_demo.ui.grades import grade, overall


def main() -> None:
    git = ["git", "log", "-1", "--format=%h", "--", str(ASSETS / "experts")]
    commit = subprocess.run(git, cwd=ASSETS, capture_output=True, text=True, check=True).stdout
    date = datetime.date.today().isoformat()
    model = load(experts=shipped_experts())
    recorded.FOLDER.mkdir(exist_ok=True)
    for file in recorded.FOLDER.glob("*.npz"):
        file.unlink()
    for example in EXAMPLES:
        path = recorded.FOLDER / f"{example.key}.npz"
        recording = recorded.record(example, model, date=date, commit=commit.strip())
        recording.save(path)
        graded = {c.label: overall(grade(example, c.text)) for c in recording.frame.columns}
        print(f"{example.key}: {path.stat().st_size / 1e3:.0f} kB, {graded}", flush=True)


if __name__ == "__main__":
    main()
