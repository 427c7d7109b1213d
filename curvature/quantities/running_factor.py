"""A sum `V V^T` over batches by as few columns as are wanted, to which factored Jacobians are added unexpanded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import final

import torch
from torch import Tensor

from lapkit.curvature.jacobians.conversion import converted
from lapkit.curvature.jacobians.jacobian import LayerJacobian
from lapkit.curvature.jacobians.network import NetworkJacobian
from lapkit.curvature.operators.eigenvectors import symmetric_eigh
from lapkit.curvature.operators.graded import pivoted_cholesky
from lapkit.curvature.operators.low_rank import compressed, gram
from lapkit.curvature.quantities.cross import add_blocks, mirrored

SIDE = 4096  # of the largest matrix whose eigenvectors are computed for a single batch; they cost its cube


@final
class RunningFactor:
    """The sum of `J^T J` over batches: its columns, the best ones of them, or the whole matrix, whatever is smallest.

    - Without a rank, columns are kept side by side until there are more than weights; then the matrix takes over.
    - With a rank k, columns beyond 2 k are compressed to k. A batch of more than k columns is never expanded: the
      eigenvectors of the Gram matrix of `[U, V]`, `U` the columns so far and `V = J^T`, give the new ones,
      `U c_1 + V c_2`, where `U^T V` is a projection and `V c_2` pulls k cotangents back.
    - A rank of half of the weights or more saves nothing, and the matrix is kept, too.

    The matrix is summed in float64: an entry of H has the square of a column's range, and in float32 what small
    columns say would be lost in the rounding of the large ones.

    Args:
        sizes: numbers of weights of the parameters, P together.
        rank: how many columns to keep; all by default.
        limit: bytes that a matrix of a batch's inner products may take; more examples are added in several steps.
        like: of the floating type and device of the columns.
    """

    def __init__(self, sizes: Sequence[int], rank: int | None, limit: int, like: Tensor) -> None:
        self.sizes, self.rank, self.limit, self.like = tuple(sizes), rank, limit, like
        self.size = sum(sizes)
        self.pieces: list[Tensor] = []
        self.matrix: Tensor | None = None  # its blocks on and above the diagonal
        self.trace = like.new_zeros((), dtype=torch.float64)

    @property
    def held(self) -> int:
        """How many columns are kept."""
        return sum(piece.shape[1] for piece in self.pieces)

    def numbers(self, added: int) -> int:
        """How many numbers of the columns' type will be kept, at most, when so many columns have been added."""
        if self._becomes_matrix(added):
            return self.size**2 * torch.float64.itemsize // self.like.dtype.itemsize
        return self.size * (self.held + (added if self.rank is None or self._keeps_all else min(added, self.rank)))

    def add(self, parts: Sequence[LayerJacobian]) -> None:
        """Add `sum_{k,n} J[k,n] J[k,n]^T` of `(K, N, P)`, the parameters' Jacobians side by side."""
        jacobian = NetworkJacobian(tuple(parts))
        self.trace = self.trace + jacobian.square_norms().double().sum()
        count = jacobian.shape[0] * jacobian.shape[1]
        if self._becomes_matrix(count):
            self.matrix = self._with(parts)
            self.pieces = []
        elif self._keeps_all or self.rank is None or count <= self.rank:
            self.pieces.append(jacobian.to_dense().flatten(0, 1).T)
            if self.rank is not None and self.held > 2 * self.rank:
                self.pieces = [compressed(self._columns(), self.rank)]
        else:
            for some in self._steps(parts):
                self.pieces = [self._merged(some, self.rank)]

    def columns(self) -> Tensor:
        """`V`, `(P, R)`: no more columns than weights, nor than the rank."""
        if self.matrix is not None:
            return root(mirrored(self.matrix, self.sizes), self.rank).to(self.like)
        if self.rank is None or self.held <= self.rank:
            return self._columns()
        return compressed(self._columns(), self.rank)

    def _columns(self) -> Tensor:
        if len(self.pieces) > 1:
            self.pieces = [torch.cat(self.pieces, dim=1)]
        return self.pieces[0] if self.pieces else self.like.new_zeros(self.size, 0)

    @property
    def _keeps_all(self) -> bool:
        """Whether so many columns are wanted that the whole matrix is no larger."""
        return self.rank is None or 2 * self.rank >= self.size

    def _becomes_matrix(self, added: int) -> bool:
        """Whether the whole matrix is smaller than the columns would be."""
        return self.matrix is not None or (self._keeps_all and self.held + added > self.size)

    def _steps(self, parts: Sequence[LayerJacobian]) -> Iterator[Sequence[LayerJacobian]]:
        """As many examples at a time as the limit allows."""
        columns, examples, _ = parts[0].shape
        side = min(SIDE, math.isqrt(self.limit // 32))  # the matrix, its eigenvectors and room to find them, in doubles
        whole = min(self.held + columns * examples, self.size) <= side
        yield from _cut(parts, examples if whole else max((side - self.held) // columns, 1))

    def _merged(self, parts: Sequence[LayerJacobian], rank: int) -> Tensor:
        """The best columns `(P, rank)` for those that are held and those of a Jacobian, which is not expanded.

        Through the matrix over the weights where it is smaller than that of the inner products.
        """
        jacobian = NetworkJacobian(tuple(parts))
        held, added = self.held, jacobian.shape[0] * jacobian.shape[1]
        if held + added >= self.size:
            return root(mirrored(self._with(parts), self.sizes), rank).to(self.like)
        old = self._columns()
        inner = old.new_empty(held + added, held + added, dtype=torch.float64)
        inner[:held, :held] = gram(old)
        inner[held:, held:] = jacobian.gram().flatten(2).flatten(0, 1)
        if held:
            inner[held:, :held] = jacobian.project(old).flatten(0, 1)
            inner[:held, held:] = inner[held:, :held].T
        chosen = symmetric_eigh(inner)[1].flip(1)[:, :rank].to(old.dtype)
        new = jacobian.pull_back_all(chosen[held:].unflatten(0, jacobian.shape[:2]))
        return new.addmm_(old, chosen[:held])

    def _with(self, parts: Sequence[LayerJacobian]) -> Tensor:
        """The matrix with that of a Jacobian, which is expanded for as many examples as it takes itself."""
        total = self.matrix
        if total is None:
            total = self.like.new_zeros(self.size, self.size, dtype=torch.float64)
            for piece in self.pieces:
                total.addmm_(piece.double(), piece.double().T)
        starts = list(accumulate((0, *self.sizes[:-1])))
        for some in _cut(parts, max(self.size // parts[0].shape[0], 1)):
            add_blocks(total, list(zip(starts, (converted(j, torch.float64) for j in some), strict=True)))
        return total


def _cut(parts: Sequence[LayerJacobian], step: int) -> Iterator[Sequence[LayerJacobian]]:
    """The Jacobians of some examples after those of others."""
    examples = parts[0].shape[1]
    for start in range(0, examples, step):
        part = slice(start, min(start + step, examples))
        yield parts if step >= examples else [jacobian.select(part) for jacobian in parts]


def root(matrix: Tensor, rank: int | None = None) -> Tensor:
    """Columns whose products are a positive semi-definite matrix, `(P, P)`, or the nearest matrix of lower rank.

    Eigenvectors are for those that select; all columns come from a Cholesky factor with pivots, for a twentieth of the
    time and more. It stops where no pivot exceeds rounding, and is zero from there on.
    """
    if rank is not None:
        values, vectors = symmetric_eigh(matrix)
        return (vectors * values.sqrt()).flip(1)[:, :rank]
    if not matrix.diagonal().isfinite().all():
        return matrix  # nothing to be found: a result refuses such numbers
    columns = pivoted_cholesky(matrix, torch.finfo(matrix.dtype).eps)
    return torch.nn.functional.pad(columns, (0, len(matrix) - columns.shape[1])).to(matrix)
