"""Scores of a routed model on the nine tasks of the SpectR paper (`tasks/paper.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation.generation import routed_answers
from spectr_demo.evaluation.scores import Score, summarize
from spectr_demo.evaluation.tasks.paper import PAPER_TASKS, paper_task
from spectr_demo.routing.routers import parse_router


def paper_scores(
    engine: SpectrModel, routers: Sequence[str], num_examples: int = 500, seed: int = 0
) -> dict[str, dict[str, Score]]:
    """Accuracy by router and task, over the tasks that an expert of the engine is named after.

    routers: as `parse_router` takes them; `single:{own}` is the expert of the task at hand.
    num_examples: held-out questions a task. seed: of their choice, the same for every router.
    Raises ValueError if no expert is named after a task, and what building a task raises.
    """
    names = [name for name in engine.library.names if name in PAPER_TASKS]
    if not names:
        raise ValueError(
            f"the experts are {', '.join(engine.library.names) or 'none'}; at least one named "
            f"after a task ({', '.join(PAPER_TASKS)}) was needed; rename one as NAME=SOURCE"
        )
    scores: dict[str, dict[str, Score]] = {router: {} for router in routers}
    for name in names:
        task = paper_task(name)
        examples = task.build(seed).heldout[:num_examples]
        prompts = [engine.encode(example.prompt) for example in examples]
        for router in routers:
            answers = routed_answers(
                engine,
                parse_router(router.format(own=name), engine.library.names),
                prompts,
                max_new_tokens=task.max_new_tokens,
                description=f"{router}: {name}",
            )
            scores[router][name] = summarize(
                [task.score(a, e) for a, e in zip(answers, examples, strict=True)]
            )
    return scores
