"""The reference's names for a block-diagonal matrix of Kronecker products, as views of lapkit's operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lapkit.curvature import SymmetricOperator

View = TypeVar("View", bound="Kron")


@dataclass(frozen=True, eq=False)
class Kron:
    """A matrix over the weights, one Kronecker product for each parameter.

    Args:
        operator: lapkit's matrix, whose methods these are.
        sizes: how many weights each parameter has.
    """

    operator: SymmetricOperator
    sizes: tuple[int, ...]

    def __len__(self) -> int:
        """The number of blocks, one for each parameter."""
        return len(self.sizes)

    def __mul__(self: View, scalar: float | Tensor) -> View:
        """The matrix times a number."""
        return type(self)(self.operator.scale(scalar), self.sizes)

    __rmul__ = __mul__

    def decompose(self, damping: bool = False) -> KronDecomposed:
        """The matrix by its eigenvectors, which lapkit computes when something first needs them.

        Args:
            damping: must be False.

        Returns:
            A view of the same matrix.

        Raises:
            ValueError: if damping is asked for.
        """
        if damping:
            raise ValueError("Damped factors are another matrix; add a prior precision instead, which is exact.")
        return KronDecomposed(self.operator, self.sizes)

    def bmm(self, W: Tensor, exponent: float = 1) -> Tensor:
        """The matrix, or its inverse, times rows.

        Args:
            W: `(P,)`, `(B, P)` or `(B, C, P)`.
            exponent: 1 or -1.

        Returns:
            Of the shape of W.

        Raises:
            ValueError: if the exponent is another, or sizes do not fit.
        """
        if exponent not in (1, -1):
            raise ValueError(
                f"bmm takes the exponents 1 and -1, got {exponent}. For draws use la.sample, for any root R with "
                "R^T R = A^{-1} `operator.inverse_root`."
            )
        product = self.operator.matmul if exponent == 1 else self.operator.solve
        return product(W.reshape(-1, W.shape[-1]).mT).mT.reshape(W.shape)

    def logdet(self) -> Tensor:
        """The logarithm of the determinant."""
        return self.operator.logdet()

    def diag(self) -> Tensor:
        """The diagonal, `(P,)`."""
        return self.operator.diagonal()

    def to_matrix(self, exponent: float = 1) -> Tensor:
        """The matrix itself, or with the exponent -1 its inverse, `(P, P)`."""
        dense = self.operator.to_dense()
        return dense if exponent == 1 else self.bmm(torch.eye(len(dense)).to(dense), exponent)


@dataclass(frozen=True, eq=False)
class KronDecomposed(Kron):
    """The same by its eigenvectors: a prior precision can be added."""

    def __add__(self, deltas: Tensor) -> KronDecomposed:
        """The matrix plus one number on the diagonal, or one for each parameter."""
        return KronDecomposed(self.operator.shift(deltas, self.sizes), self.sizes)

    def inv_square_form(self, W: Tensor) -> Tensor:
        """`W A^{-1} W^T` for each W of a batch, such as Jacobians.

        Args:
            W: `(B, C, P)`.

        Returns:
            `(B, C, C)`.
        """
        return quadratic_form(self.operator, W)


def quadratic_form(operator: SymmetricOperator, W: Tensor) -> Tensor:
    """`W A^{-1} W^T` for each W `(C, P)` of a batch `(B, C, P)`, by one root of the inverse."""
    root = operator.inverse_root(W.reshape(-1, W.shape[-1]).mT).mT.reshape(W.shape)
    return torch.einsum("bcp,bdp->bcd", root, root)
