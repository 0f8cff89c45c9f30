"""`SpectrModel`: a base with experts attached, and what every front end calls on it."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from spectr_demo.base.loading import DeviceMap, LoadedBase, load_base
from spectr_demo.base.prompts import Message, encode, shared_length
from spectr_demo.config import (
    DEFAULT_ROUTER,
    GenerationSettings,
    RouterConfig,
    experts_from_environment,
)
from spectr_demo.engine.layers import attach_, detach_, follow
from spectr_demo.engine.plan import RoutingPlan
from spectr_demo.engine.reading import Reader, evidence_mask
from spectr_demo.engine.recorder import Recorder
from spectr_demo.engine.run import Run, Step
from spectr_demo.experts.library import ExpertLibrary, load_experts
from spectr_demo.routing.calibration import Calibration
from spectr_demo.routing.routers import parse_router


def load(
    base: str | None = None,
    experts: Sequence[str] | None = None,
    *,
    device_map: DeviceMap | None = None,
) -> "SpectrModel":
    """The routed model: a base in 4-bit, and LoRA experts on it.

    base: Hub id or folder of a causal language model; None is `SPECTR_BASE_MODEL`, or the embedded
        default. experts: Hub ids or folders of PEFT adapters, `NAME=SOURCE` to rename one; None is
        `SPECTR_EXPERTS`, or the shipped ones. device_map: spreads a base that is too large for one
        GPU, such as "auto"; see `load_base`.
    """
    loaded = load_base(base, device_map=device_map)
    sources = experts_from_environment() if experts is None else list(experts)
    return SpectrModel(loaded, load_experts(sources, loaded.model))


class SpectrModel:
    """A base model with a library of experts attached, none of them merged into its weights."""

    def __init__(self, base: LoadedBase, library: ExpertLibrary) -> None:
        self.base = base
        self.library = library
        self.model = base.model
        self.tokenizer = base.tokenizer
        self.reader = Reader(base, library)
        self.template = self.reader.template
        attach_(self.model, library)
        self._hooks = follow(self.model)

    def detach(self) -> None:
        """Take the experts off again: `self.model` is then the base as it was loaded."""
        for hook in self._hooks:
            hook.remove()
        detach_(self.model)

    def generate(
        self,
        prompt: str | Sequence[Message],
        router: str | RouterConfig = DEFAULT_ROUTER,
        **settings: Any,
    ) -> str:
        """The answer of one router, as text. settings: fields of `GenerationSettings`."""
        return self.compare(prompt, [router], record=False, **settings).columns[0].text

    def compare(
        self,
        prompt: str | Sequence[Message],
        columns: Sequence[str | RouterConfig],
        *,
        record: bool = True,
        **settings: Any,
    ) -> Step:
        """Run the columns side by side to their end. settings: fields of `GenerationSettings`."""
        run = self.stream(prompt, columns, GenerationSettings(**settings), record=record)
        return deque(run, maxlen=1).pop()

    def stream(
        self,
        prompt: str | Sequence[Message],
        columns: Sequence[str | RouterConfig],
        settings: GenerationSettings | None = None,
        *,
        record: bool = False,
        trace_every: int | None = None,
    ) -> Iterator[Step]:
        """Generate with several routers at once, one step per token.

        prompt: the user's message, or a list of chat messages; a base without a chat template
            reads plain text. columns: routers, as `parse_router` takes them.
        trace_every: with `record`, also give a partial trace every so many tokens.
        Closing the iterator cancels the run between two tokens and frees what it holds.
        Raises ValueError at once for an unknown router, an empty prompt, or one that is too long.
        """
        settings = settings or GenerationSettings()
        if not columns:
            raise ValueError(
                "there is no column to run; name at least one router, such as 'spectr'"
            )
        routers = [parse_router(column, self.library.names) for column in columns]
        prompt_ids = self.encode(prompt)
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context and len(prompt_ids) + settings.max_new_tokens > context:
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens, and {settings.max_new_tokens} more may "
                f"be generated; the context of {self.base.name} is {context}: shorten one of them"
            )
        prompts = [prompt_ids] * len(routers)
        run = Run(
            self.base,
            self.library,
            routers,
            prompt_ids,
            settings,
            lambda recorder: self.plan(routers, prompts, recorder),
            record=record,
            trace_every=trace_every,
        )
        return run.steps()

    def encode(self, prompt: str | Sequence[Message]) -> list[int]:
        """Token ids of a prompt in the base's chat template. Raises ValueError if it is empty."""
        return encode(self.tokenizer, prompt)

    def plan(
        self,
        routers: Sequence[RouterConfig],
        texts: Sequence[Sequence[int]],
        recorder: Recorder | None = None,
        *,
        num_prompt: Sequence[int] | None = None,
    ) -> RoutingPlan:
        """A plan for one batch; routers that read the prompt first do it here.

        texts: token ids of each row, which are padded on the left. num_prompt: how many tokens of
            each are its prompt; None says all.
        """
        num_prompt = num_prompt or [len(ids) for ids in texts]
        least_leads = {
            r: self.reader.least_lead(r) for r in set(routers) if r.confidence is not None
        }
        readers = [row for row, router in enumerate(routers) if router.reads_first]
        evidence_starts = [
            num if router.reads_first else shared_length(self.template.opening, ids)
            for router, ids, num in zip(routers, texts, num_prompt, strict=True)
        ]
        return RoutingPlan(
            routers,
            self.library.names,
            recorder,
            calibration=self.calibration if any(r.calibrated for r in routers) else None,
            is_evidence=evidence_mask(texts, evidence_starts, self.base.device),
            starts=self.reader.starts(
                [routers[row] for row in readers],
                [texts[row][: num_prompt[row]] for row in readers],
                least_leads,
            ),
            least_leads=least_leads,
            newline_ids=torch.tensor(
                sorted(self.template.newline_ids), dtype=torch.long, device=self.base.device
            ),
        )

    @property
    def calibration(self) -> Calibration:
        """Of every expert, measured when it is first needed."""
        return self.reader.calibration
