"""How much may go: how many units in all, and at most how many of each pool; exactly, also under ties."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor, nn

from lapkit.choices import choice
from lapkit.curvature.callers import callers_level
from lapkit.curvature.parameters import unwrapped
from lapkit.pruning.kinds import TRANSPOSED, places_of
from lapkit.pruning.masks import place
from lapkit.pruning.quadratic import Quadratic
from lapkit.pruning.units import Units

Sparsity = float | tuple[int, int]


@dataclass(frozen=True, eq=False)
class Room:
    """A limit on what is removed.

    Args:
        pools: the pool of each unit, `(U,)`.
        most: how many of each pool may go, `(G,)`.
        total: how many go in all; None leaves it to the scores.
        below: without a total, the score below which units go.
    """

    pools: Tensor
    most: Tensor
    total: int | None
    below: float = 0.0

    def without(self, gone: Tensor) -> Room:
        """What is left once some units, Boolean `(U,)`, have gone; the others keep their order."""
        most = (self.most - torch.bincount(self.pools[gone], minlength=len(self.most))).clamp_min(0)
        total = None if self.total is None else max(self.total - int(gone.sum()), 0)
        return replace(self, pools=self.pools[~gone], most=most, total=total)

    def among(self, units: Tensor) -> Room:
        """The same limits for some of the units only; the others stay in any case."""
        return replace(self, pools=self.pools[units])

    def lowest(self, scores: Tensor, count: int | None = None) -> Tensor:
        """The units with the lowest scores for which there is room; of equal ones the first.

        Args:
            scores: `(U,)`.
            count: how many at most; by default as many as there is room for, or those below the limit.

        Returns:
            Which, Boolean `(U,)`.

        Raises:
            ValueError: if a score is NaN, or there is no room for so many.
        """
        if scores.isnan().any():
            raise ValueError("Some scores are NaN; the ranking would be arbitrary.")
        order = scores.argsort(stable=True)
        by_pool = order[self.pools[order].argsort(stable=True)]
        starts = torch.bincount(self.pools, minlength=len(self.most)).cumsum(0).roll(1)
        starts[0] = 0
        rank = torch.empty_like(order)
        rank[by_pool] = torch.arange(len(order), device=order.device) - starts[self.pools[by_pool]]
        fits = rank < self.most[self.pools]
        if self.total is None:
            fits &= scores < self.below
        elif int(fits.sum()) < self.total:
            raise ValueError(
                f"{self.total} units are to go, and there is room for {int(fits.sum())}. Ask for a lower sparsity, or "
                "lower the floor."
            )
        limit = min(c for c in (self.total, count, len(order)) if c is not None)
        chosen = torch.zeros_like(fits)
        chosen[order[fits[order]][:limit]] = True
        return chosen


def room_for(
    sparsity: Sparsity | None, threshold: float | None, scope: str, floor: float, units: Units, quadratic: Quadratic
) -> Room:
    """The limits of a sparsity, for units over whole tensors; warns where a floor takes less than was asked for.

    Args:
        sparsity: a fraction of the units, or `(n, m)` to keep n of every m weights along the inputs.
        threshold: in its place, the score below which units go.
        scope: "global", "layer" or "row": within what units are compared.
        floor: the fraction of each layer, or row, that stays, and at least one unit.
        units: all there were at first.
        quadratic: says which tensors they are in.

    Returns:
        The room.

    Raises:
        ValueError: if the sparsity is out of range, or scope and units do not go together.
    """
    pool = choice(("global", "layer", "row"), scope, "scope")
    if not 0 <= floor < 1:
        raise ValueError(f"The floor is the fraction of each layer that stays, in [0, 1), got {floor}.")
    if isinstance(sparsity, tuple):
        return _pattern(sparsity, units, quadratic)
    pools = _numbered(_rows(quadratic), units) if pool == "row" else units.layers
    sizes = torch.bincount(pools)
    most = (sizes - (floor * sizes - 1e-9).ceil().long().clamp_min(1)).clamp_min(0)  # of a layer with none that counts
    if sparsity is None:
        return Room(pools, most, None, 0.0 if threshold is None else threshold)
    if not isinstance(sparsity, Real) or not 0 <= sparsity < 1:
        raise ValueError(f"A sparsity is a fraction in [0, 1), or (n, m), got {sparsity!r}.")
    if pool == "global":
        return Room(pools, most, round(sparsity * len(units)))
    wanted = torch.tensor([min(round(sparsity * n), max(n - 1, 0)) for n in sizes.tolist()], device=most.device)
    most = torch.minimum(most, wanted)
    if (most < wanted).any():
        warnings.warn(
            f"The floor {floor:g} keeps {int((wanted - most).sum())} units that a sparsity of {float(sparsity):g} in "
            f"each {pool} would take: {int(most.sum())} of {len(units)} go, {int(most.sum()) / len(units):.1%}. Ask "
            "for a lower sparsity, or lower the floor.",
            stacklevel=callers_level(),
        )
    return Room(pools, most, int(most.sum()))


def _pattern(pattern: tuple[int, int], units: Units, quadratic: Quadratic) -> Room:
    """N of every M consecutive inputs stay.

    Raises:
        ValueError: if that is no pattern, or the inputs of a layer do not come in groups of M.
    """
    kept, size = pattern
    if not (isinstance(kept, int) and isinstance(size, int) and 0 < kept < size):
        raise ValueError(f"A pattern (n, m) keeps n of every m weights, integers with 0 < n < m, got {pattern}.")
    numbers, parameters, last = torch.full((quadratic.whole.numel,), -1), quadratic.whole, 0
    for name in units.names:
        places = places_of(parameters, name).movedim(1 - _output_axis(quadratic.model, name), -1)
        if places.shape[-1] % size:
            raise ValueError(f"{name} has {places.shape[-1]} inputs, not a multiple of {size}: put it into ignore.")
        groups = places.reshape(-1, size).cpu()
        numbers[groups] = torch.arange(len(groups))[:, None] + last
        last += len(groups)
    pools = _numbered(numbers, units)
    return Room(pools, torch.full((last,), size - kept, device=pools.device), last * (size - kept))


def _rows(quadratic: Quadratic) -> Tensor:
    """The number of the row that each weight is in, over all tensors."""
    numbers, parameters, last = torch.full((quadratic.whole.numel,), -1), quadratic.whole, 0
    for name, tensor in zip(parameters.names, parameters.tensors, strict=True):
        if tensor.ndim > 1:
            rows = places_of(parameters, name).movedim(_output_axis(quadratic.model, name), 0).flatten(1).cpu()
            numbers[rows] = torch.arange(len(rows))[:, None] + last
            last += len(rows)
    return numbers


def _output_axis(model: nn.Module, name: str) -> int:
    return int(isinstance(place(unwrapped(model), name)[0], TRANSPOSED))


def _numbered(numbers: Tensor, units: Units) -> Tensor:
    """Pools of units, from those of weights.

    Raises:
        ValueError: if units are larger than a weight.
    """
    if not units.single:
        raise ValueError("Rows and patterns are of single weights: unit='weight'.")
    return numbers.to(units.members.device)[units.members].unique(return_inverse=True)[1]
