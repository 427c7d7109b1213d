"""The factored Jacobian of an embedding, `J[k,n] = sum_t e(index[n,t]) (x) g[k,n,t]`: a few rows of a large table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lapkit.curvature.jacobians.inner_products import WRITTEN, over_pairs
from lapkit.curvature.jacobians.jacobian import DenseJacobian, Jacobian, LayerJacobian
from lapkit.curvature.memory import chunk_length


@dataclass(frozen=True, eq=False)
class EmbeddingJacobian(LayerJacobian):
    """A table of V rows and D columns of which each example reads T rows, perhaps one of them several times.

    It is an `OuterProduct` whose inputs are unit vectors, which are never written out: neither a `(K, N, V D)` tensor
    nor a V x V matrix is made where a contraction does.

    Args:
        index: which rows were read, `(N, T)`, -1 for none (padding).
        g: what came back, `(K, N, T, D)`.
        rows: the number V of rows of the table.
        budget: bytes that an intermediate may take.
    """

    index: Tensor
    g: Tensor
    rows: int
    budget: int = 2**28

    transposed = True  # stored as inputs x outputs

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(K, N, P)`."""
        return self.g.shape[0], self.g.shape[1], self.rows * self.g.shape[3]

    @cached_property
    def places(self) -> Tensor:
        """Rows to read or write, `(N, T)`; padding counts as the first, with nothing to add to it."""
        return self.index.clamp_min(0)

    @cached_property
    def summed(self) -> Tensor:
        """The cotangents with those of a repeated token added up at one of its places, zero at the others and padding.

        A token's row is one parameter: what comes back to it is summed before anything is squared.
        """
        ordered, order = self.index.sort(dim=1, stable=True)
        starts = torch.ones_like(ordered, dtype=torch.bool)
        starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        g = torch.where((self.index < 0)[..., None], 0, self.g)
        if bool(starts.all()):
            return g
        first = torch.where(starts, torch.arange(ordered.shape[1], device=order.device), 0).cummax(1).values
        target = torch.empty_like(order).scatter_(1, order, order.gather(1, first))  # (N, T), a place of the same token
        target += ordered.shape[1] * torch.arange(len(order), device=order.device)[:, None]
        flat = g.flatten(1, 2)
        return torch.zeros_like(flat).index_add_(1, target.flatten(), flat).view_as(g)

    def in_rows(self, values: Tensor) -> Tensor:
        """Values `(N, T, D)` added up in the rows that were read, `(V D,)`."""
        table = values.new_zeros(self.rows, values.shape[-1])
        return table.index_add_(0, self.places.flatten(), values.flatten(0, 1)).flatten()

    def to_dense(self) -> Tensor:
        """See `Jacobian.to_dense`."""
        columns, examples, _ = self.shape
        dense = self.g.new_zeros(columns, examples * self.rows, self.g.shape[3])
        place = self.places + self.rows * torch.arange(examples, device=self.index.device)[:, None]
        return dense.index_add_(1, place.flatten(), self.summed.flatten(1, 2)).view(self.shape)

    def square_sum(self) -> Tensor:
        """See `Jacobian.square_sum`."""
        return self.in_rows(self.summed.square().sum(0))

    def square_norms(self) -> Tensor:
        """See `Jacobian.square_norms`."""
        return self.summed.square().sum((2, 3))

    def weighted_gram(self, weights: Tensor) -> Tensor:
        """See `Jacobian.weighted_gram`; only the rows that an example reads are touched."""
        w = weights.unflatten(0, (self.rows, -1))[self.places]  # (N, T, D)
        half = self.summed.transpose(0, 1)  # (N, K, T, D)
        return (half * w[:, None]).flatten(2) @ half.flatten(2).mT

    def _gram(self, other: Jacobian | None) -> Tensor:
        """Over the rows that both have read, or over pairs of positions that read the same one: what is less work."""
        second = self if other is None else other
        if not isinstance(second, EmbeddingJacobian):
            return super()._gram(other)
        (columns, examples, _), (others, paired, _) = self.shape, second.shape
        rows = self.places.unique()  # (U,)
        rows = rows if other is None else rows[torch.isin(rows, second.places)]
        products, width = columns * examples * others * paired, self.g.shape[3]
        by_pairs = self.g.shape[2] * second.g.shape[2] * products * (width + WRITTEN)
        by_rows = len(rows) * width * (products + WRITTEN * (columns * examples + others * paired))
        if by_pairs >= by_rows:
            return self._gram_of_rows(rows, None if other is None else second)

        def inner(one: slice, two: slice) -> Tensor:
            return (self.index[one, :, None, None] == second.index[two])[None]

        g, h = (j.summed[:, :, :, None] for j in (self, second))
        return over_pairs(g, None if other is None else h, inner, self.budget)

    def _gram_of_rows(self, rows: Tensor, other: EmbeddingJacobian | None) -> Tensor:
        """From the expanded Jacobians in some rows of the table, as many at a time as fit into the budget."""
        second = self if other is None else other
        mine, theirs = (j.shape[0] * j.shape[1] for j in (self, second))
        total = self.g.new_zeros(mine, theirs)
        each = 2 * (mine + theirs) * self.g.shape[3] * self.g.element_size()
        for part in rows.split(chunk_length(len(rows), each, self.budget)) if len(rows) else ():
            expanded = self._in(part)
            total += expanded @ (expanded if other is None else other._in(part)).T
        return total.unflatten(1, second.shape[:2]).unflatten(0, self.shape[:2])

    def _in(self, rows: Tensor) -> Tensor:
        """The expanded Jacobian in some rows of the table, given in ascending order, `(K N, U D)`."""
        place = torch.searchsorted(rows, self.places).clamp_max(len(rows) - 1)
        index = torch.where(rows[place] == self.places, place, -1)
        return EmbeddingJacobian(index, self.summed, len(rows)).to_dense().flatten(0, 1)

    def project(self, vectors: Tensor) -> Tensor:
        """See `Jacobian.project`."""
        table = vectors.unflatten(0, (self.rows, -1))
        each = self.g.shape[2:].numel() * vectors.shape[1] * self.g.element_size()
        step = chunk_length(len(self.index), each, self.budget)
        pieces = zip(self.places.split(step), self.summed.split(step, dim=1), strict=True)
        return torch.cat([torch.einsum("kntd,ntdr->knr", g, table[p]) for p, g in pieces], dim=1)

    def pull_back(self, cotangent: Tensor) -> Tensor:
        """See `Jacobian.pull_back`."""
        return self.in_rows(torch.einsum("kn,kntd->ntd", cotangent, self.summed))

    def output_moment(self) -> Tensor:
        """`B = sum g g^T` over columns, examples and positions, `(1, D, D)`, as `OuterProduct` has it."""
        g = torch.where((self.index < 0)[..., None], 0, self.g).flatten(0, 2)
        return (g.T @ g)[None]

    def sole_cotangent(self) -> Tensor | None:
        """None: B is shared with no other parameter."""
        return None

    def input_moment(self, weights: Tensor | None = None) -> tuple[Tensor, float]:
        """How often each row was read, `(1, V)`: the diagonal of A, which has no other entries."""
        read = self.index >= 0
        ones = read.to(self.g.dtype) if weights is None else read * weights.to(self.g)[:, None]
        counts = ones.new_zeros(self.rows).index_add_(0, self.places.flatten(), ones.flatten())
        return counts[None], int(read.sum()) if weights is None else float(ones.sum())

    def rotate(self, left: Tensor | None, right: Tensor) -> LayerJacobian:
        """See `LayerJacobian.rotate`; expanded where the basis mixes rows."""
        if left is None:
            return EmbeddingJacobian(self.index, self.g @ right[0], self.rows, self.budget)
        return DenseJacobian(self.to_dense()).rotate(left, right)

    def select(self, part: slice) -> EmbeddingJacobian:
        """See `LayerJacobian.select`."""
        return EmbeddingJacobian(self.index[part], self.g[:, part], self.rows, self.budget)

    def split(self, sizes: Sequence[int]) -> Iterator[Jacobian]:
        """Itself: one parameter is not cut.

        Raises:
            ValueError: if another size is asked for.
        """
        if list(sizes) != [self.shape[2]]:
            raise ValueError(f"A table of {self.shape[2]} entries cannot be cut into {list(sizes)}.")
        yield self


def read_together(parts: Sequence[EmbeddingJacobian]) -> EmbeddingJacobian:
    """Several uses of one table as one, tokens side by side: sums are taken before anything is squared."""
    first = parts[0]
    return EmbeddingJacobian(
        torch.cat([p.index for p in parts], dim=1), torch.cat([p.g for p in parts], dim=2), first.rows, first.budget
    )
