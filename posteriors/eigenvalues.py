"""The eigenvalues of a curvature, as far as its structure knows them: all that one prior precision can see of it."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from lapkit.curvature.operators.block_diagonal import BlockDiagonal
from lapkit.curvature.operators.dense import Dense
from lapkit.curvature.operators.diagonal import Diagonal
from lapkit.curvature.operators.kronecker import Kronecker
from lapkit.curvature.operators.kronecker_product import KroneckerProduct
from lapkit.curvature.operators.operator import SymmetricOperator


@singledispatch
def known_eigenvalues(operator: SymmetricOperator) -> Tensor | None:
    """The eigenvalues in float64, `(P,)`, in any order; None where the structure does not have them all.

    Args:
        operator: any; what it computes for this, it keeps.

    Example:
        >>> import torch
        >>> known_eigenvalues(Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]])))
        tensor([1., 3.], dtype=torch.float64)
    """
    return None


@known_eigenvalues.register
def _(operator: Diagonal) -> Tensor:
    return operator.values.double()


@known_eigenvalues.register
def _(operator: Kronecker) -> Tensor:
    return operator.values.flatten().double()


@known_eigenvalues.register
def _(operator: KroneckerProduct) -> Tensor:
    return operator.eigen.values.flatten().double()


@known_eigenvalues.register
def _(operator: Dense) -> Tensor:
    return operator.spectrum  # in float64, whatever the matrix is in


@known_eigenvalues.register
def _(operator: BlockDiagonal) -> Tensor | None:
    parts = [known_eigenvalues(block) for block in operator.blocks]
    return None if any(part is None for part in parts) else torch.cat([part for part in parts if part is not None])
