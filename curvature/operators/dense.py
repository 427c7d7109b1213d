"""A dense symmetric matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from lapkit.curvature.jacobians.jacobian import Jacobian
from lapkit.curvature.operators.operator import SymmetricOperator, logdet_from_one


@final
@dataclass(frozen=True, eq=False)
class Dense(SymmetricOperator):
    """A matrix `(P, P)`; the inverse root is that of its Cholesky factor, `R = L^{-1}`.

    Args:
        matrix: symmetric, `(P, P)`.
        source: the operator that this one was converted from, with which it shares the eigenvalues.

    Example:
        >>> import torch
        >>> float(Dense(torch.ones(2, 2)).shift(1.0).logdet())
        1.0986
    """

    matrix: Tensor
    source: Dense | None = field(default=None, repr=False)

    @property
    def size(self) -> int:
        """The number of weights P."""
        return len(self.matrix)

    @property
    def _entries(self) -> Tensor:
        return self.matrix

    @cached_property
    def cholesky(self) -> Tensor:
        """The lower Cholesky factor.

        Raises:
            ValueError: if the matrix is not positive definite in its precision.
        """
        factor, failed = torch.linalg.cholesky_ex(self.matrix)
        if failed.any():
            raise ValueError(
                "The precision matrix is not positive definite: its smallest eigenvalue is lost in round-off. "
                "Use a larger prior precision, or a model in float64."
            )
        return factor

    @cached_property
    def eigenvalues(self) -> Tensor:
        """The spectrum, ascending; computed once, whatever the number of shifts tried."""
        return self._spectrum.to(self.matrix)

    @cached_property
    def _spectrum(self) -> Tensor:
        """The eigenvalues in float64, which operators of another type or device share."""
        if self.source is not None:
            return self.source._spectrum
        return torch.linalg.eigvalsh(self.matrix.double()).clamp_min(0)

    def diagonal(self) -> Tensor:
        """See `SymmetricOperator.diagonal`."""
        return self.matrix.diagonal()

    def inverse_diagonal(self) -> Tensor:
        """See `SymmetricOperator.inverse_diagonal`."""
        return torch.cholesky_inverse(self.cholesky).diagonal()

    def logdet(self) -> Tensor:
        """Twice the sum of the logarithms of the Cholesky factor's diagonal."""
        return 2 * self.cholesky.diagonal().log().sum()

    def _shifted_logdet(self, delta: Tensor) -> Tensor:
        """O(P) for a single number, once the eigenvalues are known."""
        if delta.ndim == 0:
            return (self.eigenvalues + delta).log().sum()
        return self._shift(delta).logdet()

    def _logdet_ratio(self, delta: Tensor) -> Tensor:
        """`log det(I + D^{-1/2} A D^{-1/2})`, whose eigenvalues are at least one however far the shifts are apart."""
        delta = delta.double()  # in float64 the quotient of a large entry and a tiny shift is finite, and its gradient
        if delta.ndim == 0:
            return (self.eigenvalues.double() / delta).log1p().sum().to(self.dtype)
        root = delta.rsqrt()
        eye = torch.eye(self.size, dtype=delta.dtype, device=self.device)
        return logdet_from_one(root[:, None] * self.matrix.double() * root + eye).to(self.dtype)

    def scale(self, factor: Tensor | float) -> Dense:
        """See `SymmetricOperator.scale`."""
        return Dense(self.matrix * factor)

    def inverse_quadratic(self, jacobian: Jacobian) -> Tensor:
        """`|L^{-1} J^T|^2`; a full matrix leaves nothing to factor, so the Jacobian is expanded."""
        columns, examples, _ = jacobian.shape
        rows = jacobian.to_dense().transpose(0, 1).flatten(0, 1)  # (N K, P)
        half = torch.linalg.solve_triangular(self.cholesky, rows.T, upper=False).T
        half = half.unflatten(0, (examples, columns))
        return half @ half.mT

    def _map(self, function: Callable[[Tensor], Tensor]) -> Dense:
        return Dense(function(self.matrix), self.source or self)

    def _add(self, other: SymmetricOperator) -> SymmetricOperator:
        return Dense(self.matrix + other.matrix) if isinstance(other, Dense) else super()._add(other)

    def _shift(self, delta: Tensor) -> Dense:
        return Dense(self.matrix + torch.diag_embed(delta.expand(self.size)))

    def _matmul(self, vectors: Tensor) -> Tensor:
        return self.matrix @ vectors

    def _inverse_root(self, vectors: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.cholesky, vectors, upper=False)

    def _inverse_root_transpose(self, vectors: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.cholesky.T, vectors, upper=True)
