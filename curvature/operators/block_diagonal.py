"""Blocks along the diagonal, each in its own form: what Kronecker factors and per-layer matrices make of a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lapkit.curvature.jacobians.jacobian import Jacobian
from lapkit.curvature.operators.operator import SymmetricOperator


@final
@dataclass(frozen=True, eq=False)
class BlockDiagonal(SymmetricOperator):
    """`diag(A_1, ..., A_L)`.

    Args:
        blocks: operators, in the flat order of the weights.

    Raises:
        ValueError: if there is none.
    """

    blocks: tuple[SymmetricOperator, ...]

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError("A block-diagonal operator needs at least one block.")

    @property
    def sizes(self) -> list[int]:
        """The number of weights of each block."""
        return [block.size for block in self.blocks]

    @property
    def size(self) -> int:
        """The number of weights P."""
        return sum(self.sizes)

    @property
    def _entries(self) -> Tensor:
        return self.blocks[0]._entries

    def diagonal(self) -> Tensor:
        """See `SymmetricOperator.diagonal`."""
        return torch.cat([block.diagonal() for block in self.blocks])

    def inverse_diagonal(self) -> Tensor:
        """See `SymmetricOperator.inverse_diagonal`."""
        return torch.cat([block.inverse_diagonal() for block in self.blocks])

    def logdet(self) -> Tensor:
        """The sum over blocks."""
        return torch.stack([block.logdet() for block in self.blocks]).sum()

    def _shifted_logdet(self, delta: Tensor) -> Tensor:
        """The sum over blocks, each sharing what it can."""
        return torch.stack([b.shifted_logdet(d) for b, d in self._pieces(delta)]).sum()

    def _logdet_ratio(self, delta: Tensor) -> Tensor:
        return torch.stack([b._logdet_ratio(d) for b, d in self._pieces(delta)]).sum()

    @property
    def groups(self) -> list[int]:
        """The blocks, whose eigenvectors a number for each leaves alone."""
        return self.sizes

    def scale(self, factor: Tensor | float) -> BlockDiagonal:
        """See `SymmetricOperator.scale`."""
        return BlockDiagonal(tuple(block.scale(factor) for block in self.blocks))

    def inverse_quadratic(self, jacobian: Jacobian) -> Tensor:
        """The sum over blocks: `sum_l J_l A_l^{-1} J_l^T`."""
        parts = zip(self.blocks, jacobian.split(self.sizes), strict=True)
        return torch.stack([block.inverse_quadratic(part) for block, part in parts]).sum(0)

    def _pieces(self, delta: Tensor) -> Sequence[tuple[SymmetricOperator, Tensor]]:
        if delta.ndim == 0:
            return [(block, delta) for block in self.blocks]
        if len(delta) == len(self.blocks):  # one for each block, or blocks of one weight, which is the same
            return list(zip(self.blocks, delta.unbind(), strict=True))
        return list(zip(self.blocks, delta.split(self.sizes), strict=True))

    def _map(self, function: Callable[[Tensor], Tensor]) -> BlockDiagonal:
        return BlockDiagonal(tuple(block._map(function) for block in self.blocks))

    def _add(self, other: SymmetricOperator) -> SymmetricOperator:
        """Block by block.

        Raises:
            ValueError: if the blocks are of other sizes.
        """
        if not isinstance(other, BlockDiagonal):
            return super()._add(other)
        if other.sizes != self.sizes:
            raise ValueError(f"Blocks of {self.sizes} and of {other.sizes} weights do not add up.")
        return BlockDiagonal(tuple(one + two for one, two in zip(self.blocks, other.blocks, strict=True)))

    def _shift(self, delta: Tensor) -> BlockDiagonal:
        return BlockDiagonal(tuple(block.shift(d) for block, d in self._pieces(delta)))

    def _each(self, function: Callable[[SymmetricOperator, Tensor], Tensor], vectors: Tensor) -> Tensor:
        pieces = zip(self.blocks, vectors.split(self.sizes), strict=True)
        return torch.cat([function(block, v) for block, v in pieces])

    def _matmul(self, vectors: Tensor) -> Tensor:
        return self._each(lambda block, v: block.matmul(v), vectors)

    def _inverse_root(self, vectors: Tensor) -> Tensor:
        return self._each(lambda block, v: block.inverse_root(v), vectors)

    def _inverse_root_transpose(self, vectors: Tensor) -> Tensor:
        return self._each(lambda block, v: block.inverse_root_transpose(v), vectors)
