"""Teacher-forced reading: how likely the reference answer is under a router, and whom it chose.

All rows of a batch share one router, and every layer sees the activations that this router made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from spectr_demo.base.decoder import decoder_of
from spectr_demo.base.prompts import decoder_inputs, encode, encode_answered, shared_length
from spectr_demo.config import RouterConfig
from spectr_demo.engine.batches import check_rows
from spectr_demo.engine.layers import routed
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.plan import RoutingPlan
from spectr_demo.engine.recorder import Choice, Recorder
from spectr_demo.engine.tracing import output_logprobs
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.routers import ROUTERS
from spectr_demo.trace import NOT_ROUTED


@dataclass(frozen=True, kw_only=True)
class Text:
    """Token ids of a prompt and of the answer that is read after it, the end token included."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    @classmethod
    def from_chat(cls, engine: SpectrModel, prompt: str, answer: str) -> Text:
        """A prompt in the base's chat template, and the answer to it."""
        prompt_ids = encode(engine.tokenizer, prompt)
        whole = encode_answered(engine.tokenizer, prompt, answer)
        return cls(prompt_ids=tuple(prompt_ids), answer_ids=tuple(whole[len(prompt_ids) :]))


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One text under one router.

    logprob: (A,) of the answer's tokens, in nats. kl: (A,) KL(router || base) of the distributions
    they were read from, in nats; agrees: (A,) whether the likeliest token is the base's;
    base_logprob: (A,) the base's logprob; these three are empty where the base was not read.
    choices: (T, L, P, K) int16 expert ids, best first, `NOT_ROUTED` where the base answered alone;
    T are the tokens read (the last answer token is not). None for a router that does not choose.
    num_prompt, num_opening: tokens of the prompt, and of those the ones with which every prompt
    opens.
    """

    logprob: NDArray[np.float32]
    kl: NDArray[np.float32]
    agrees: NDArray[np.bool_]
    base_logprob: NDArray[np.float32]
    choices: NDArray[np.int16] | None
    num_prompt: int
    num_opening: int

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of an answer token, in nats."""
        return -float(self.logprob.mean())


class _Choices(Recorder):
    """Keeps the experts that were chosen, for all rows and tokens of one pass."""

    def __init__(self, library: ExpertLibrary, shape: tuple[int, int], top_k: int) -> None:
        super().__init__()
        self._library = library
        places = (library.num_layers, len(library.projections))
        self._experts = np.full((*shape, *places, top_k), NOT_ROUTED, np.int16)

    def experts(self) -> NDArray[np.int16]:
        """(R, T, L, P, K) ids of the library's experts."""
        for bank in self._library.banks:
            self.collect(bank)
        return self._experts

    def add_choice(self, bank: ExpertBank, row: int, choice: Choice) -> None:
        experts, weights, _ = choice
        chosen = bank.expert_ids[experts.cpu()].to(torch.int16)
        chosen = torch.where(weights.cpu() > 0, chosen, NOT_ROUTED)
        place = np.s_[:, *self._library.places(bank), : chosen.shape[-1]]
        self._experts[row][place] = chosen.numpy()

    def add_constant(self, plan: RoutingPlan) -> None:
        """The choices of routers that read the request, the same for all tokens of a row."""
        top_k = self._experts.shape[-1]
        for bank in self._library.banks:
            of_rows = plan.constant.of(bank)[:, 0]  # (R, P, E)
            weights, experts = of_rows.topk(min(top_k, bank.num_experts), dim=-1)
            for row, choice in enumerate(zip(experts[:, None], weights[:, None], strict=True)):
                self.add_choice(bank, row, (*choice, choice[1]))

    def add_hidden(self, hidden: Tensor) -> None:
        """The caller has them already."""


@torch.inference_mode()
def read(
    engine: SpectrModel,
    router: RouterConfig,
    texts: Sequence[Text],
    *,
    batch_size: int = 16,
    with_base: bool = False,
    description: str = "reading",
) -> list[Reading]:
    """Read the texts, in batches of similar length, padded on the left.

    A router that reads the request takes each prompt for one request here: a reference answer has
    one text to follow, not several lanes. with_base: also read them without experts, and compare.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].prompt_ids + texts[i].answer_ids))
    readings: dict[int, Reading] = {}
    with tqdm(total=len(texts), desc=description, unit="text", leave=False) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = _read_batch(engine, router, [texts[i] for i in rows], with_base)
            readings.update(zip(rows, batch, strict=True))
            bar.update(len(rows))
    return [readings[i] for i in range(len(texts))]


def _read_batch(
    engine: SpectrModel, router: RouterConfig, texts: Sequence[Text], with_base: bool
) -> Iterator[Reading]:
    ids = [[*text.prompt_ids, *text.answer_ids[:-1]] for text in texts]
    device = engine.model.device
    check_rows(engine.model, [len(row) for row in ids])
    inputs: Any = {**decoder_inputs(ids, device), "use_cache": False}
    width = inputs["input_ids"].shape[1]
    decoder = decoder_of(engine.model)
    recorder = None
    row_of = ROUTERS[router.name]
    if row_of.chooses:
        assert router.top_k is not None
        recorder = _Choices(engine.library, (len(texts), width), router.top_k)
    # The plan's padding is the prompts'; only traces look at it.
    plan = engine.plan([router] * len(texts), [text.prompt_ids for text in texts], recorder)
    with routed(plan):
        hidden = decoder(**inputs).last_hidden_state
    base_hidden = None
    if with_base:
        with routed(None):
            base_hidden = decoder(**inputs).last_hidden_state
    if recorder is not None and row_of.reads_request:
        recorder.add_constant(plan)
    experts = None if recorder is None else recorder.experts()
    opening = engine.template.opening
    for row, text in enumerate(texts):
        answer = torch.tensor(text.answer_ids, device=device)
        num = len(answer)
        logprobs = output_logprobs(engine.model, hidden[row, -num:])
        kl = base_logprob = logprobs.new_zeros(0)
        agrees = logprobs.new_zeros(0, dtype=torch.bool)
        if base_hidden is not None:
            base = output_logprobs(engine.model, base_hidden[row, -num:])
            kl = (logprobs.exp() * (logprobs - base)).sum(-1).clamp(min=0)
            agrees = logprobs.argmax(-1) == base.argmax(-1)
            base_logprob = base.gather(-1, answer[:, None])[:, 0]
        yield Reading(
            logprob=logprobs.gather(-1, answer[:, None])[:, 0].cpu().numpy(),
            kl=kl.cpu().numpy(),
            agrees=agrees.cpu().numpy(),
            base_logprob=base_logprob.cpu().numpy(),
            choices=None if experts is None else experts[row, width - len(ids[row]) :],
            num_prompt=len(text.prompt_ids),
            num_opening=shared_length(opening, text.prompt_ids),
        )
