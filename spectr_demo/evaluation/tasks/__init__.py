"""The tasks by name: one module per domain, one literal table."""

import difflib

from spectr_demo.evaluation.tasks.sql import SQL
from spectr_demo.evaluation.tasks.task import Example, Item, Split, Task, make_split

TASKS: dict[str, Task] = {task.name: task for task in (SQL,)}


def get_task(name: str) -> Task:
    """Look a task up by name. Raises ValueError that lists the names and the nearest one."""
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "choose one of these"
    raise ValueError(f"task {name!r}: no such task; there are {', '.join(TASKS)}; {hint}")


__all__ = ["TASKS", "Example", "Item", "Split", "Task", "get_task", "make_split"]
