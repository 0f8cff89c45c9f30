"""A form as the query of an address, and back. What is as the page opens is left out."""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any
from urllib.parse import parse_qs, urlencode

from spectr_demo.ui.run import Form

MAX_LENGTH = 6000  # characters; servers refuse addresses of more than 8,000 or so
_NUMBERS = ("top_k", "router_temperature", "temperature", "max_new_tokens", "seed")


def query_of(form: Form, opening: Mapping[str, Any]) -> str:
    """Such as "prompt=hello&seed=3". opening: the values with which the page opens.

    A prompt that makes the address too long is left out.
    """
    chosen = {
        name: ",".join(value) if name == "columns" else value
        for name, value in asdict(form).items()
        if name == "prompt" or value != opening[name]
    }
    query = urlencode({name: _written(value) for name, value in chosen.items()})
    if len(query) > MAX_LENGTH:
        chosen.pop("prompt")
        query = urlencode({name: _written(value) for name, value in chosen.items()})
    return query


def form_of(query: str, opening: Mapping[str, Any]) -> Form | None:
    """The form that an address describes; None where it describes none. Values are as somebody
    wrote them: running checks them."""
    asked = {name: values[-1] for name, values in parse_qs(query.lstrip("?")).items()}
    asked = {field.name: asked[field.name] for field in fields(Form) if field.name in asked}
    if not asked:
        return None
    values = dict(opening)
    for name, text in asked.items():
        values[name] = text
        if name == "columns":
            values[name] = [key for key in text.split(",") if key]
        elif name in _NUMBERS:
            values[name] = _number(text, opening[name])
    return Form(**values)


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(text: str, otherwise: float) -> float:
    try:
        number = float(text)
    except ValueError:
        return otherwise
    return number if math.isfinite(number) else otherwise
