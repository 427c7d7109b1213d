"""Pruning in one call: what to rank, by what, within what, and how much of it goes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lapkit.choices import choice
from lapkit.curvature.parameters import unwrapped
from lapkit.laplace import Laplace
from lapkit.pruning.criteria import Criterion, criterion_named
from lapkit.pruning.kinds import UNITS, candidates
from lapkit.pruning.quadratic import Quadratic
from lapkit.pruning.result import PruneResult
from lapkit.pruning.room import Sparsity, room_for
from lapkit.pruning.sequential import one_after_the_other
from lapkit.pruning.units import Units


def prune(
    la: Laplace | Quadratic,
    sparsity: Sparsity | None = None,
    criterion: str | Criterion = "obs",
    *,
    threshold: float | None = None,
    unit: str | Units = "weight",
    scope: str = "global",
    step: float | None = None,
    compensate: bool | None = None,
    floor: float = 0.0,
    ignore: Iterable[str] = (),
) -> PruneResult:
    """Decide which weights go, and what the others become. The network stays as it is until `result.apply()`.

    The curvature has the structure of the fitted `Laplace`: with "diag" no weight makes up for another, with "kron" and
    "blockdiag" those of a layer do, with "full" and "lowrank" all of them.

    Args:
        la: fitted, with the prior that the network was trained with or one of the largest evidence; or a quadratic
            model, such as that of `woodfisher`.
        sparsity: the fraction of all units that is gone afterwards, in [0, 1) (the `amount` of `pruning_masks`), or
            `(n, m)` to keep n of every m weights along the inputs of a layer. Of a subnetwork, units of which no weight
            is random count only if they are zero, as after an earlier pruning. None leaves it to the scores.
        criterion: a key of `CRITERIA`: "obs", "evidence", "obd", "opd", "joint", "magnitude" or "random"; or a
            `Criterion`.
        threshold: without a sparsity, the score below which units go. The criterion "evidence" has one by itself, zero:
            it prunes while the evidence of the quadratic model rises. That takes a prior precision for each weight;
            under one that many share, set after the training, far too many go: read `report`.
        unit: a key of `UNITS`: "weight", "row" (of a weight matrix, or a filter, with its bias), "neuron" or "filter"
            (with all that leads out of it, for sequential networks), "head"; or `Units` over the flat vector of the
            weights.
        scope: "global", "layer" or "row": within what units compete.
        step: the fraction of all units that goes before the rest is looked at anew, with "obs" and "evidence"; all at
            once by default.
        compensate: whether the surviving weights make up for the others, as far as the curvature knows how; by default
            as the criterion assumes.
        floor: the fraction of each layer's units (or each row's, where that is the scope) that stays, whatever their
            scores, and at least one.
        ignore: names of parameters or modules of which no unit goes. They may lose what belongs to a unit of another
            layer, and may make up for others. Of biases and normalisation nothing goes, except as parts of a unit.

    Returns:
        Masks, new weights and the predicted cost.

    Raises:
        RuntimeError: before `fit`, or if the network's weights are not those that were fitted.
        ValueError: if a setting is unknown or out of range, or settings do not go together.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(50, 8), torch.arange(50) % 3
        >>> la = Laplace(nn.Linear(8, 3), "classification", "all", "full").fit([(x, y)])
        >>> result = prune(la, 0.5)
        >>> result.units, int((result.weights["weight"] == 0).sum())
        ((24, 12), 12)

    Reference:
        Hassibi and Stork, 1992; Singh and Alistarh, WoodFisher, 2020; Dhahri et al., Shaving weights with Occam's
        razor, 2024.
    """
    chosen = criterion_named(criterion)
    if threshold is not None and math.isnan(threshold):
        raise ValueError("The threshold is NaN; nothing is below it.")
    if (sparsity is not None and threshold is not None) or (sparsity is None and threshold is None and not chosen.gain):
        raise ValueError(
            f"Expected a sparsity or a threshold, got {sparsity} and {threshold}; criterion='evidence' goes without."
        )
    quadratic = la if isinstance(la, Quadratic) else Quadratic.of(la)
    everything = _units(quadratic, unit, ignore)
    if not isinstance(sparsity, tuple):  # of which the groups are whole
        everything = _that_count(quadratic, everything)
    own, left = everything.moved(quadratic.local(everything.members))
    before = _gone_before(quadratic, everything, left)
    random = torch.zeros_like(before)
    random[left] = True
    room = room_for(sparsity, threshold, scope, floor, everything, quadratic).without(before).among(random[~before])
    scores = chosen.score(quadratic, own)
    if step is None:
        going = room.lowest(scores)
    else:
        if not 0 < step <= 1:
            raise ValueError(f"A step is a fraction of all units, in (0, 1], got {step}.")
        going = one_after_the_other(quadratic, own, room, chosen, max(1, round(step * len(everything))))
    gone = own.union(going, quadratic.size)
    compensate = chosen.compensates if compensate is None else compensate
    change = quadratic.compensated(gone) if compensate else quadratic.zeroed(gone)
    whole = everything.union(before, quadratic.whole.numel)
    whole[quadratic.places[gone]] = True
    return PruneResult(quadratic, change, whole, scores, (len(everything), int(before.sum()) + int(going.sum())))


def _units(quadratic: Quadratic, unit: str | Units, ignore: Iterable[str]) -> Units:
    """The units as they are over whole tensors.

    Raises:
        ValueError: if they are unknown, or places are out of range.
    """
    if isinstance(unit, Units):
        size = quadratic.whole.numel
        if int(unit.members.min()) < 0 or int(unit.members.max()) >= size:
            raise ValueError(f"Members of units are places 0 to {size - 1} in the flat vector of the weights.")
        return unit
    model = unwrapped(quadratic.model)
    return choice(UNITS, unit, "unit")(model, quadratic.whole, candidates(model, quadratic.whole, ignore))


def _that_count(quadratic: Quadratic, units: Units) -> Units:
    """Those that may go and those that have gone: fixed weights outside of a subnetwork are neither."""
    _, left = units.moved(quadratic.local(units.members))
    count = _gone_before(quadratic, units, left)
    count[left] = True
    return units.moved(torch.where(count[units.owner], units.members, -1))[0]


def _gone_before(quadratic: Quadratic, units: Units, left: Tensor) -> Tensor:
    """Units that an earlier pruning has taken: none of their weights is random any more, and all are zero."""
    zero = units.total((quadratic.whole.vector()[units.members] != 0).long()) == 0
    zero[left] = False
    return zero
