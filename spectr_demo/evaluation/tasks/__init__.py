"""The tasks by name: one module per domain, one literal table."""

from pathlib import Path

from spectr_demo.config import unknown_name
from spectr_demo.evaluation.tasks.arpabet import ARPABET
from spectr_demo.evaluation.tasks.category import CATEGORY
from spectr_demo.evaluation.tasks.chords import CHORDS
from spectr_demo.evaluation.tasks.cron import CRON
from spectr_demo.evaluation.tasks.icd10 import ICD10
from spectr_demo.evaluation.tasks.kjv import KJV
from spectr_demo.evaluation.tasks.paper import PAPER_TASKS, paper_task
from spectr_demo.evaluation.tasks.sentiment import SENTIMENT
from spectr_demo.evaluation.tasks.smart_home import SMART_HOME
from spectr_demo.evaluation.tasks.sql import SQL
from spectr_demo.evaluation.tasks.task import Example, Item, Split, Task, make_split
from spectr_demo.evaluation.tasks.to_es import TO_ES
from spectr_demo.evaluation.tasks.user_file import is_file, read_task

# Every expert is trained and tested on this split, so that none has seen what another is asked.
SPLIT_SEED = 0

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        SMART_HOME,
        CRON,
        KJV,
        TO_ES,
        SENTIMENT,
        CATEGORY,
        SQL,
        ARPABET,
        CHORDS,
        ICD10,
    )
}


def get_task(name: str) -> Task:
    """A task of `TASKS`, or one of the SpectR paper's nine.

    Raises ValueError that lists the names and the nearest one.
    """
    if name in TASKS:
        return TASKS[name]
    if name in PAPER_TASKS:
        return paper_task(name)
    raise unknown_name("task", name, [*TASKS, *PAPER_TASKS])


def find_task(name: str) -> Task:
    """A task of the project by name, or that of a user's file by its path.

    Raises ValueError for a name that is unknown and for a file that is unsound.
    """
    return read_task(Path(name).expanduser()) if is_file(name) else get_task(name)


__all__ = ["TASKS", "Example", "Item", "Split", "Task", "find_task", "get_task", "make_split"]
