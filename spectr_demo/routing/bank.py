"""The experts of a few linear layers, stacked: what routing computes with.

Layers that read the same input (q, k and v; gate and up) share one bank, so that one product with
the stacked A* scores the experts of all of them. Axes: R rows, T tokens, P projections (the layers
of the bank), E experts, r rank.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import linear

from spectr_demo.routing.spectr import Aligned

Zeros = Callable[..., Tensor]
_NUMBER = re.compile(r"\.(\d+)\.")  # of a decoder layer: the first one that something is inside of
_TOKENS_AT_ONCE = 32
_SHORTER = 2**-8  # so short is a projection in float16, while it is multiplied
# Measured on CPUs (docs/log.md). Copying an expert's factor for a token, and multiplying by the
# copy, takes as long as multiplying the token by 2 experts. The calls around the copies take as
# long as 16 more. A product with many tokens is up to 16 times as fast for each.
_COPY, _CALLS, _REUSE = 2, 16, 16


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertBank:
    """The experts that touch all of a bank's layers; smaller ranks padded with zero rows.

    paths: (P,) of the layers, in the order in which the model runs them; layers, projections: their
    places in the model. expert_ids: (E,) int64, places in the library's list of names.
    A: (P * E * r, D_in), B: for each layer (E * r, D_out), the transposed B*, in the bank's dtype.
    singular_values: (P, E, r) float32.
    run: layers that run several times in a pass have a bank for each time, with the same factors;
    0 is the first.
    """

    paths: tuple[str, ...]
    expert_ids: Tensor
    A: Tensor
    B: tuple[Tensor, ...]
    singular_values: Tensor
    run: int = 0

    @classmethod
    def empty(
        cls,
        paths: Sequence[str],
        expert_ids: Sequence[int],
        rank: int,
        shapes: Sequence[tuple[int, int]],
        *,
        device: torch.device,
        dtype: torch.dtype,
        zeros: Zeros = torch.zeros,
    ) -> "ExpertBank":
        """Room for experts up to this rank. shapes: (D_out, D_in) of each layer. zeros: makes the
        tensors, like `torch.zeros`."""
        num_rows, (_, D_in) = len(expert_ids) * rank, shapes[0]
        return cls(
            paths=tuple(paths),
            expert_ids=torch.tensor(expert_ids),
            A=zeros((len(paths) * num_rows, D_in), dtype=dtype, device=device),
            B=tuple(zeros((num_rows, D_out), dtype=dtype, device=device) for D_out, _ in shapes),
            singular_values=torch.zeros(len(paths), len(expert_ids), rank, device=device),
        )

    @classmethod
    def from_aligned(
        cls,
        paths: Sequence[str],
        experts: Mapping[int, Sequence[Aligned]],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> "ExpertBank":
        """experts: by expert id, its factors at each of the layers."""
        rank = max(layer.A.shape[0] for expert in experts.values() for layer in expert)
        shapes = [(e.B.shape[0], e.A.shape[1]) for e in next(iter(experts.values()))]
        bank = cls.empty(paths, list(experts), rank, shapes, device=device, dtype=dtype)
        for expert, layers in enumerate(experts.values()):
            bank.put_(expert, layers)
        return bank

    def put_(self, expert: int, layers: Sequence[Aligned]) -> None:
        """Write the factors of one expert at each of the layers to its place."""
        P, E, r = self._shape
        A = self.A.view(P, E, r, -1)
        for p, layer in enumerate(layers):
            rank = layer.A.shape[0]
            A[p, expert, :rank] = layer.A
            self.B[p].view(E, r, -1)[expert, :rank] = layer.B.mT
            self.singular_values[p, expert, :rank] = layer.singular_values

    def copy_(self, places: Tensor, other: "ExpertBank", others: Tensor) -> None:
        """Take over experts of another bank, at the layers that both have.

        places, others: (N,) int64 on the CPU, where they are here and there. Their ranks fit here.
        """
        (P, E, r), (Q, F, s) = self._shape, other._shape
        A, A_there, rank = self.A.view(P, E, r, -1), other.A.view(Q, F, s, -1), min(r, s)
        places = places.to(self.A.device)
        for p, path in enumerate(self.paths):
            if path not in other.paths:
                continue
            q = other.paths.index(path)
            for here, there in (
                (A[p], A_there[q]),
                (self.B[p].view(E, r, -1), other.B[q].view(F, s, -1)),
                (self.singular_values[p], other.singular_values[q]),
            ):
                here[places, :rank] = there[others.to(there.device), :rank].to(here)

    @property
    def layers(self) -> tuple[int, ...]:
        """(P,) numbers of the decoder layers: 3 of `model.layers.3.self_attn.q_proj`, 0 of a path
        without one."""
        found = map(_NUMBER.search, self.paths)
        return tuple(0 if number is None else int(number[1]) for number in found)

    @property
    def projections(self) -> tuple[str, ...]:
        """(P,) paths without that number, such as `model.layers.*.self_attn.q_proj`: what tells
        apart the projections of a decoder layer."""
        run = f" (run {self.run + 1})" if self.run else ""
        return tuple(_NUMBER.sub(".*.", path, count=1) + run for path in self.paths)

    def factors(self, expert: int, place: int, rank: int) -> Aligned:
        """The first `rank` directions of one expert at one layer, float32 on the CPU: views where
        the bank is."""
        P, E, r = self._shape
        A, B = self.A.view(P, E, r, -1)[place, expert], self.B[place].view(E, r, -1)[expert]
        A, B = (factor[:rank].to("cpu", torch.float32) for factor in (A, B))
        return Aligned(A, B.mT)

    def split(self) -> "list[ExpertBank]":
        """A bank for each layer alone; views of the same tensors."""
        A = self.A.chunk(len(self.paths))
        return [
            replace(
                self,
                paths=(path,),
                A=A[p],
                B=(self.B[p],),
                singular_values=self.singular_values[p : p + 1],
            )
            for p, path in enumerate(self.paths)
        ]

    def folded(self, weights: Tensor, *, is_merged: bool) -> "ExpertBank | None":
        """A bank of the experts whose weight (E,) is not 0, with the weights in the factors; None
        if there is none. is_merged: both factors are summed, to one expert in the place of all."""
        used = weights.nonzero().flatten()  # on the CPU, as the weights and the ids are
        if len(used) == 0:
            return None
        places = used.to(self.A.device)
        P, E, r = self._shape
        scale = weights.to(self.A)[places, None, None]
        A = self.A.view(P, E, r, -1)[:, places] * scale
        B = [B.view(E, r, -1)[places] for B in self.B]
        if is_merged:
            A, B = A.sum(1, keepdim=True), [(b * scale).sum(0, keepdim=True) for b in B]
        return replace(
            self,
            expert_ids=self.expert_ids[used][: A.shape[1]],
            A=A.flatten(0, 2),
            B=tuple(b.flatten(0, 1) for b in B),
            singular_values=self.singular_values[:, places][:, : A.shape[1]],
        )

    @cached_property
    def num_experts(self) -> int:
        return len(self.expert_ids)

    @cached_property
    def _shape(self) -> tuple[int, int, int]:
        P, E, r = self.singular_values.shape
        return P, E, r

    def project(self, x: Tensor) -> Tensor:
        """`z = A* x` for every expert: (..., P, E, r) from (..., D_in), in the bank's dtype, or
        float32 where that is float16."""
        return _product(x, self.A).view(*x.shape[:-1], *self._shape)

    def project_first(self, x: Tensor) -> Tensor:
        """The first entry of `z` alone, (..., P, E): the token along each expert's arrow."""
        z = _product(x, self.A[:: self._shape[-1]])
        return z.view(*x.shape[:-1], *self._shape[:2])

    def project_chosen(self, x: Tensor, experts: Tensor) -> Tensor:
        """`z` of a few experts for each token: (R, T, P, F, r) from their places (R, T, P, F)."""
        P, E, r = self._shape
        places = (experts + E * torch.arange(P, device=experts.device)[:, None]).flatten(0, 1)
        x, A = x.flatten(0, 1), self.A.view(P * E, -1)
        z = [
            _rows(A, some.flatten(1), x.shape[1]) @ tokens.to(_compute_dtype(A)).unsqueeze(-1)
            for some, tokens in zip(_parts(places), _parts(x), strict=True)
        ]
        return torch.cat(z).view(*experts.shape, r)

    def copying_pays(self, num_chosen: int, num_tokens: int) -> bool:
        """Whether copies of what each token chose are faster than a product with all experts.

        On a GPU they are not: a product with 4,096 experts takes no longer there than the calls
        that copy (`benchmarks/copies.py`).
        """
        if self.A.device.type != "cpu":
            return False
        copies = _COPY * num_chosen * num_tokens + _CALLS
        return copies < self.num_experts * max(1, num_tokens / _REUSE)


class Mixed:
    """What the layers of a bank multiply by B*."""

    def __init__(self, bank: ExpertBank, values: Tensor, experts: Tensor | None) -> None:
        """values: (R, T, P, K, r), of the experts that are chosen. experts: (R, T, P, K), their
        places in the bank; None where they are all of the E experts."""
        self._bank = bank
        self._values = values.flatten(0, 1).flatten(-2).unbind(1)  # (R * T, K * r) of each layer
        self._experts = None if experts is None else experts.flatten(0, 1).unbind(1)

    def add_(self, y: Tensor, place: int) -> Tensor:
        """`y += sum_e B*_e values_e` at one layer, in place: y (R, T, D_out)."""
        values, B = self._values[place], self._bank.B[place]
        rows = y.view(-1, y.shape[-1])
        if self._experts is None:
            return _add_(rows, values, B).view_as(y)
        B = B.view(self._bank.num_experts, -1)
        parts = (
            _parts(rows.unsqueeze(1)),
            _parts(values.unsqueeze(1)),
            _parts(self._experts[place]),
        )
        for some, value, experts in zip(*parts, strict=True):
            _add_(some, value, _rows(B, experts, y.shape[-1]))
        return y


def _product(x: Tensor, A: Tensor) -> Tensor:
    """`x A^T`: (..., n) from (..., D_in) and (n, D_in), in A's dtype, or float32 of float16.

    The rows of A have length 1, so a product is as long as x. Where its entries are near 1e4, as
    in some bases, that is more than float16 can hold.
    """
    x = x.to(A.dtype)
    if A.dtype != torch.float16:
        return linear(x, A)  # in 16 bits faster than a product with A.mT
    if A.is_cpu:
        return linear(x.float(), A.float())
    wide = torch.mm(x.flatten(0, -2), A.mT, out_dtype=torch.float32)
    return wide.view(*x.shape[:-1], len(A))


def _add_(y: Tensor, values: Tensor, B: Tensor) -> Tensor:
    """`y += values B` in place, of matrices or stacks of them, whatever their dtypes."""
    if y.dtype == values.dtype == B.dtype:
        return (y.addmm_ if y.dim() == 2 else y.baddbmm_)(values, B)
    if B.dtype == torch.float16:
        return y.add_((values * _SHORTER).half() @ B, alpha=1 / _SHORTER)
    return y.add_(values.to(B.dtype) @ B)


def _rows(factors: Tensor, places: Tensor, width: int) -> Tensor:
    """Copies (N, K * r, width) of the rows of chosen experts (N, K) from (E, r * width)."""
    rows = factors.index_select(0, places.flatten()).to(_compute_dtype(factors))
    return rows.view(len(places), -1, width)


def _parts(values: Tensor) -> tuple[Tensor, ...]:
    """Of a few tokens each, so that copies of what each has chosen stay small."""
    is_few = values.shape[0] <= _TOKENS_AT_ONCE
    return (values,) if is_few else values.split(_TOKENS_AT_ONCE)


def _compute_dtype(factors: Tensor) -> torch.dtype:
    """Products with copies of a few rows: on a CPU they are fastest in float32."""
    return torch.float32 if factors.device.type == "cpu" else factors.dtype
