"""The Kronecker product of two small matrices, kept by its eigenvectors so that any shift costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from lapkit.curvature.jacobians.jacobian import Jacobian, LayerJacobian
from lapkit.curvature.operators.eigenvectors import symmetric_eigh
from lapkit.curvature.operators.log_det_ratio import log_det_ratio_of
from lapkit.curvature.operators.operator import SymmetricOperator

NOT_CLOSED = (
    "The sum of two Kronecker products is none. Add what was accumulated for them, `sums = a.result() + b.result()`, "
    "and take `sums.operator()`."
)


@final
@dataclass(frozen=True, eq=False)
class Kronecker(SymmetricOperator):
    """`U diag(values) U^T` with `U = U_left (x) U_right`, for G independent groups.

    The weights of a group are a matrix, rows as `left` counts them and columns as `right` does, flattened row by row.

    Args:
        left: orthogonal, `(G, R, R)`; None for the identity.
        right: orthogonal, `(G, C, C)`.
        values: eigenvalues, `(G, R, C)`.
        left_squares: `left * left`, averaged over equal eigenvalues of that factor; plain squares by default.
        right_squares: likewise.
    """

    left: Tensor | None
    right: Tensor
    values: Tensor
    left_squares: Tensor | None = None
    right_squares: Tensor | None = None

    @classmethod
    def from_factors(cls, left: Tensor, right: Tensor) -> Kronecker:
        """`left (x) right` for each group.

        Args:
            left: positive semi-definite, `(G, R, R)`, or its diagonal `(G, R)`, if it has no other entries.
            right: positive semi-definite, `(G, C, C)`.

        Returns:
            Their product, factored once.
        """
        right_values, right_vectors = symmetric_eigh(right)
        right_squares = _averaged_squares(right_values, right_vectors)
        if left.ndim == 2:
            return cls(None, right_vectors, left[:, :, None] * right_values[:, None], None, right_squares)
        left_values, left_vectors = symmetric_eigh(left)
        left_squares = _averaged_squares(left_values, left_vectors)
        return cls(
            left_vectors, right_vectors, left_values[:, :, None] * right_values[:, None], left_squares, right_squares
        )

    @property
    def size(self) -> int:
        """The number of weights P."""
        return self.values.numel()

    @property
    def _entries(self) -> Tensor:
        return self.values

    def diagonal(self) -> Tensor:
        """`(U * U) values`, through the factors."""
        return self._in_weights(self.values)

    def inverse_diagonal(self) -> Tensor:
        """See `SymmetricOperator.inverse_diagonal`."""
        return self._in_weights(self.values.reciprocal())

    def logdet(self) -> Tensor:
        """The sum of the logarithms of the eigenvalues."""
        return self.values.log().sum()

    def _logdet_ratio(self, delta: Tensor) -> Tensor:
        shift = self._rotated(delta)
        ratio = log_det_ratio_of(self.values, shift)
        if delta.ndim:
            ratio = ratio + shift.double().log().sum() - delta.double().log().sum()
        return ratio.to(self.dtype)

    def scale(self, factor: Tensor | float) -> Kronecker:
        """See `SymmetricOperator.scale`."""
        return replace(self, values=self.values * factor)

    def inverse_quadratic(self, jacobian: Jacobian) -> Tensor:
        """The factored Jacobian is rotated into the eigenbasis, where the matrix is diagonal.

        Raises:
            TypeError: if the Jacobian is not that of a single parameter.
        """
        if not isinstance(jacobian, LayerJacobian):
            raise TypeError(f"A Kronecker block takes the Jacobian of one parameter, got {type(jacobian).__name__}.")
        return jacobian.rotate(self.left, self.right).weighted_gram(self.values.reciprocal().flatten())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Kronecker:
        left, *squares = (
            None if t is None else function(t) for t in (self.left, self.left_squares, self.right_squares)
        )
        return Kronecker(left, function(self.right), function(self.values), *squares)

    def _add(self, other: SymmetricOperator) -> SymmetricOperator:
        """Eigenvalues add up in one and the same basis, in no other.

        Raises:
            TypeError: if the eigenvectors differ.
        """
        if not isinstance(other, Kronecker):
            return super()._add(other)
        pairs = [(self.right, other.right), (self.left, other.left)]
        if not all(one is two or (one is not None and two is not None and torch.equal(one, two)) for one, two in pairs):
            raise TypeError(NOT_CLOSED)
        return replace(self, values=self.values + other.values, left_squares=None, right_squares=None)

    def _in_weights(self, values: Tensor) -> Tensor:
        rows = values if self.left is None else self.left.square() @ values
        return (rows @ self.right.square().mT).flatten()

    def _shift(self, delta: Tensor) -> Kronecker:
        """Exact for one number, also if repeated for each weight; else the nearest with the same eigenvectors.

        `U^T diag(delta) U` is diagonal only for equal entries. Of other shifts the diagonal is kept, which is nearest
        in Frobenius norm and keeps the trace. By Hadamard's inequality its log determinant is not below the exact
        one, so that an evidence errs to the low side. Within equal eigenvalues of a factor, where any basis would do,
        the diagonal is averaged, so that the result does not depend on the basis found.
        """
        return replace(self, values=self.values + self._rotated(delta))

    def _rotated(self, delta: Tensor) -> Tensor:
        """The diagonal of `U^T diag(delta) U`, averaged as `_shift` says, `(G, R, C)`; or the one number."""
        if delta.ndim == 0:
            return delta
        delta = delta.reshape(self.values.shape)
        if self.left is not None:
            delta = (self.left.square() if self.left_squares is None else self.left_squares).mT @ delta
        return delta @ (self.right.square() if self.right_squares is None else self.right_squares)

    def _rotate(self, vectors: Tensor) -> Tensor:
        """`U` times vectors `(P, M)`."""
        boxed = torch.einsum("grcm,gqc->grqm", vectors.unflatten(0, self.values.shape), self.right)
        return (boxed if self.left is None else torch.einsum("gpr,grqm->gpqm", self.left, boxed)).flatten(0, 2)

    def _rotate_back(self, vectors: Tensor) -> Tensor:
        """`U^T` times vectors `(P, M)`."""
        boxed = torch.einsum("grqm,gqc->grcm", vectors.unflatten(0, self.values.shape), self.right)
        return (boxed if self.left is None else torch.einsum("gpr,gpcm->grcm", self.left, boxed)).flatten(0, 2)

    def _matmul(self, vectors: Tensor) -> Tensor:
        return self._rotate(self.values.flatten()[:, None] * self._rotate_back(vectors))

    def _inverse_root(self, vectors: Tensor) -> Tensor:
        return self.values.flatten().rsqrt()[:, None] * self._rotate_back(vectors)

    def _inverse_root_transpose(self, vectors: Tensor) -> Tensor:
        return self._rotate(self.values.flatten().rsqrt()[:, None] * vectors)


def _averaged_squares(values: Tensor, vectors: Tensor) -> Tensor:
    """Squares of eigenvectors `(G, n, n)`, averaged over those with the same eigenvalue up to round-off."""
    tolerance = 10 * values.shape[-1] * torch.finfo(values.dtype).eps * values[:, -1:]
    number = torch.nn.functional.pad((values.diff(dim=-1) > tolerance).long().cumsum(-1), (1, 0))
    same = (number[:, :, None] == number[:, None, :]).to(values.dtype)
    return vectors.square() @ (same / same.sum(-1, keepdim=True))
