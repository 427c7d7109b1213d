"""The Kronecker product of two small matrices by its factors, as it is accumulated; eigenvectors only when needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from lapkit.curvature.jacobians.jacobian import Jacobian
from lapkit.curvature.operators.kronecker import NOT_CLOSED, Kronecker
from lapkit.curvature.operators.operator import SymmetricOperator


@final
@dataclass(frozen=True, eq=False)
class KroneckerProduct(SymmetricOperator):
    """`left (x) right` for each of G independent groups.

    The weights of a group are a matrix, rows as `left` counts them and columns as `right` does, flattened row by row.
    Eigenvectors are computed once, when something first needs them, and shared by every shift.

    Args:
        left: positive semi-definite, `(G, R, R)`, or its diagonal `(G, R)`, if it has no other entries.
        right: positive semi-definite, `(G, C, C)`.
        source: the operator that this one was converted from, with which it shares the eigenvectors.
    """

    left: Tensor
    right: Tensor
    source: KroneckerProduct | None = field(default=None, repr=False)

    @cached_property
    def eigen(self) -> Kronecker:
        """The same matrix by its eigenvectors."""
        if self.source is not None:
            return self.source.eigen._map(lambda tensor: tensor.to(self.left))
        with torch.inference_mode(False):  # kept for evidences with a gradient, too
            return Kronecker.from_factors(self.left, self.right)

    @property
    def size(self) -> int:
        """The number of weights P."""
        return self.left.shape[0] * self.left.shape[1] * self.right.shape[1]

    @property
    def _entries(self) -> Tensor:
        return self.left

    def diagonal(self) -> Tensor:
        """Products of the factors' diagonals."""
        return (_diagonal(self.left)[:, :, None] * _diagonal(self.right)[:, None]).flatten()

    def inverse_diagonal(self) -> Tensor:
        """See `SymmetricOperator.inverse_diagonal`."""
        return self.eigen.inverse_diagonal()

    def logdet(self) -> Tensor:
        """See `SymmetricOperator.logdet`."""
        return self.eigen.logdet()

    def _logdet_ratio(self, delta: Tensor) -> Tensor:
        return self.eigen.logdet_ratio(delta)

    def scale(self, factor: Tensor | float) -> SymmetricOperator:
        """See `SymmetricOperator.scale`."""
        return self.eigen.scale(factor)

    def inverse_quadratic(self, jacobian: Jacobian) -> Tensor:
        """See `SymmetricOperator.inverse_quadratic`."""
        return self.eigen.inverse_quadratic(jacobian)

    def damped_inverse(self, damping: Tensor | float) -> KroneckerProduct:
        """`(B + sqrt(damping) / pi I)^{-1} (x) (A + pi sqrt(damping) I)^{-1}`, near `(B (x) A + damping I)^{-1}`.

        It keeps the structure of a product, which the exact inverse, `shift(damping).solve`, does not. `pi` shares the
        damping out, `pi^2 = (tr A / dim A) / (tr B / dim B)`. Where a factor is a single number, and where the product
        is zero, the inverse is exact.

        Args:
            damping: one positive number.

        Returns:
            The approximate inverse.

        Raises:
            ValueError: if the damping is not positive.

        Reference:
            Dangel, Backpropagation Beyond the Gradient, eq. (B.21), (B.22), after Martens and Grosse, 2015.
        """
        damping = torch.as_tensor(damping, dtype=self.dtype, device=self.device)
        if damping.numel() != 1 or not damping > 0:
            raise ValueError(f"The damping is one positive number, got {damping.tolist()}.")
        if self.right.shape[-1] == 1:
            number = self.right.reshape(-1, *[1] * (self.left.ndim - 1))
            return KroneckerProduct(_inverse(self.left * number, damping), torch.ones_like(self.right))
        if self.left.shape[-1] == 1:
            number = self.left.reshape(-1, 1, 1)
            return KroneckerProduct(torch.ones_like(self.left), _inverse(number * self.right, damping))
        b, a = (_diagonal(f).mean(-1) for f in (self.left, self.right))
        alive = (a * b > 0).to(self.dtype)
        pi = torch.where(alive > 0, a / b, 1.0).sqrt()
        left, right = (f * alive.reshape(-1, *[1] * (f.ndim - 1)) for f in (self.left, self.right))
        return KroneckerProduct(_inverse(left, damping.sqrt() / pi), _inverse(right, damping.sqrt() * pi))

    def _map(self, function: Callable[[Tensor], Tensor]) -> KroneckerProduct:
        return KroneckerProduct(function(self.left), function(self.right), self.source or self)

    def _add(self, other: SymmetricOperator) -> SymmetricOperator:
        """Not closed.

        Raises:
            TypeError: always.
        """
        raise TypeError(NOT_CLOSED)

    def _shift(self, delta: Tensor) -> SymmetricOperator:
        return self.eigen.shift(delta)

    def _matmul(self, vectors: Tensor) -> Tensor:
        boxed = vectors.unflatten(0, (len(self.left), self.left.shape[1], self.right.shape[1]))
        boxed = torch.einsum("grcm,gqc->grqm", boxed, self.right)
        rows = "gp,gpqm->gpqm" if self.left.ndim == 2 else "gpr,grqm->gpqm"
        return torch.einsum(rows, self.left, boxed).flatten(0, 2)

    def _inverse_root(self, vectors: Tensor) -> Tensor:
        return self.eigen.inverse_root(vectors)

    def _inverse_root_transpose(self, vectors: Tensor) -> Tensor:
        return self.eigen.inverse_root_transpose(vectors)


def _diagonal(factor: Tensor) -> Tensor:
    """The diagonals `(G, n)` of factors `(G, n, n)`, or of factors that are diagonal."""
    return factor if factor.ndim == 2 else factor.diagonal(dim1=-2, dim2=-1)


def _inverse(factor: Tensor, damping: Tensor) -> Tensor:
    """`(M + damping I)^{-1}` of a positive semi-definite factor, with a damping for each group, in float64."""
    damping = damping.double().expand(len(factor))[:, None]
    if factor.ndim == 2:
        return (factor.double() + damping).reciprocal().to(factor.dtype)
    damped = factor.double() + torch.diag_embed(damping.expand(factor.shape[:2]))
    return torch.cholesky_inverse(torch.linalg.cholesky(damped)).to(factor.dtype)
