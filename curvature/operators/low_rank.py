"""A matrix of low rank plus a diagonal: the GGN by its columns, for more weights than a full matrix has room for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from lapkit.curvature.jacobians.conversion import floating_type
from lapkit.curvature.jacobians.jacobian import Jacobian
from lapkit.curvature.operators.eigenvectors import symmetric_eigh
from lapkit.curvature.operators.operator import SymmetricOperator
from lapkit.curvature.operators.woodbury import Woodbury

PIECE = 2**22  # numbers that are converted to float64 at a time


@final
@dataclass(frozen=True, eq=False)
class LowRank(Woodbury):
    """`factor V V^T + diag(offset)`, of which nothing larger than V is ever formed.

    Args:
        columns: `V`, `(P, R)`.
        offset: the diagonal, one number, `(P,)`, or `(L,)` for groups; zero by default, and then the matrix has no
            inverse. A tensor's type is that of the matrix, a number takes the type of V.
        factor: of the columns' part, so that scaling copies nothing; `root` has it multiplied in.
        sizes: how many consecutive weights each of L groups has, such as the parameters of a network: a number for
            each can be added to the diagonal at the cost of R x R matrices. Without groups by default.
        memo: inner products of the columns, shared by all operators with the same ones.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> import torch
        >>> float(LowRank(torch.ones(2, 1)).shift(1.0).logdet())
        1.0986

    Reference:
        Dangel et al., ViViT, 2022, equation (3).
    """

    columns: Tensor
    offset: Tensor | float = 0.0
    factor: Tensor | float = 1.0
    sizes: tuple[int, ...] | None = None
    memo: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        shapes = {(), tuple(self.columns.shape[:1])} | (set() if self.sizes is None else {(len(self.sizes),)})
        if self.columns.ndim != 2 or tuple(self._diagonal.shape) not in shapes:
            raise ValueError(
                f"Expected columns (P, R) and an offset () or (P,), got {tuple(self.columns.shape)} and "
                f"{tuple(self._diagonal.shape)}."
            )
        if self.sizes is not None and sum(self.sizes) != self.size:
            raise ValueError(f"Groups of {self.sizes} do not make up {self.size} weights.")

    @property
    def groups(self) -> list[int] | None:
        """How many weights each group has, if there are groups."""
        return None if self.sizes is None else list(self.sizes)

    @property
    def size(self) -> int:
        """The number of weights P."""
        return len(self.columns)

    @property
    def rank(self) -> int:
        """The number of columns R, an upper bound of the rank without the diagonal."""
        return self.columns.shape[1]

    @property
    def root(self) -> Tensor:
        """`sqrt(factor) V`, `(P, R)`, whose product with its transpose is the matrix without the diagonal."""
        return self.columns * self._scale.sqrt().to(self.columns.dtype)

    @property
    def _like(self) -> Tensor:
        return self.columns

    def scale(self, factor: Tensor | float) -> LowRank:
        """See `SymmetricOperator.scale`."""
        offset = self._diagonal * torch.as_tensor(factor, dtype=self.dtype, device=self.device)
        return replace(self, offset=offset, factor=self._scale * factor)

    def compressed(self, rank: int | None = None) -> LowRank:
        """The same matrix by fewer columns, orthogonal and of descending length.

        Args:
            rank: how many to keep; exact if it is not below the rank of `V V^T`, else the nearest matrix of that rank
                in Frobenius norm. By default all that there can be.

        Returns:
            The operator, with the same offset.

        Raises:
            ValueError: if the rank is not positive.
        """
        return LowRank(compressed(self.columns, rank), self._diagonal, self.factor, self.sizes)

    def _map(self, function: Callable[[Tensor], Tensor]) -> LowRank:
        """The columns keep their type where the other is wider, which would take memory and tell nothing more."""
        like = function(self.columns[:0])
        wider = like.element_size() > self.columns.element_size()
        columns = self.columns.to(like.device) if wider else function(self.columns)
        memo = {key: value.to(like.device) for key, value in self.memo.items()}
        return LowRank(columns, function(self._diagonal), self._scale.to(like.device), self.sizes, memo)

    def _add(self, other: SymmetricOperator) -> SymmetricOperator:
        """Columns side by side; no more of them than weights."""
        if not isinstance(other, LowRank):
            return super()._add(other)
        both = torch.cat([self.root, other.root], dim=1)
        columns = compressed(both) if both.shape[1] > len(both) else both
        if self.sizes == other.sizes:
            return LowRank(columns, self._shifted(other._diagonal), sizes=self.sizes)
        return LowRank(columns, self._each(self._diagonal) + other._each(other._diagonal))

    def _shift(self, delta: Tensor) -> LowRank:
        return replace(self, offset=self._shifted(delta))

    def _down(self, vectors: Tensor) -> Tensor:
        if self.columns.dtype == vectors.dtype:
            return self.columns.T @ vectors
        total = vectors.new_zeros(self.rank, vectors.shape[1])
        for part, rows in pieces(self.columns):
            total = total + rows.to(vectors.dtype).T @ vectors[part]
        return total

    def _up(self, coefficients: Tensor) -> Tensor:
        if self.columns.dtype == coefficients.dtype:
            return self.columns @ coefficients
        return torch.cat([rows.to(coefficients.dtype) @ coefficients for _, rows in pieces(self.columns)])

    def _squares(self, root: Tensor | None = None) -> Tensor:
        return torch.cat([(r if root is None else r @ root).square().sum(1) for _, r in pieces(self.columns)])

    def _inner(self, jacobian: Jacobian, weights: Tensor) -> Tensor:
        """The columns a few at a time, so that no second V is made."""
        dtype = floating_type(jacobian)
        step = max(1, PIECE // max(self.size, 1))
        weights = self._each(weights).to(dtype)[:, None]
        parts = [jacobian.project(weights * some.to(dtype)) for some in self.columns.split(step, dim=1)]
        return torch.cat(parts, dim=2).transpose(0, 1)

    def _written(self) -> Tensor:
        return self.columns.double()

    def _group_grams(self) -> Iterator[Tensor]:
        yield from (gram(rows) for rows in self.columns.split(self.groups or [self.size]))

    def _weighted_gram(self, weights: Tensor) -> Tensor:
        return gram(self.columns, weights)

    def _weighted_gram_backward(self, middle: Tensor) -> Tensor:
        return torch.cat([((rows @ middle) * rows).sum(1) for _, rows in pieces(self.columns)])

    def _weighted(self, weights: Tensor) -> Tensor:
        """Columns that were computed with a graph keep it."""
        return gram(self.columns, self._each(weights)) if self.columns.requires_grad else super()._weighted(weights)


def pieces(columns: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of `(P, R)`, a few at a time in float64."""
    step = max(1, PIECE // max(columns.shape[1], 1))
    for start in range(0, len(columns), step):
        part = slice(start, start + step)
        yield part, columns[part].double()


def gram(columns: Tensor, weights: Tensor | None = None) -> Tensor:
    """`V^T diag(weights) V` in float64, `(P, R) -> (R, R)`, with weights `(P,)`."""
    total = torch.zeros(columns.shape[1], columns.shape[1], dtype=torch.float64, device=columns.device)
    for part, rows in pieces(columns):
        total = total + rows.T @ (rows if weights is None else weights[part, None] * rows)
    return total


def compressed(columns: Tensor, rank: int | None = None) -> Tensor:
    """`V'` with `V' V'^T = V V^T`, or the nearest of lower rank, by the eigenvectors of the smaller Gram matrix.

    Args:
        columns: `V`, `(P, R)`.
        rank: the number of columns to keep; by default all that there can be.

    Returns:
        Orthogonal columns of descending length, `(P, min(P, R, rank))`.

    Raises:
        ValueError: if the rank is not positive.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"The rank is at least 1, got {rank}.")
    size, count = columns.shape
    if count <= size:
        _, vectors = symmetric_eigh(gram(columns))
        return columns @ vectors.flip(1)[:, :rank].to(columns.dtype)
    return columns_of(gram(columns.T))[:, :rank].to(columns.dtype)


def columns_of(matrix: Tensor) -> Tensor:
    """`V` with `V V^T` a matrix `(P, P)` without negative eigenvalues: orthogonal columns of descending length."""
    values, vectors = symmetric_eigh(matrix)
    return (vectors * values.sqrt()).flip(1)
