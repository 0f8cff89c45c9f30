"""Commands that share their work among processes, with Ray. It is an optional package."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation.evaluate import Evaluation, Settings

# Of a Ray that is started here: what processes hand to each other is small.
_STORE_BYTES = 200 * 2**20
_RESTARTS = 1  # of a worker that dies; it goes on from what is kept


def import_ray() -> Any:
    """Ray. Raises ModuleNotFoundError, which says what to install."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ModuleNotFoundError(
            "package ray is not installed; several processes need it; run: pip install -r "
            "requirements-ray.txt, or spectr-demo[ray]"
        ) from error
    return ray


@contextmanager
def connected(num_processes: int) -> Iterator[Any]:
    """Ray for so many processes: that of `RAY_ADDRESS`, else one of this machine, ended on leaving.

    A process that has connected already stays so. What fails in another process is raised as if it
    had failed here; where a process dies, RuntimeError is.
    """
    ray = import_ray()
    is_first = not ray.is_initialized()
    if is_first:
        own: dict[str, Any] = {}
        if not os.environ.get("RAY_ADDRESS"):
            num_cpus = max(num_processes, os.cpu_count() or 1)
            own = {"num_cpus": num_cpus, "object_store_memory": _STORE_BYTES}
        ray.init(**own, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        yield ray
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise RuntimeError(
            f"a process has died ({_first_line(error)}); what it had finished is kept: run the "
            "command again"
        ) from error
    finally:
        if is_first:
            ray.shutdown()


def _first_line(error: BaseException) -> str:
    """What Ray says of an error, without its log."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def share(num_processes: int) -> dict[str, float]:
    """What one of so many processes has of this machine, in Ray's terms."""
    return {
        "num_cpus": max(1, (os.cpu_count() or 1) // num_processes),
        "num_gpus": min(1.0, torch.cuda.device_count() / num_processes),
    }


class _Evaluator:
    """A process that measures parts of an evaluation."""

    def __init__(self, folder: str, load: Callable[[], SpectrModel], settings: Settings) -> None:
        os.chdir(folder)
        self._evaluation = Evaluation(load(), settings)
        self._is_merged = False

    def measure(self, only_composition: bool, stage: int, number: int) -> dict[str, Any]:
        """One of the evaluation's calls. Returns the parts that it found."""
        evaluation = self._evaluation
        if stage and not self._is_merged:
            evaluation.merge()
            self._is_merged = True
        evaluation.parts.found.clear()
        evaluation.calls(only_composition=only_composition)[stage][number]()
        return evaluation.parts.found


def measure_in_workers(
    evaluation: Evaluation,
    load: Callable[[], SpectrModel],
    num_workers: int,
    *,
    only_composition: bool = False,
) -> None:
    """Measure what the evaluation's `run`, or `with_composition`, then finds in the cache.

    load: gives another process the same model. Raises as `connected` does.
    """
    with connected(num_workers) as ray:
        from ray.util import ActorPool

        actor = ray.remote(
            **share(num_workers), max_restarts=_RESTARTS, max_task_retries=_RESTARTS
        )(_Evaluator)
        pool: Any = ActorPool(
            [actor.remote(os.getcwd(), load, evaluation.settings) for _ in range(num_workers)]
        )

        def measure(worker: Any, place: tuple[int, int]) -> Any:
            return worker.measure.remote(only_composition, *place)

        for stage, calls in enumerate(evaluation.calls(only_composition=only_composition)):
            places = [(stage, number) for number in range(len(calls))]
            found = pool.map_unordered(measure, places)
            for parts in tqdm(found, total=len(places), unit="call"):
                evaluation.parts.keep(parts)


def _in_folder(folder: str, function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    os.chdir(folder)
    function(**given)


def each_finished(
    function: Callable[..., Any], arguments: Mapping[str, Mapping[str, Any]], num_workers: int
) -> Iterator[str]:
    """Call a function in so many processes at a time; give the name of each call that is over.

    arguments: of each call, by its name. All calls are made, also where one fails; then
    RuntimeError says which have failed, and why.
    """
    with connected(num_workers) as ray:
        task = ray.remote(**share(num_workers), max_calls=1, max_retries=_RESTARTS)(_in_folder)
        going = {
            task.remote(os.getcwd(), function, given): name for name, given in arguments.items()
        }
        failed = []
        while going:
            (done,), _ = ray.wait(list(going))
            name = going.pop(done)
            try:
                ray.get(done)
            except ray.exceptions.RayTaskError as error:
                failed.append(f"{name}: {error.cause}")
            except ray.exceptions.RayError as error:
                failed.append(f"{name}: its process has died ({_first_line(error)}); run it again")
            else:
                yield name
        if failed:
            raise RuntimeError("; ".join(failed))
