"""What a chat client asks for, checked, and in the engine's terms."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from spectr_demo.base.prompts import Message
from spectr_demo.config import GenerationSettings, RouterConfig
from spectr_demo.engine.model import SpectrModel
from spectr_demo.routing.routers import ROUTERS, parse_router
from spectr_demo.serving.errors import ApiError

DEFAULT_MAX_TOKENS = 512  # fewer where the context has less room
MAX_STOPS = 4  # OpenAI's own limit
# Parameters that say nothing about the answer.
_IGNORED = {
    "metadata",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Parameters that the engine cannot follow, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
    "top_logprobs": (0,),
}


def _text(content: Any) -> Any:
    """A message's text, which may come in parts."""
    if not isinstance(content, list):
        return content
    others = [part for part in content if not _is_text(part)]
    if others:
        kinds = {str(part.get("type")) if isinstance(part, dict) else "?" for part in others}
        raise ValueError(f"it has parts of type {', '.join(sorted(kinds))}; only text is read")
    return "\n".join(part["text"] for part in content)


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _listed(stop: Any) -> Any:
    """One stop text, several, or none."""
    if stop is None:
        return []
    return [stop] if isinstance(stop, str) else stop


class ChatMessage(BaseModel):
    """One turn of the chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text)]


class StreamOptions(BaseModel):
    """include_usage: whether a last chunk has the counts of tokens."""

    include_usage: bool = False


StopText = Annotated[str, Field(min_length=1)]


class ChatRequest(BaseModel):
    """The body of `/v1/chat/completions`, as far as it is understood; the rest is in
    `model_extra`."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[ChatMessage]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Annotated[list[StopText], BeforeValidator(_listed), Field(max_length=MAX_STOPS)] = []
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def check_rest(self) -> None:
        """Raise ApiError for what would be left undone without a word."""
        rest = {
            name: value
            for name, value in (self.model_extra or {}).items()
            if value is not None and name not in _IGNORED
        }
        if unknown := [name for name in rest if name not in _NEUTRAL]:
            raise ApiError(
                f"unknown parameters: {', '.join(unknown)}; leave them out",
                param=unknown[0],
                code="unknown_parameter",
            )
        if asked := [name for name, value in rest.items() if value not in _NEUTRAL[name]]:
            raise ApiError(
                f"this server cannot follow {', '.join(asked)}; leave them out",
                param=asked[0],
                code="unsupported_parameter",
            )

    @property
    def most_tokens(self) -> int | None:
        """`max_tokens`, by its old or its new name."""
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ApiError(
                f"max_tokens is {self.max_tokens} and max_completion_tokens is "
                f"{self.max_completion_tokens}; give one of them",
                param="max_tokens",
            )
        return limits.pop() if limits else None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request in the engine's terms. num_prompt: tokens of the prompt."""

    router: RouterConfig
    messages: Sequence[Message]
    num_prompt: int
    settings: GenerationSettings
    stop: Sequence[str]


def understood(request: ChatRequest, model: SpectrModel) -> Asked:
    """The request for this model. Raises ApiError with what is wrong with it."""
    request.check_rest()
    try:
        router = parse_router(request.model, model.library.names)
    except ValueError as error:
        raise ApiError(str(error), status=404, param="model", code="model_not_found") from error
    messages = [
        {"role": "system" if m.role == "developer" else m.role, "content": m.content}
        for m in request.messages
    ]
    try:
        num_prompt = len(model.encode(messages))
    except ValueError as error:
        raise ApiError(str(error), param="messages") from error
    temperature = request.temperature or 0.0
    is_drawn = temperature > 0 and request.seed is None
    try:
        settings = GenerationSettings(
            max_new_tokens=_max_tokens(request.most_tokens, num_prompt, model),
            temperature=temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=secrets.randbelow(2**31) if is_drawn else request.seed or 0,
        )
    except ValueError as error:
        raise ApiError(str(error).replace("max_new_tokens", "max_tokens")) from error
    return Asked(
        router=router,
        messages=messages,
        num_prompt=num_prompt,
        settings=settings,
        stop=request.stop,
    )


def _max_tokens(asked: int | None, num_prompt: int, model: SpectrModel) -> int:
    """How many tokens an answer may have. One of the context is kept: see `answer.pieces`."""
    room = model.base.context - 1 - num_prompt
    if room < (asked or 1):
        more = f", and max_tokens is {asked}" if asked else ""
        raise ApiError(
            f"the messages have {num_prompt} tokens{more}; {model.base.name} takes "
            f"{model.base.context - 1} together with the answer: shorten one of them",
            param="messages",
            code="context_length_exceeded",
        )
    return min(DEFAULT_MAX_TOKENS, room) if asked is None else asked


def model_names(model: SpectrModel) -> list[str]:
    """The routers by the names that a request's `model` has: one for each that can run."""
    experts = model.library.names
    routers = [key for key, row in ROUTERS.items() if key != "single"]
    if not experts:
        return ["base"]
    return [*routers, *(f"single:{name}" for name in experts)]
