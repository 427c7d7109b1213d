"""The surgeon step by step: after each removal the survivors make up for it, and the next is chosen among them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import singledispatch
from typing import final

import torch
from torch import Tensor

from lapkit.curvature import BlockDiagonal, Diagonal, SymmetricOperator
from lapkit.curvature.memory import default_budget
from lapkit.pruning.criteria import Criterion, prior_terms
from lapkit.pruning.quadratic import Quadratic
from lapkit.pruning.restriction import inverse_block, quadratic_and_logdet
from lapkit.pruning.room import Room
from lapkit.pruning.units import Units


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
        """`[P^{-1} - C]_QQ` of some weights that are left, `(Q, Q)`: what the removals have taken off."""

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
        self.gone = 0

    def reduction(self, places: Tensor) -> Tensor:
        """See `Surgeon.reduction`."""
        own = self.factor[: self.gone, places]
        return own.T @ own

    def remove(self, places: Tensor) -> None:
        """See `Surgeon.remove`.

        Raises:
            ValueError: if too few digits are left of the covariance.
        """
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
            found[here[:, None], here] = part.reduction(own)
        return found

    def remove(self, places: Tensor) -> None:
        """See `Surgeon.remove`."""
        for part, own, _, whole in self._by_block(places):
            part.remove(own)
            self.weights[whole], self.variance[whole] = part.weights, part.variance

    def _by_block(self, places: Tensor) -> Iterator[tuple[Surgeon, Tensor, Tensor, slice]]:
        """Each block that has some of the places, these, which they are, and where the block is."""
        for part, start, end in zip(self.parts, self.starts, self.starts[1:], strict=False):
            here = ((places >= start) & (places < end)).nonzero()[:, 0]
            if len(here):
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


def one_after_the_other(quadratic: Quadratic, units: Units, room: Room, criterion: Criterion, step: int) -> Tensor:
    """Remove a few units at a time, by scores that are those of what is left.

    Args:
        quadratic: the objective.
        units: that may go.
        room: for how many.
        criterion: one that has a `removal`.
        step: how many units at a time.

    Returns:
        Which units have gone, Boolean `(U,)`.

    Raises:
        ValueError: if the criterion does not know of survivors that make up for others, or digits are lost.

    Reference:
        Frantar and Alistarh, Optimal brain compression, 2022, lemma 1.
    """
    if criterion.removal is None:
        raise ValueError("Removals one after the other need a criterion that compensates: 'obs' or 'evidence'.")
    hand = surgeon(quadratic.precision, quadratic.weights)
    dead = torch.zeros(quadratic.size, dtype=torch.bool, device=quadratic.weights.device)
    left = torch.arange(len(units), device=dead.device)
    if not units.single:
        check_room(int(units.counts.square().sum()), dead.device)
    blocks = None if units.single else [inverse_block(quadratic.precision, group) for group in units.groups()]
    while len(left) and (room.total is None or room.total > 0):
        own, marginals = _marginals(hand, quadratic, units, left, dead, blocks)
        chosen = room.lowest(criterion.removal(*marginals), step)
        if not chosen.any():
            break
        now = own.union(chosen, quadratic.size) & ~dead
        hand.remove(now.nonzero()[:, 0])
        dead |= now
        room, left = room.without(chosen), left[~chosen]
    gone = torch.ones(len(units), dtype=torch.bool, device=dead.device)
    gone[left] = False
    return gone


def _marginals(
    hand: Surgeon, quadratic: Quadratic, units: Units, left: Tensor, dead: Tensor, blocks: Sequence[Tensor] | None
) -> tuple[Units, tuple[Tensor, Tensor, Tensor]]:
    """The units that are left with their living members, and `w^T C^{-1} w`, `log det C` and what the prior says.

    Raises:
        ValueError: if digits are lost.
    """
    if blocks is None:
        own = Units(units.members[left], units.counts[left], units.layers[left], units.names)
        variance = hand.variance[own.members]
        if not (variance > 0).all():
            raise ValueError("The covariance of the survivors has lost its digits. A larger prior precision helps.")
        return own, (hand.weights[own.members].square() / variance, variance.log(), prior_terms(quadratic, own))
    groups, found = units.groups(), []
    members: list[Tensor] = []
    for u in left.tolist():
        alive = ~dead[groups[u]]
        places = groups[u][alive]
        covariance = blocks[u][alive][:, alive] - hand.reduction(places)
        found.append(quadratic_and_logdet(covariance, hand.weights[places]))
        members.append(places)
    counts = torch.tensor([len(m) for m in members], device=dead.device)
    own = Units(torch.cat(members), counts, units.layers[left], units.names)
    squares, logdets = (torch.stack([f[i] for f in found]) for i in (0, 1))
    return own, (squares, logdets, prior_terms(quadratic, own))
