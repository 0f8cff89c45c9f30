"""The endpoint for programs (`/compare`): the same runs as the page's, without the page."""

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from spectr_demo.charts.text import counted
from spectr_demo.config import GenerationSettings
from spectr_demo.engine.run import Step
from spectr_demo.routing.routers import parse_router
from spectr_demo.ui.run import MAX_COLUMNS, MAX_NEW_TOKENS, Steps


def compare_with(steps: Steps, expert_names: Sequence[str]) -> Callable[..., list[dict[str, Any]]]:
    """The endpoint's function: its signature is what a client sees."""

    def compare(
        prompt: str,
        columns: list[str],
        max_new_tokens: int = 96,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[dict[str, Any]]:
        """Answer a prompt with several routers at once, such as "base", "single:sql", "spectr".

        Returns an object per column: label, text, num_tokens, and expert_share, the mean weight of
        each expert over the answer.
        """
        try:
            if not 1 <= len(columns) <= MAX_COLUMNS:
                num = counted(len(columns), "column")
                raise ValueError(f"the comparison has {num}; give 1 to {MAX_COLUMNS}")
            if max_new_tokens > MAX_NEW_TOKENS:
                raise ValueError(
                    f"max_new_tokens is {max_new_tokens}; this server makes up to {MAX_NEW_TOKENS}"
                )
            routers = [parse_router(column, expert_names) for column in columns]
            settings = GenerationSettings(
                max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
            )
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        *_, last = steps(prompt, routers, settings)
        assert isinstance(last, Step) and last.trace is not None
        trace = last.trace
        answers = []
        for column in last.columns:
            share = trace.share(column.label, "answer").tolist()
            answers.append(
                {
                    "label": column.label,
                    "text": column.text,
                    "num_tokens": column.num_tokens,
                    "expert_share": dict(zip(expert_names, share, strict=True)),
                }
            )
        return answers

    return compare
