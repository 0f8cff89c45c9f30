"""The experts of a few linear layers, stacked: what routing computes with.

Layers that read the same input (q, k and v; gate and up) share one bank, so that one product with
the stacked A* scores the experts of all of them. Axes: R rows, T tokens, P projections (the layers
of the bank), E experts, r rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spectr_demo.spectral import Aligned, common_directions


class Mixed(NamedTuple):
    """What the layers of a bank multiply by B*: for each of them values (R * T, K * r) of the
    experts that are chosen, and their places in the bank (R * T, K); None where they are all of
    the E experts."""

    values: tuple[Tensor, ...]
    experts: tuple[Tensor, ...] | None

    @classmethod
    def of(cls, values: Tensor, experts: Tensor | None) -> "Mixed":
        """values: (R, T, P, K, r). experts: (R, T, P, K), or None."""
        by_layer = values.flatten(0, 1).flatten(-2).unbind(1)
        return cls(by_layer, None if experts is None else experts.flatten(0, 1).unbind(1))


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertBank:
    """The experts that touch all of a bank's layers; smaller ranks padded with zero rows.

    paths: (P,) of the layers, in the order in which the model runs them; layers, projections: their
    places in the model. expert_ids: (E,) int64, places in the library's list of names.
    A: (P * E * r, D_in), B: for each layer (E * r, D_out), the transposed B*, in the bank's dtype.
    singular_values: (P, E, r) float32.
    common: what most of the experts read alike in each layer, see `spectral.common_directions`:
    (P, k, E * r) and (P, E * r, k), padded with zeros; None where there is nothing.
    """

    paths: tuple[str, ...]
    expert_ids: Tensor
    A: Tensor
    B: tuple[Tensor, ...]
    singular_values: Tensor
    common: tuple[Tensor, Tensor] | None = None

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
        by_layer = list(zip(*experts.values(), strict=True))  # (P, E)
        A = [_pad_rows(e.A, rank) for layer in by_layer for e in layer]
        B = [torch.cat([_pad_rows(e.B.mT, rank) for e in layer]) for layer in by_layer]
        S = [b.unflatten(0, (-1, rank)).norm(dim=-1) for b in B]
        return cls(
            paths=tuple(paths),
            expert_ids=torch.tensor(list(experts)),
            A=torch.cat(A).to(device, dtype),
            B=tuple(b.to(device, dtype) for b in B),
            singular_values=torch.stack(S).to(device),
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """(P,) numbers of the decoder layers: 3 of `model.layers.3.self_attn.q_proj`."""
        parts = [path.split(".") for path in self.paths]
        return tuple(next((int(p) for p in path if p.isdigit()), 0) for path in parts)

    @property
    def projections(self) -> tuple[str, ...]:
        """(P,) names such as `q_proj`."""
        return tuple(path.rpartition(".")[2] for path in self.paths)

    def factors(self, expert: int, place: int, rank: int) -> Aligned:
        """The first `rank` directions of one expert at one layer, as views."""
        P, E, r = self.singular_values.shape
        A, B = self.A.view(P, E, r, -1)[place, expert], self.B[place].view(E, r, -1)[expert]
        return Aligned(A[:rank], B[:rank].mT)

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
                common=self.common and (self.common[0][p : p + 1], self.common[1][p : p + 1]),
            )
            for p, path in enumerate(self.paths)
        ]

    def only(self, expert_ids: Sequence[int]) -> "ExpertBank | None":
        """A copy with these experts alone, without what they share; None if it has none of them."""
        places = [e for e, i in enumerate(self.expert_ids.tolist()) if i in expert_ids]
        if not places:
            return None
        P, E, r = self.singular_values.shape
        return replace(
            self,
            expert_ids=self.expert_ids[places],
            A=self.A.view(P, E, r, -1)[:, places].flatten(0, 2),
            B=tuple(B.view(E, r, -1)[places].flatten(0, 1) for B in self.B),
            singular_values=self.singular_values[:, places],
            common=None,
        )

    def with_common_directions(self) -> "ExpertBank":
        """The same bank, which knows what its experts have in common."""
        layers = self.A.float().unflatten(0, self.singular_values.shape)
        found = [common_directions(A) for A in layers]
        k = max((read.shape[0] for read, _ in filter(None, found)), default=0)
        if k == 0:
            return self
        P, E, r = self.singular_values.shape
        read, answer = self.A.new_zeros(P, k, E * r).float(), self.A.new_zeros(P, E * r, k).float()
        for p, factors in enumerate(found):
            if factors is not None:
                num = factors[0].shape[0]
                read[p, :num], answer[p, :, :num] = factors
        return replace(self, common=(read, answer))

    @cached_property
    def _shape(self) -> tuple[int, int, int]:
        P, E, r = self.singular_values.shape
        return P, E, r

    def project(self, x: Tensor) -> Tensor:
        """`z = A* x` for every expert: (R, T, P, E, r) from (R, T, D_in), in the bank's dtype."""
        z = x.to(self.A.dtype).flatten(0, 1) @ self.A.mT
        return z.view(*x.shape[:2], *self._shape)

    def project_first(self, x: Tensor) -> Tensor:
        """The first entry of `z` alone, (R, T, P, E): the token along each expert's arrow."""
        P, E, r = self._shape
        z = x.to(self.A.dtype).flatten(0, 1) @ self.A[::r].mT
        return z.view(*x.shape[:2], P, E)

    def project_chosen(self, x: Tensor, experts: Tensor) -> Tensor:
        """`z` of a few experts for each token: (R, T, P, F, r) from their places (R, T, P, F)."""
        P, E, r = self._shape
        places = experts + E * torch.arange(P, device=experts.device)[:, None]
        A = self.A.view(P * E, -1).index_select(0, places.flatten())
        x = x.to(A.dtype).flatten(0, 1)
        z = A.view(len(x), -1, x.shape[-1]) @ x.unsqueeze(-1)  # (R * T, P * F * r, 1)
        return z.view(*experts.shape, r)

    def distinct(self, z: Tensor) -> Tensor:
        """(R, T, P, E, r) float32 from z: what is left of it without the common directions."""
        z = z.float()
        if self.common is None:
            return z
        read, answer = self.common
        by_layer = z.flatten(-2).flatten(0, 1).transpose(0, 1)  # (P, R * T, E * r)
        left = torch.baddbmm(by_layer, by_layer @ read.mT, answer.mT, alpha=-1)
        return left.transpose(0, 1).reshape(z.shape)

    def without_common(self, x: Tensor) -> Tensor:
        """`(I - V^T V) x`, the input without the common directions; (..., P, D_in) from
        (..., D_in)."""
        x = x.unsqueeze(-2)
        if self.common is None:
            return x.expand(*x.shape[:-2], len(self.paths), -1)
        read, _ = self.common
        V = read @ self.A.float().unflatten(0, (len(self.paths), -1))  # (P, k, D_in)
        shared = torch.einsum("...pd,pkd->...pk", x.float().expand(*x.shape[:-2], len(V), -1), V)
        return x - torch.einsum("...pk,pkd->...pd", shared, V).to(x.dtype)

    def add_(self, y: Tensor, mixed: Mixed, place: int) -> Tensor:
        """`y += sum_e B*_e mixed_e` at one layer, in place: y (R, T, D_out)."""
        values, B = mixed.values[place], self.B[place]
        if mixed.experts is not None:
            chosen = B.view(len(self.expert_ids), -1).index_select(
                0, mixed.experts[place].flatten()
            )
            B = chosen.view(*values.shape, B.shape[-1])  # (R * T, K * r, D_out)
            values = values.unsqueeze(1)
        if y.dtype != B.dtype:
            return y.add_((values @ B).view_as(y))
        rows = y.view(*values.shape[:-1], -1)
        (rows.addmm_ if B.dim() == 2 else rows.baddbmm_)(values, B)
        return y


def _pad_rows(factor: Tensor, rank: int) -> Tensor:
    return nn.functional.pad(factor, (0, 0, 0, rank - factor.shape[0]))
