"""The surgeons, one for each structure: weights and their covariance, given that some of them are zero."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import singledispatch
from typing import final

import torch
from torch import Tensor

from lapkit.curvature import BlockDiagonal, Diagonal, SymmetricOperator
from lapkit.curvature.memory import default_budget


class Surgeon(ABC):
    """Weights and their covariance, given that some of them are zero.

    Attributes:
        weights: as they are now, `(P,)`.
        variance: of those that are left, `(P,)`; without meaning for those that have gone.
    """

    weights: Tensor
    variance: Tensor

    @abstractmethod
    def reduction(self, places: Tensor) -> Tensor:
        """What the last removal has taken off `C_QQ` of some weights, `(Q, Q)`."""

    @abstractmethod
    def remove(self, places: Tensor) -> None:
        """Fix weights to zero, whatever their number: `w <- w - C_:Q C_QQ^{-1} w_Q`, `C <- C - C_:Q C_QQ^{-1} C_Q:`."""


@final
class DiagonalSurgeon(Surgeon):
    """Of a diagonal matrix: no weight has to do with another.

    Args:
        precision: positive.
        weights: `(P,)`.
    """

    def __init__(self, precision: Diagonal, weights: Tensor) -> None:
        self.weights, self.variance = weights.clone(), precision.inverse_diagonal()

    def reduction(self, places: Tensor) -> Tensor:
        """See `Surgeon.reduction`."""
        return self.variance.new_zeros(len(places), len(places))

    def remove(self, places: Tensor) -> None:
        """See `Surgeon.remove`."""
        self.weights[places] = 0


@final
class DenseSurgeon(Surgeon):
    """Of any matrix, by solves with it: `C = P^{-1} - G G^T`, where G has a column for each weight that has gone.

    The inverse is never formed; this is a pivoted Cholesky factorisation of it, whose pivots are the removals.

    Args:
        precision: positive definite.
        weights: `(P,)`.
    """

    def __init__(self, precision: SymmetricOperator, weights: Tensor) -> None:
        self.precision, self.weights = precision, weights.clone()
        self.variance = precision.inverse_diagonal().clone()
        self.factor = weights.new_empty(0, len(weights))  # G^T, of which the first `gone` rows are filled
        self.gone = self.before = 0  # before the last removal

    def reduction(self, places: Tensor) -> Tensor:
        """See `Surgeon.reduction`."""
        own = self.factor[self.before : self.gone, places]
        return own.T @ own

    def remove(self, places: Tensor) -> None:
        """See `Surgeon.remove`.

        Raises:
            ValueError: if too few digits are left of the covariance.
        """
        self.before = self.gone
        if not len(places):
            return
        self._reserve(self.gone + len(places))
        unit = self.weights.new_zeros(len(self.weights), len(places))
        unit[places, torch.arange(len(places), device=places.device)] = 1
        before = self.factor[: self.gone]
        columns = self.precision.solve(unit).T - before[:, places].T @ before  # (Q, P)
        root, failed = torch.linalg.cholesky_ex((columns[:, places] + columns[:, places].T) / 2)
        if failed.any():
            raise ValueError(
                f"After {self.gone} removals the covariance has lost its digits. A larger prior precision helps."
            )
        new = torch.linalg.solve_triangular(root, columns, upper=False)
        half = torch.linalg.solve_triangular(root, self.weights[places][:, None], upper=False)[:, 0]
        self.weights -= new.T @ half
        self.weights[places] = 0
        self.variance -= new.square().sum(0)
        self.factor[self.gone : self.gone + len(places)] = new
        self.gone += len(places)

    def _reserve(self, rows: int) -> None:
        """Memory grows by half, which copies little."""
        if rows > len(self.factor):
            size = min(len(self.weights), max(rows, 64 + len(self.factor) * 3 // 2))
            check_room(rows * len(self.weights), self.weights.device)
            larger = self.factor.new_empty(size, self.factor.shape[1])
            larger[: self.gone] = self.factor[: self.gone]
            self.factor = larger


def check_room(numbers: int, device: torch.device) -> None:
    """Refuse what memory has no room for.

    Args:
        numbers: in double precision.
        device: where.

    Raises:
        ValueError: if they do not fit.
    """
    if 8 * numbers > 2 * default_budget(device):
        raise ValueError(
            f"Removals one after the other would take {8 * numbers / 2**30:.1f} GiB, more than is free. Prune in one "
            "step (step=None), or in rounds with new curvature (prune_gradually)."
        )


@final
class BlockSurgeon(Surgeon):
    """Of a block-diagonal matrix: one surgeon for each block.

    Args:
        precision: blocks.
        weights: `(P,)`.
    """

    def __init__(self, precision: BlockDiagonal, weights: Tensor) -> None:
        pairs = zip(precision.blocks, weights.split(precision.sizes), strict=True)
        self.parts: Sequence[Surgeon] = [surgeon(block, part) for block, part in pairs]
        self.starts = torch.tensor([0, *precision.sizes]).cumsum(0).tolist()
        self.weights, self.variance = weights.clone(), torch.cat([p.variance for p in self.parts])

    def reduction(self, places: Tensor) -> Tensor:
        """See `Surgeon.reduction`."""
        found = self.weights.new_zeros(len(places), len(places))
        for part, own, here, _ in self._by_block(places):
            if len(own):
                found[here[:, None], here] = part.reduction(own)
        return found

    def remove(self, places: Tensor) -> None:
        """See `Surgeon.remove`."""
        for part, own, _, whole in self._by_block(places):
            part.remove(own)
            self.weights[whole], self.variance[whole] = part.weights, part.variance

    def _by_block(self, places: Tensor) -> Iterator[tuple[Surgeon, Tensor, Tensor, slice]]:
        """Each block, the places in it, which they are, and where the block is."""
        for part, start, end in zip(self.parts, self.starts, self.starts[1:], strict=False):
            here = ((places >= start) & (places < end)).nonzero()[:, 0]
            yield part, places[here] - start, here, slice(start, end)


@singledispatch
def surgeon(precision: SymmetricOperator, weights: Tensor) -> Surgeon:
    """The surgeon of a matrix.

    Args:
        precision: positive definite.
        weights: `(P,)`, none of them gone yet.

    Returns:
        The surgeon.
    """
    return DenseSurgeon(precision, weights)


@surgeon.register
def _(precision: Diagonal, weights: Tensor) -> Surgeon:
    return DiagonalSurgeon(precision, weights)


@surgeon.register
def _(precision: BlockDiagonal, weights: Tensor) -> Surgeon:
    return BlockSurgeon(precision, weights)
