"""A matrix of low rank plus a diagonal: the GGN by its columns, for more weights than a full matrix has room for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from lapkit.curvature.jacobians.jacobian import Jacobian
from lapkit.curvature.operators.operator import SymmetricOperator, symmetric_eigh

PIECE = 2**22  # numbers that are converted to float64 at a time


@final
@dataclass(frozen=True, eq=False)
class LowRank(SymmetricOperator):
    """`V V^T + diag(offset)`, of which nothing larger than V is ever formed.

    Everything but products goes through the matrix `I + V^T diag(offset)^{-1} V` of the columns (Woodbury), in float64
    whatever the type of V: beside small offsets single precision has no digits left.

    Args:
        columns: `V`, `(P, R)`.
        offset: the diagonal, one number or `(P,)`; zero by default, and then the matrix has no inverse.

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

    def __post_init__(self) -> None:
        if self.columns.ndim != 2 or self._diagonal.shape not in ((), self.columns.shape[:1]):
            raise ValueError(
                f"Expected columns (P, R) and an offset () or (P,), got {tuple(self.columns.shape)} and "
                f"{tuple(self._diagonal.shape)}."
            )

    @cached_property
    def _diagonal(self) -> Tensor:
        return torch.as_tensor(self.offset, dtype=self.columns.dtype, device=self.columns.device)

    @property
    def size(self) -> int:
        """The number of weights P."""
        return len(self.columns)

    @property
    def rank(self) -> int:
        """The number of columns R, an upper bound of the rank without the diagonal."""
        return self.columns.shape[1]

    @property
    def _entries(self) -> Tensor:
        return self.columns

    @cached_property
    def gram(self) -> Tensor:
        """`V^T V`, `(R, R)`, in float64."""
        return gram(self.columns)

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Those of `V^T V`, `(R,)`, in float64, ascending: all of `V V^T` that may differ from zero, if R <= P."""
        return torch.linalg.eigvalsh(self.gram).clamp_min(0)

    def diagonal(self) -> Tensor:
        """Squared rows of V, and the offset."""
        return self.columns.square().sum(1) + self._diagonal

    def inverse_diagonal(self) -> Tensor:
        """`1 / offset - |L^{-1} V^T / offset|^2`, in float64."""
        inverse = self._inverse_offset.expand(self.size)
        parts = []
        for part, columns in pieces(self.columns):
            half = torch.linalg.solve_triangular(self._cholesky, columns.T * inverse[part], upper=False)
            parts.append(inverse[part] - half.square().sum(0))
        return torch.cat(parts).to(self.dtype)

    def logdet(self) -> Tensor:
        """`sum log offset + log det(I + V^T diag(offset)^{-1} V)`."""
        offset = self._inverse_offset.expand(self.size).log().sum()
        return (2 * self._cholesky.diagonal().log().sum() - offset).to(self.dtype)

    def _shifted_logdet(self, delta: Tensor) -> Tensor:
        """O(R) for a single number, once the eigenvalues are known."""
        inverse = _positive(self._diagonal + delta).reciprocal()
        if inverse.ndim:
            return self._shift(delta).logdet()
        return ((self.eigenvalues * inverse).log1p().sum() - self.size * inverse.log()).to(self.dtype)

    def scale(self, factor: Tensor | float) -> LowRank:
        """See `SymmetricOperator.scale`."""
        factor = torch.as_tensor(factor, dtype=self.dtype, device=self.device)
        return LowRank(self.columns * factor.sqrt(), self._diagonal * factor)

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
        return LowRank(compressed(self.columns, rank), self._diagonal)

    def inverse_quadratic(self, jacobian: Jacobian) -> Tensor:
        """`J diag(offset)^{-1} J^T - |L^{-1} V^T diag(offset)^{-1} J^T|^2`, the Jacobian not expanded.

        Where this difference has too few digits left, `|R J^T|^2` of the expanded Jacobian is taken instead, which
        costs more and keeps them.
        """
        inverse = self._inverse_offset.to(self.dtype)
        whole = jacobian.weighted_gram(inverse.expand(self.size))
        inner = jacobian.project(inverse.reshape(-1, 1) * self.columns).transpose(0, 1)  # (N, K, R)
        half = torch.linalg.solve_triangular(self._cholesky, inner.mT.double(), upper=False)
        result = whole - (half.mT @ half).to(self.dtype)
        left, total = (m.diagonal(dim1=-2, dim2=-1) for m in (result, whole))
        if (left >= 10 * torch.finfo(self.dtype).eps ** 0.5 * total).all():
            return result
        rows = self._inverse_root(jacobian.to_dense().flatten(0, 1).T)  # (P, K N)
        rows = rows.unflatten(1, jacobian.shape[:2]).permute(2, 1, 0)  # (N, K, P)
        return rows @ rows.mT

    def _map(self, function: Callable[[Tensor], Tensor]) -> LowRank:
        return LowRank(function(self.columns), function(self._diagonal))

    def _add(self, other: SymmetricOperator) -> SymmetricOperator:
        """Columns side by side; no more of them than weights."""
        if not isinstance(other, LowRank):
            return super()._add(other)
        both = torch.cat([self.columns, other.columns], dim=1)
        return LowRank(compressed(both) if both.shape[1] > len(both) else both, self._diagonal + other._diagonal)

    def _shift(self, delta: Tensor) -> LowRank:
        return LowRank(self.columns, self._diagonal + delta)

    def _matmul(self, vectors: Tensor) -> Tensor:
        return self.columns @ (self.columns.T @ vectors) + self._diagonal.reshape(-1, 1) * vectors

    def _inverse_root(self, vectors: Tensor) -> Tensor:
        """`R = (I - W K^T W^T) diag(offset)^{-1/2}` with `W = diag(offset)^{-1/2} V`."""
        root = self._inverse_offset.sqrt().to(self.dtype).reshape(-1, 1)
        vectors = root * vectors
        return vectors - root * (self.columns @ (self._core.mT @ (self.columns.T @ (root * vectors))))

    def _inverse_root_transpose(self, vectors: Tensor) -> Tensor:
        root = self._inverse_offset.sqrt().to(self.dtype).reshape(-1, 1)
        inner = root * (self.columns @ (self._core @ (self.columns.T @ (root * vectors))))
        return root * (vectors - inner)

    @cached_property
    def _core(self) -> Tensor:
        """`K`, `(R, R)`, for which `(I - W K W^T)(I - W K^T W^T) = (I + W W^T)^{-1}`.

        `K = L^{-T} (I + L)^{-1}` with `L L^T = I + W^T W`: no eigenvectors, which have no derivatives where eigenvalues
        are equal.
        """
        eye = torch.eye(self.rank, dtype=torch.float64, device=self.device)
        inverse = torch.linalg.solve_triangular(self._cholesky + eye, eye, upper=False)
        return torch.linalg.solve_triangular(self._cholesky.mT, inverse, upper=True).to(self.dtype)

    @property
    def _inverse_offset(self) -> Tensor:
        """The reciprocal of the diagonal, in float64."""
        return _positive(self._diagonal).reciprocal()

    @cached_property
    def _cholesky(self) -> Tensor:
        """`L` with `L L^T = I + V^T diag(offset)^{-1} V`, `(R, R)`, in float64."""
        inverse = self._inverse_offset
        weighted = gram(self.columns, inverse) if inverse.ndim else inverse * self.gram
        return torch.linalg.cholesky(weighted + torch.eye(self.rank, dtype=torch.float64, device=self.device))


def _positive(diagonal: Tensor) -> Tensor:
    """A diagonal in float64.

    Raises:
        ValueError: if an entry is not positive.
    """
    if not (diagonal > 0).all():
        raise ValueError(
            "A matrix of low rank has no inverse and no log determinant without a positive diagonal. "
            "Shift it by a positive prior precision first."
        )
    return diagonal.double()


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
    values, vectors = symmetric_eigh(gram(columns.T))
    return (vectors * values.sqrt()).flip(1)[:, :rank].to(columns.dtype)
