"""The segment oracle: each part of a message is read and answered by its own expert, by hand.

It is what a router of tokens can reach at best. A part's tokens are those that ask for it and
those that answer it. The template's opening is the base's. Its closing, from which the first answer
begins, belongs to the first part.

Axes: R rows, T tokens, K parts of a message, E experts, P projections of a bank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from spectr_demo.engine.layers import routed
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.plan import Plan
from spectr_demo.engine.sampling import end_token_ids, pad_token_id
from spectr_demo.evaluation.generation import continue_rows
from spectr_demo.evaluation.messages import CLOSING, OPENING
from spectr_demo.routing.bank import ExpertBank, Mixed


@dataclass(frozen=True, kw_only=True)
class Segments:
    """A prompt whose parts are known.

    ids: (T,) of the prompt. owners: (T,) the part of each token, `OPENING` or `CLOSING`.
    experts: (K,) ids in the library. caps: (K,) tokens after which a part's answer is cut.
    """

    ids: tuple[int, ...]
    owners: tuple[int, ...]
    experts: tuple[int, ...]
    caps: tuple[int, ...]


class SegmentPlan(LogitsProcessor, Plan):
    """A `Plan` of engine/plan.py that follows the parts, and the processor that keeps them apart.

    A part's answer ends with its line, with an end token or at its cap. Where another part follows,
    an end token becomes a newline. The token that ends a line is read by the next part's expert: it
    says how that part begins. A newline before anything is said ends nothing.
    """

    is_base_only = needs_all_tokens = False

    def __init__(
        self,
        rows: Sequence[Segments],
        *,
        newline_ids: Sequence[int],
        newline_id: int,
        end_ids: Sequence[int],
        device: torch.device,
    ) -> None:
        """newline_ids: all tokens that end a line. newline_id: the one that an end token becomes.
        end_ids: all tokens that end an answer."""
        width = max(len(row.ids) for row in rows)
        owners = [[OPENING] * (width - len(row.ids)) + list(row.owners) for row in rows]
        self._newlines = torch.tensor(newline_ids, dtype=torch.long, device=device)
        self._ends = torch.tensor(end_ids, dtype=torch.long, device=device)
        self._newline_id = newline_id
        self._end_id = min(end_ids, default=None)
        self._experts = _padded([row.experts for row in rows], device)
        self._caps = _padded([row.caps for row in rows], device)
        self._last = torch.tensor([len(row.experts) - 1 for row in rows], device=device)
        prompt = torch.tensor(owners, device=device)
        # (R, T) of the tokens that are read in this pass.
        self._owners = torch.where(prompt == CLOSING, 0, prompt)
        self._part = torch.zeros_like(self._last)
        self._length = torch.zeros_like(self._last)
        self._has_said = torch.zeros_like(self._last, dtype=torch.bool)
        self._is_cut = torch.zeros_like(self._has_said)
        self._is_prompt_read = False
        self._answered: list[Tensor] = []
        self._mixed: dict[ExpertBank, Mixed] = {}

    def begin_pass(self, input_ids: Tensor) -> None:
        if self._is_prompt_read:
            self._take(input_ids[:, -1])
            self._owners = self._part[:, None]
        self._is_prompt_read = True

    def add(self, y: Tensor, bank: ExpertBank, place: int, x: Tensor) -> Tensor:
        if place == 0:
            z = bank.project(x)
            weights = self.weights(bank)[:, :, None, :, None]
            self._mixed[bank] = Mixed(bank, z * weights.to(z.dtype), None)
        is_last = place == len(bank.paths) - 1
        mixed = self._mixed.pop(bank) if is_last else self._mixed[bank]
        return mixed.add_(y, place)

    def end_pass(self, hidden: Tensor) -> None:
        """Nothing is recorded."""

    def weights(self, bank: ExpertBank) -> Tensor:
        """(R, T, E) bool: whether a token is that expert's."""
        experts = self._experts.gather(1, self._owners.clamp(min=0))
        experts = torch.where(self._owners < 0, -1, experts)
        return experts[..., None] == bank.expert_ids.to(experts.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(R, V) logits, in which a part that ends with another to follow ends with a newline."""
        follows = self._part < self._last
        is_over = self._length >= self._caps.gather(1, self._part[:, None])[:, 0]
        ends = torch.isin(scores.argmax(-1), self._ends)
        self._is_cut = follows & (is_over | ends)
        scores = _only(scores, self._is_cut, self._newline_id)
        if self._end_id is None:
            return scores
        return _only(scores, ~follows & is_over, self._end_id)

    def _take(self, token: Tensor) -> None:
        """Note each row's newest token (R,), and whether its part ends with it."""
        self._answered.append(self._part.clone())
        is_newline = torch.isin(token, self._newlines)
        moves = (self._part < self._last) & (self._is_cut | (is_newline & self._has_said))
        self._part = self._part + moves
        self._length = torch.where(moves, 0, self._length + 1)
        self._has_said = ~moves & (self._has_said | ~is_newline)

    def owners_of_answer(self, num_tokens: int) -> Tensor:
        """(R, T) the part of each token that was generated. The last one is never read."""
        return torch.stack([*self._answered, self._part], 1)[:, :num_tokens]


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(R, K) int64, with -1 after the end of a row."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], device=device)


def _only(scores: Tensor, rows: Tensor, token: int) -> Tensor:
    """(R, V) with nothing but this token possible in these rows (R,)."""
    one = torch.full_like(scores[:1], -torch.inf)
    one[:, token] = 0
    return torch.where(rows[:, None], one, scores)


def newline_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens that end a line."""
    # As byte-level tokenizers and SentencePiece write it: to decode all tokens takes seconds.
    marks = ("\n", "Ċ", "<0x0A>")
    vocabulary = tokenizer.get_vocab().items()
    candidates = [i for token, i in vocabulary if any(mark in token for mark in marks)]
    return sorted(i for i in candidates if "\n" in tokenizer.decode([i]))


def newline_id(engine: SpectrModel) -> int:
    """The token that stands between two lines of an answer.

    Raises ValueError where the base has none.
    """
    ids = engine.tokenizer("\n", add_special_tokens=False)["input_ids"]
    if not ids or ids[-1] not in newline_ids(engine.tokenizer):
        raise ValueError(
            f"{engine.base.name}: its tokenizer has no token that ends a line; one was needed "
            "between the answers of a message; leave such messages out (num_pairs, num_triples: 0)"
        )
    return int(ids[-1])


@torch.inference_mode()
def segment_answers(
    engine: SpectrModel,
    messages: Sequence[Segments],
    *,
    batch_size: int = 32,
    description: str = "segment oracle",
) -> list[list[str]]:
    """What each part of each message is answered, greedily, in batches of similar length."""
    end_ids, newlines = end_token_ids(engine.base), newline_ids(engine.tokenizer)
    newline = newline_id(engine)
    pad, decode = pad_token_id(engine.base, end_ids), engine.tokenizer.decode
    order = sorted(range(len(messages)), key=lambda i: len(messages[i].ids))
    answers: list[list[str]] = [[] for _ in messages]
    with tqdm(total=len(messages), desc=description, unit="text", leave=False) as bar:
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            rows = [messages[i] for i in numbers]
            plan = SegmentPlan(
                rows,
                newline_ids=newlines,
                newline_id=newline,
                end_ids=sorted(end_ids),
                device=engine.base.device,
            )
            with routed(plan):
                output = continue_rows(
                    engine.model,
                    [row.ids for row in rows],
                    pad,
                    max_new_tokens=max(sum(row.caps) + len(row.caps) for row in rows),
                    logits_processor=LogitsProcessorList([plan]),
                    eos_token_id=sorted(end_ids) or None,
                )
            owners = plan.owners_of_answer(output.shape[1])
            for i, ids, of_token in zip(numbers, output, owners, strict=True):
                answers[i] = [
                    str(decode(ids[of_token == part], skip_special_tokens=True)).strip()
                    for part in range(len(messages[i].experts))
                ]
            bar.update(len(rows))
    return answers
