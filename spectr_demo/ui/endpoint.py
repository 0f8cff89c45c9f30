"""The endpoints for programs, over HTTP and as MCP tools: the page's runs, without the page."""

import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial, wraps
from typing import Any, NotRequired, TypedDict, get_args

import gradio as gr
from gradio.components.api_component import Api
from gradio.utils import get_function_description
from pydantic import ValidationError, validate_call

from spectr_demo.charts.text import counted
from spectr_demo.config import DEFAULT_ROUTER, GenerationSettings
from spectr_demo.evaluation.tasks import TASKS
from spectr_demo.experts.messages import short
from spectr_demo.routing.routers import parse_router
from spectr_demo.ui.libraries import Libraries
from spectr_demo.ui.records import training_record
from spectr_demo.ui.requests import RoutedRequest
from spectr_demo.ui.run import MAX_COLUMNS, MAX_NEW_TOKENS, Choice, Frame, Steps, frames
from spectr_demo.web import log_fault

logger = logging.getLogger(__name__)

# Gradio 6.31 takes `?view=api` for an open panel, but loads one only when its button is pressed.
_OPEN_PANEL = """() => {
  const isAsked = new URLSearchParams(location.search).get("view") === "api";
  const button = document.querySelector("footer .show-api");
  if (!isAsked || !button || document.querySelector(".api-docs")) return;
  button.click();
  button.click();
}"""
_READS_ONLY = GenerationSettings(max_new_tokens=1)  # nothing is generated: no time is asked for


class Answer(TypedDict):
    """One column of a comparison. num_tokens: end tokens included. expert_share: by name, mean
    weight over the answer. error: why it had to end early, where it had to."""

    label: str
    text: str
    num_tokens: int
    expert_share: dict[str, float]
    error: NotRequired[str]


class ExpertExample(TypedDict):
    """A prompt that an expert is for, and the answer to it."""

    prompt: str
    answer: str


class Expert(TypedDict):
    """An expert that is loaded. rank: the smallest and the largest over its layers. modules: the
    linear layers of a decoder layer that it changes. task, example: None where its files do not
    say."""

    name: str
    task: str | None
    rank: list[int]
    modules: list[str]
    example: ExpertExample | None


def register(page: gr.Blocks, libraries: Libraries, steps: Steps, queue: dict[str, Any]) -> None:
    """Add the endpoints to a page; they have the experts of all. queue: of those that use the
    model."""
    names = libraries.shared.library.names
    experts = experts_of(libraries)
    described = [expert["example"] for expert in experts() if expert["example"]]
    prompt = described[0]["prompt"] if described else "What is the capital of France?"
    columns = ["base", DEFAULT_ROUTER] if names else ["base"]
    _add(page, compare_with(libraries, steps), {"prompt": prompt, "columns": columns}, queue)
    _add(page, route_with(libraries, steps), {"prompt": prompt}, queue)
    _add(page, experts, {}, {"queue": False})
    page.load(None, None, None, js=_OPEN_PANEL, api_visibility="private")


def _add(
    page: gr.Blocks, function: Callable[..., Any], example: dict[str, Any], queue: dict[str, Any]
) -> None:
    """An endpoint with the function's name. The panel shows what its docstring says of each
    parameter and of the result, and a call that can be run as it stands."""
    made = gr.api(function, api_name=function.__name__, **queue)
    _, parameters, returned = get_function_description(function)
    descriptions = {**parameters, "result": " ".join(returned)}
    for name, number in zip(descriptions, [*made["inputs"], *made["outputs"]], strict=True):
        component = page.blocks[number]
        assert isinstance(component, Api)
        component.label = name
        # Gradio reads one of a parameter, the other of a result.
        component._api_info["additional_description"] = descriptions[name]
        component._api_info["description"] = descriptions[name]
        if name in example:
            component.example_payload = partial(example.get, name)  # type: ignore[method-assign]


def for_programs(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arguments checked by their types. What fails is one message.

    Only a generator can be ended by a client that leaves or cancels. What it yields is one result
    that grows, and clients are told the type of that.
    """
    checked = validate_call(config={"strict": True})(function)
    signature = inspect.signature(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        return checked(**signature.bind(*args, **kwargs).arguments)

    @wraps(function)
    def endpoint(*args: Any, **kwargs: Any) -> Any:
        with _one_message():
            return call(*args, **kwargs)

    @wraps(function)
    def growing(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with _one_message():
            yield from call(*args, **kwargs)

    if not inspect.isgeneratorfunction(function):
        return endpoint
    (result,) = get_args(signature.return_annotation)
    growing.__signature__ = signature.replace(return_annotation=result)  # type: ignore[attr-defined]
    return growing


@contextmanager
def _one_message() -> Iterator[None]:
    try:
        yield
        return
    except ValidationError as error:
        message = "; ".join(
            f"{'.'.join(map(str, each['loc']))} is {short(each['input'])}: {each['msg']}"
            for each in error.errors()
        )
    except (ValueError, TypeError) as error:
        message = str(error)
    except gr.Error:
        raise
    except Exception as error:
        log_fault(logger, "a call of an endpoint failed", error)
        message = f"the run broke off ({type(error).__name__}: {error}); run it again"
    raise gr.Error(message, print_exception=False)


# Gradio reads the docstrings below: it takes parameters from lines after "Args:", and "Returns:".


def compare_with(libraries: Libraries, steps: Steps) -> Callable[..., Any]:
    """The endpoint `compare`: its signature is what a client sees."""

    @for_programs
    def compare(
        prompt: str,
        columns: list[str],
        max_new_tokens: int = 96,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[list[Answer]]:
        """Answer a prompt with several routers side by side, each a column. Read as a stream, the answers grow.

        Args:
            prompt: The user's message. It may hold several requests.
            columns: One to six routers: "base", "single:NAME" with an expert's name, "uniform", "arrow", "spectr", "spectr-paper", "spectr-calibrated", "spectr-context", "lag" or "norm".
            max_new_tokens: Tokens of an answer at most, up to 512.
            temperature: Of sampling. 0 always takes the likeliest token.
            seed: Of sampling; columns share the noise.

        Returns:
            For each column its label, text, num_tokens, and expert_share (mean weight of each expert over the answer, once it is whole).
        """  # noqa: E501
        if not 1 <= len(columns) <= MAX_COLUMNS:
            num = counted(len(columns), "column")
            raise ValueError(f"the comparison has {num}; give 1 to {MAX_COLUMNS}")
        if max_new_tokens > MAX_NEW_TOKENS:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}; this server makes up to {MAX_NEW_TOKENS}"
            )
        snapshot = libraries.shared.snapshot
        libraries.shared.check(prompt)
        routers = [parse_router(column, snapshot.library.names) for column in columns]
        settings = GenerationSettings(
            max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        )
        run = libraries.bound(steps, snapshot)
        for frame in frames(run, prompt, routers, settings, threading.Event()):
            yield _answers(frame)

    return compare


def _answers(frame: Frame) -> list[Answer]:
    trace = frame.trace if frame.is_over else None
    return [
        Answer(
            label=column.label,
            text=column.text,
            num_tokens=column.num_tokens,
            expert_share=dict(
                zip(trace.expert_names, trace.share(column.label, "answer").tolist(), strict=True)
            )
            if trace
            else {},
            **({"error": column.error} if column.error else {}),  # type: ignore[typeddict-item]
        )
        for column in frame.columns
    ]


def route_with(libraries: Libraries, steps: Steps) -> Callable[..., Any]:
    """The endpoint `route`: a run that reads the prompt, and has no columns."""

    @for_programs
    def route(prompt: str) -> Iterator[list[RoutedRequest]]:
        """Say which expert each request of a message is for. Nothing is generated.

        Args:
            prompt: The user's message. It may hold several requests.

        Returns:
            For each request its text, expert (null: none stands out, the base answers), standing (how sure: how far the nearest expert stands out, in standard deviations over ordinary prompts), threshold (what standing must exceed), and nearest (why: the five nearest experts with their standing).
        """  # noqa: E501
        libraries.shared.check(prompt)
        with closing(steps(prompt, [], _READS_ONLY)) as run:
            for item in run:  # empty while it is in line
                yield list(item.requests) if isinstance(item, Choice) else []

    return route


def experts_of(libraries: Libraries) -> Callable[[], list[Expert]]:
    """The endpoint `experts`."""

    @for_programs
    def experts() -> list[Expert]:
        """List the experts that are loaded.

        Returns:
            For each expert its name, task, rank (smallest and largest), modules that it changes, and example (a prompt and the answer).
        """  # noqa: E501
        listed: list[Expert] = []
        for adapter in libraries.shared.library.adapters:
            record = training_record(adapter)
            task = record["task"] if record else None
            example = None
            if record:
                prompt, answer = (record["example"][side] for side in ("prompt", "answer"))
                example = ExpertExample(prompt=prompt, answer=answer)
            listed.append(
                {
                    "name": adapter.name,
                    "task": TASKS[task].title if task in TASKS else task,
                    "rank": list(adapter.ranks),
                    "modules": adapter.projections,
                    "example": example,
                }
            )
        return listed

    return experts
