"""The surgeon step by step: after each removal the survivors make up for it, and the next is chosen among them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lapkit.pruning.criteria import Criterion, prior_terms
from lapkit.pruning.marginals import inverse_blocks, quadratic_and_logdet
from lapkit.pruning.quadratic import Quadratic
from lapkit.pruning.room import Room
from lapkit.pruning.surgeons import Surgeon, check_room, surgeon
from lapkit.pruning.units import Units


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
    groups = () if units.single else units.groups()
    blocks = None if units.single else inverse_blocks(quadratic.precision, groups)
    while len(left) and (room.total is None or room.total > 0):
        own, marginals = _marginals(hand, quadratic, units, left, dead, blocks)
        chosen = room.lowest(criterion.removal(*marginals), step)
        if not chosen.any():
            break
        now = own.union(chosen, quadratic.size) & ~dead
        hand.remove(now.nonzero()[:, 0])
        dead |= now
        room, left = room.without(chosen), left[~chosen]
        if blocks is not None:
            for u in left.tolist():
                blocks[u] = blocks[u] - hand.reduction(groups[u])
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
        found.append(quadratic_and_logdet(blocks[u][alive][:, alive], hand.weights[places]))
        members.append(places)
    counts = torch.tensor([len(m) for m in members], device=dead.device)
    own = Units(torch.cat(members), counts, units.layers[left], units.names)
    squares, logdets = (torch.stack([f[i] for f in found]) for i in (0, 1))
    return own, (squares, logdets, prior_terms(quadratic, own))
