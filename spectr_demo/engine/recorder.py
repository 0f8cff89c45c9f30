"""Keeps what each layer chose while a run goes on, as tensors; `tracing` makes a trace of it.

Axes: R rows, T tokens, L layers, P projections, K selected experts.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.gpu import operators
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.trace import NOT_ROUTED

Choice = tuple[Tensor, Tensor, Tensor]  # expert places in the bank, weights, scores: (T, P, K) each


class Late(Protocol):
    """Who has choices that are not handed over yet. It must not know the recorder: a circle would
    keep a run's tensors until Python looks for circles."""

    def hand_over(self, recorder: "Recorder", bank: ExpertBank) -> None:
        """Add them, in the order of reading."""


class Recorder:
    """Collects choices and hidden states; nothing waits for a GPU while the model runs.

    What one more token gives on a GPU is written to slots, which stay at their addresses. Which one
    is next is written there too.

    num_slots: tokens that have one. late: of each bank, who is asked before its choices are read.
    num_in_slots: tokens that were written to slots.
    """

    def __init__(self, num_slots: int = 1) -> None:
        self.num_slots = num_slots
        self.num_in_slots = 0
        self.late: dict[ExpertBank, list[Late]] = defaultdict(list)
        self._choices: dict[tuple[int, ExpertBank], list[Choice]] = defaultdict(list)
        self._hidden: list[Tensor] = []
        self._hidden_slots: Tensor | None = None  # (R, S, D)
        self._step: Tensor | None = None
        self._num_read = 0

    def step(self, device: torch.device) -> Tensor:
        """(1,) int64 on the device: the slot of the next token."""
        if self._step is None:
            self._step = torch.zeros(1, dtype=torch.long, device=device)
        return self._step

    def begin_pass(self, num_tokens: int, device: torch.device) -> None:
        """That many tokens are read next.

        Several of them are a text from its start: the first pass, or one of a base that keeps no
        keys and values, and reads all of it again. What it recorded before is then forgotten.
        """
        if self._num_read and num_tokens > 1:
            for bank in self.late:
                self.collect(bank)
            self._choices.clear()
            self._hidden.clear()
            self._num_read = 0
        self._num_read += num_tokens
        self.num_in_slots += num_tokens == 1 and operators.serve(device)

    def forget_token(self) -> None:
        """The pass of one more token, which was begun last, did not run."""
        self._num_read -= 1
        self.num_in_slots -= 1

    def add_choice(self, bank: ExpertBank, row: int, choice: Choice) -> None:
        """Of one row, for the next tokens."""
        self._choices[row, bank].append(choice)

    def add_hidden(self, hidden: Tensor) -> None:
        """hidden: (R, T, D), the decoder's last hidden states for the tokens of this pass, which
        ends here."""
        if hidden.shape[1] > 1 or not operators.serve(hidden.device):
            self._hidden.append(hidden)
            return
        if self._hidden_slots is None:
            R, _, D = hidden.shape
            self._hidden_slots = hidden.new_empty(R, self.num_slots, D)
        step = self.step(hidden.device)
        self._hidden_slots.index_copy_(1, step, hidden)
        step.add_(1)

    def hidden(self) -> Tensor:
        """(R, T, D) over all tokens read so far."""
        self._hidden = [torch.cat(self._hidden, dim=1)]
        read = self._hidden[0]
        if self._hidden_slots is not None:
            read = torch.cat([read, self._hidden_slots[:, : self.num_in_slots]], dim=1)
        self._check("the decoder", read.shape[1])
        return read

    def collect(self, bank: ExpertBank) -> None:
        """Have what is late handed over."""
        for late in self.late[bank]:
            late.hand_over(self, bank)

    def settle(self) -> None:
        """Have all that is late handed over, and ask no more: another plan writes from now on."""
        for bank in self.late:
            self.collect(bank)
        self.late.clear()

    def choices(self, bank: ExpertBank, row: int) -> Choice:
        """Those of one row over all tokens read so far."""
        self.collect(bank)
        passes = self._choices[row, bank]
        experts, weights, scores = map(torch.cat, zip(*passes, strict=True))
        self._choices[row, bank] = [(experts, weights, scores)]  # need not be joined again
        return experts, weights, scores

    def routing(
        self, library: ExpertLibrary, row: int, num_tokens: int, top_k: int, num_padding: int = 0
    ) -> tuple[NDArray[np.int16], NDArray[np.float32], NDArray[np.float32]]:
        """A scored row's experts (ids of the library), weights and scores: (T, L, P, K) arrays.

        num_padding: tokens before the row's own, which are left out. The last of the `num_tokens`
        tokens was written but never read: it has no routing.
        """
        shape = (num_tokens, library.num_layers, len(library.projections), top_k)
        experts = np.full(shape, NOT_ROUTED, np.int16)
        weights = np.zeros(shape, np.float32)
        scores = np.full(shape, np.nan, np.float32)
        for bank in library.banks:
            choices = self.choices(bank, row)
            self._check(bank.paths[0], len(choices[0]))
            chosen, weight, score = (
                part[num_padding:][: num_tokens - 1].cpu().numpy() for part in choices
            )
            T, _, K = chosen.shape
            chosen = np.where(weight > 0, bank.expert_ids.numpy()[chosen], NOT_ROUTED)
            score = np.where(weight > 0, score, np.nan)
            for p, (layer, projection) in enumerate(zip(*library.places(bank), strict=True)):
                place = np.s_[:T, layer, projection, :K]
                experts[place] = chosen[:, p]
                weights[place] = np.where(weight[:, p] > 0, weight[:, p], 0)  # NaN is none, too
                scores[place] = score[:, p]
        return experts, weights, scores

    def _check(self, what: str, num_tokens: int) -> None:
        """Whether something was recorded once for each token."""
        if num_tokens != self._num_read:
            raise ValueError(
                f"{what} read {num_tokens} tokens where the base was given {self._num_read}; for a "
                "trace each token must be read once: run without one (`record=False`)"
            )


class SharedRecorder(Recorder):
    """Of a batch in which several runs go on: what it is given belongs to their recorders."""

    def __init__(
        self,
        recorders: Sequence[Recorder | None],
        num_rows: Sequence[int],
        banks: Sequence[ExpertBank],
    ) -> None:
        """recorders, num_rows: of each run, in the order of their rows; None is not recorded.
        banks: of the library."""
        super().__init__()
        # Weakly, since they ask this one for what is late: see `Late`.
        self._recorders = WeakValueDictionary({i: r for i, r in enumerate(recorders) if r})
        self._num_rows = list(num_rows)
        self._places = [(run, row) for run, num in enumerate(num_rows) for row in range(num)]
        for recorder in self._recorders.values():
            for bank in banks:
                recorder.late[bank].append(self)

    def hand_over(self, recorder: Recorder, bank: ExpertBank) -> None:
        """As who is late: to all runs, whose rows are written together."""
        self.collect(bank)

    def begin_pass(self, num_tokens: int, device: torch.device) -> None:
        for recorder in self._recorders.values():
            recorder.begin_pass(num_tokens, device)

    def add_choice(self, bank: ExpertBank, row: int, choice: Choice) -> None:
        run, own_row = self._places[row]
        if recorder := self._recorders.get(run):
            recorder.add_choice(bank, own_row, choice)

    def add_hidden(self, hidden: Tensor) -> None:
        for run, own in enumerate(hidden.split(self._num_rows)):
            if recorder := self._recorders.get(run):
                recorder.add_hidden(own)
