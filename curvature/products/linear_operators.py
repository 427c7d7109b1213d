"""Matrices of lapkit as operators of the `linear_operator` library; see `lapkit.curvature.products.views`."""

from __future__ import annotations

from functools import singledispatch
from typing import Any, final

import torch
from linear_operator import LinearOperator
from linear_operator.operators import (
    AddedDiagLinearOperator,
    BlockDiagLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    KroneckerProductLinearOperator,
)
from torch import Tensor

from lapkit.curvature.operators.block_diagonal import BlockDiagonal
from lapkit.curvature.operators.dense import Dense
from lapkit.curvature.operators.diagonal import Diagonal
from lapkit.curvature.operators.kronecker_product import KroneckerProduct
from lapkit.curvature.operators.operator import SymmetricOperator


class _View(LinearOperator):  # type: ignore[misc]
    """What the library asks of every operator."""

    def __init__(self, *, matrix: Any) -> None:
        super().__init__(matrix=matrix)
        self.matrix = matrix

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the vectors."""
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self.matrix.device

    def _size(self) -> torch.Size:
        return torch.Size((self.matrix.size, self.matrix.size))

    def _transpose_nonbatch(self) -> LinearOperator:
        return self

    def _matmul(self, rhs: Tensor) -> Tensor:
        """The matrix has no batch; that of the vectors becomes further columns."""
        if rhs.ndim <= 2:
            return self.matrix.matmul(rhs)
        columns = rhs.movedim(-2, 0)
        return self.matrix.matmul(columns.flatten(1)).reshape(columns.shape).movedim(0, -2)


@final
class MatmulView(_View):
    """A matrix that the library only multiplies by.

    Args:
        matrix: anything symmetric with products.
    """

    def _diagonal(self) -> Tensor:
        return self.to_dense().diagonal()

    def add_diagonal(self, diag: Tensor) -> LinearOperator:
        """`A + diag(d)`."""
        return _shifted(super().add_diagonal(diag))

    def __add__(self, other: Any) -> LinearOperator:
        """`A + B`."""
        return _shifted(super().__add__(other))


@final
class StructuredView(_View):
    """A structure that the library does not have: solved, and its determinant taken, by lapkit's own closed form.

    Args:
        matrix: a `SymmetricOperator`.
    """

    def _diagonal(self) -> Tensor:
        return self.matrix.diagonal()

    def add_diagonal(self, diag: Tensor) -> LinearOperator:
        """`A + diag(d)`; a single number stays within the structure."""
        if diag.numel() == 1:
            return StructuredView(matrix=self.matrix.shift(diag))
        return super().add_diagonal(diag)

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        """`A^{-1} r`, or `l A^{-1} r`."""
        solution = self.matrix.solve(right_tensor)
        return solution if left_tensor is None else left_tensor @ solution

    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool | None = False, reduce_inv_quad: bool | None = True
    ) -> tuple[Tensor, Tensor]:
        """`r^T A^{-1} r` and `log det A`."""
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        quadratic = zero
        if inv_quad_rhs is not None:
            columns = inv_quad_rhs.reshape(self.matrix.size, -1)
            quadratic = (columns * self.matrix.solve(columns)).sum(0)
            quadratic = quadratic.sum() if reduce_inv_quad else quadratic
        return quadratic, self.matrix.logdet() if logdet else zero


@final
class ShiftedView(AddedDiagLinearOperator):  # type: ignore[misc]
    """`A + diag(d)` without the library's preconditioner, which reads A's diagonal: as many products as weights."""

    def _preconditioner(self) -> tuple[None, None, None]:
        return None, None, None


def _shifted(total: LinearOperator) -> LinearOperator:
    return ShiftedView(*total._args) if isinstance(total, AddedDiagLinearOperator) else total


@final
class BlocksView(LinearOperator):  # type: ignore[misc]
    """Blocks of different sizes along the diagonal, each with its own closed forms.

    Args:
        blocks: operators without a batch.
    """

    def __init__(self, *blocks: LinearOperator) -> None:
        super().__init__(*blocks)
        self.blocks = blocks
        self.sizes = [block.shape[-1] for block in blocks]

    def _size(self) -> torch.Size:
        return torch.Size((sum(self.sizes), sum(self.sizes)))

    def _transpose_nonbatch(self) -> BlocksView:
        return self

    def _matmul(self, rhs: Tensor) -> Tensor:
        axis = -1 if rhs.ndim == 1 else -2
        return torch.cat([b.matmul(r) for b, r in zip(self.blocks, rhs.split(self.sizes, axis), strict=True)], axis)

    def _diagonal(self) -> Tensor:
        return torch.cat([block.diagonal(dim1=-2, dim2=-1) for block in self.blocks])

    def add_diagonal(self, diag: Tensor) -> BlocksView:
        """`A + diag(d)`, block by block, for one number or one for each weight."""
        pieces = [diag] * len(self.sizes) if diag.numel() == 1 else diag.split(self.sizes)
        return BlocksView(*[block.add_diagonal(d) for block, d in zip(self.blocks, pieces, strict=True)])

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        """`A^{-1} r`, or `l A^{-1} r`, block by block."""
        axis = -1 if right_tensor.ndim == 1 else -2
        pieces = right_tensor.split(self.sizes, axis)
        solution = torch.cat([block.solve(r) for block, r in zip(self.blocks, pieces, strict=True)], axis)
        return solution if left_tensor is None else left_tensor @ solution

    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool | None = False, reduce_inv_quad: bool | None = True
    ) -> tuple[Tensor, Tensor]:
        """`r^T A^{-1} r` and `log det A`, sums over the blocks."""
        pieces = [None] * len(self.sizes)
        if inv_quad_rhs is not None:
            pieces = list(inv_quad_rhs.split(self.sizes, -1 if inv_quad_rhs.ndim == 1 else -2))
        terms = [
            block.inv_quad_logdet(piece, logdet, reduce_inv_quad)
            for block, piece in zip(self.blocks, pieces, strict=True)
        ]
        zero = torch.zeros((), dtype=self.dtype, device=self.device)  # some operators have None for what is not asked
        quadratic, determinant = (sum((t for t in term if t is not None), zero) for term in zip(*terms, strict=True))
        return quadratic, determinant

    def zero_mean_mvn_samples(self, num_samples: int) -> Tensor:
        """Draws from `N(0, A)`, independent from block to block."""
        return torch.cat([block.zero_mean_mvn_samples(num_samples) for block in self.blocks], dim=-1)


@singledispatch
def view(matrix: Any) -> LinearOperator:
    """The operator of the library with the same structure, or one that is only multiplied by."""
    return MatmulView(matrix=matrix)


@view.register
def _(matrix: SymmetricOperator) -> LinearOperator:
    return StructuredView(matrix=matrix)


@view.register
def _(matrix: Diagonal) -> LinearOperator:
    return DiagLinearOperator(matrix.values)


@view.register
def _(matrix: Dense) -> LinearOperator:
    return DenseLinearOperator(matrix.matrix)


@view.register
def _(matrix: KroneckerProduct) -> LinearOperator:
    groups = slice(None) if len(matrix.left) > 1 else 0
    left, right = matrix.left[groups], DenseLinearOperator(matrix.right[groups])
    factor = DenseLinearOperator(left) if matrix.left.ndim == 3 else DiagLinearOperator(left)
    product = KroneckerProductLinearOperator(factor, right)
    return product if groups == 0 else BlockDiagLinearOperator(product)


@view.register
def _(matrix: BlockDiagonal) -> LinearOperator:
    return BlocksView(*[view(block) for block in matrix.blocks])
