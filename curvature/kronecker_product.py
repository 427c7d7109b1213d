"""The Kronecker product of two small matrices by its factors, as it is accumulated; eigenvectors only when needed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from lapkit.curvature.jacobians import Jacobian
from lapkit.curvature.kronecker import Kronecker
from lapkit.curvature.operator import SymmetricOperator


@final
@dataclass(frozen=True, eq=False)
class KroneckerProduct(SymmetricOperator):
    """`left (x) right` for each of G independent groups.

    The weights of a group are a matrix, rows as `left` counts them and columns as `right` does, flattened row by row.
    Eigenvectors are computed once, when something first needs them, and shared by every shift.

    Args:
        left: positive semi-definite, `(G, R, R)`.
        right: positive semi-definite, `(G, C, C)`.
    """

    left: Tensor
    right: Tensor

    @cached_property
    def eigen(self) -> Kronecker:
        """The same matrix by its eigenvectors."""
        return Kronecker.from_factors(self.left, self.right)

    @property
    def size(self) -> int:
        """The number of weights P."""
        return self.left.shape[0] * self.left.shape[1] * self.right.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the entries."""
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return self.left.device

    def diagonal(self) -> Tensor:
        """Products of the factors' diagonals."""
        left, right = (f.diagonal(dim1=-2, dim2=-1) for f in (self.left, self.right))
        return (left[:, :, None] * right[:, None]).flatten()

    def inverse_diagonal(self) -> Tensor:
        """See `SymmetricOperator.inverse_diagonal`."""
        return self.eigen.inverse_diagonal()

    def logdet(self) -> Tensor:
        """See `SymmetricOperator.logdet`."""
        return self.eigen.logdet()

    def to(self, dtype: torch.dtype) -> SymmetricOperator:
        """See `SymmetricOperator.to`; eigenvectors go along, so that they are not computed again."""
        return self if dtype == self.dtype else self.eigen.to(dtype)

    def scale(self, factor: Tensor | float) -> SymmetricOperator:
        """See `SymmetricOperator.scale`."""
        return self.eigen.scale(factor)

    def inverse_quadratic(self, jacobian: Jacobian) -> Tensor:
        """See `SymmetricOperator.inverse_quadratic`."""
        return self.eigen.inverse_quadratic(jacobian)

    def _shift(self, delta: Tensor) -> SymmetricOperator:
        return self.eigen.shift(delta)

    def _matmul(self, vectors: Tensor) -> Tensor:
        boxed = vectors.unflatten(0, (len(self.left), self.left.shape[1], self.right.shape[1]))
        return torch.einsum("gpr,grcm,gcq->gpqm", self.left, boxed, self.right).flatten(0, 2)

    def _inverse_root(self, vectors: Tensor) -> Tensor:
        return self.eigen.inverse_root(vectors)

    def _inverse_root_transpose(self, vectors: Tensor) -> Tensor:
        return self.eigen.inverse_root_transpose(vectors)
