"""Write the held-out prompts of the page's small evaluation anew: `assets/held_out.json`.

    python scripts/held_out_prompts.py

Run it after a change of a task's data. It needs requirements-train.txt, and fetches what the tasks
read. They are the first prompts of each task's held-out side, which no expert was trained on; every
second one has a wording that none was trained on either.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from spectr_demo.evaluation.tasks import SPLIT_SEED, TASKS
from spectr_demo.ui.trial import HELD_OUT, NUM_PROMPTS


def main() -> None:
    prompts = {
        name: [
            {"prompt": example.prompt, "text": example.text, "answer": example.answer}
            for example in task.build(SPLIT_SEED).heldout[:NUM_PROMPTS]
        ]
        for name, task in sorted(TASKS.items())
    }
    text = json.dumps(prompts, ensure_ascii=False, indent=1)
    HELD_OUT.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
