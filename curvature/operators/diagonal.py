"""A diagonal matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from torch import Tensor

from lapkit.curvature.jacobians.jacobian import Jacobian
from lapkit.curvature.operators.log_det_ratio import log_det_ratio_of
from lapkit.curvature.operators.operator import SymmetricOperator


@final
@dataclass(frozen=True, eq=False)
class Diagonal(SymmetricOperator):
    """`diag(values)`.

    Args:
        values: `(P,)`.

    Example:
        >>> import torch
        >>> float(Diagonal(torch.ones(3)).shift(1.0).logdet())
        2.0794
    """

    values: Tensor

    @property
    def size(self) -> int:
        """The number of weights P."""
        return len(self.values)

    @property
    def _entries(self) -> Tensor:
        return self.values

    def diagonal(self) -> Tensor:
        """The values."""
        return self.values

    def inverse_diagonal(self) -> Tensor:
        """Their reciprocals."""
        return self.values.reciprocal()

    def logdet(self) -> Tensor:
        """The sum of their logarithms."""
        return self.values.log().sum()

    def _logdet_ratio(self, delta: Tensor) -> Tensor:
        return log_det_ratio_of(self.values, delta).to(self.dtype)

    def scale(self, factor: Tensor | float) -> Diagonal:
        """See `SymmetricOperator.scale`."""
        return Diagonal(self.values * factor)

    def inverse_quadratic(self, jacobian: Jacobian) -> Tensor:
        """A weighted Gram matrix of the Jacobian, which is not expanded."""
        return jacobian.weighted_gram(self.values.reciprocal())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Diagonal:
        return Diagonal(function(self.values))

    def _add(self, other: SymmetricOperator) -> SymmetricOperator:
        return Diagonal(self.values + other.values) if isinstance(other, Diagonal) else super()._add(other)

    def _shift(self, delta: Tensor) -> Diagonal:
        return Diagonal(self.values + delta)

    def _matmul(self, vectors: Tensor) -> Tensor:
        return self.values[:, None] * vectors

    def _inverse_root(self, vectors: Tensor) -> Tensor:
        return self.values.rsqrt()[:, None] * vectors

    _inverse_root_transpose = _inverse_root
