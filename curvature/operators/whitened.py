"""The identity plus curvature that exceeds it by more than a difference can bear."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Whitened:
    """`diag(offset)^{-1/2} (factor V V^T)^{1/2}` by its singular values: `A = D^{1/2} (I + U S^2 U^T) D^{1/2}`.

    With orthonormal U the inverse needs no difference of large numbers, only what a vector has outside of U.

    Args:
        left: `U`, `(P, r)`, in float64.
        singular: `S`, `(r,)`.
        right: `(R, r)`.
    """

    left: Tensor
    singular: Tensor
    right: Tensor

    @property
    def shrinkage(self) -> Tensor:
        """`(1 + S^2)^{-1/2}`."""
        return (1 + self.singular.square()).rsqrt()

    def inverse_root(self, vectors: Tensor) -> Tensor:
        """`(I + U S^2 U^T)^{-1/2} v`, symmetric."""
        inner = self.left.T @ vectors
        rest = vectors - self.left @ inner
        rest = rest - self.left @ (self.left.T @ rest)  # what round-off has left of U
        return rest + self.left @ (self.shrinkage[:, None] * inner)

    def inverse_diagonal(self) -> Tensor:
        """The diagonal of `(I + U S^2 U^T)^{-1}`."""
        squares = self.left.square()
        return (1 - squares.sum(1)).clamp_min(0) + squares @ self.shrinkage.square()
