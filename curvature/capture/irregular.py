"""Layouts that follow no rule: tokens sorted by expert, the nodes of a batch of graphs, packed sequences.

Each position's owner is read off the factors that its cotangent was scaled by, as for regular layouts; a base of eight
factors gives one digit of the example's number in each backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

BASE = 8  # factors 2^-4 ... 2^3, which scale exactly


@dataclass(frozen=True, eq=False)
class IrregularLayout:
    """Examples along one axis of a tensor, in any order and number.

    Args:
        axis: which one.
        owner: the example of each position, `(L,)`.
    """

    axis: int
    owner: Tensor

    def owners(self, length: int, examples: int) -> Tensor:
        """The example that each position along the axis belongs to."""
        return self.owner

    def canonical(self, tensor: Tensor, examples: int) -> Tensor:
        """`(K, *shape)` to `(K, N, R, *rest)`: the axis of the examples first, padded with zeros to R positions."""
        moved = tensor.movedim(self.axis + 1, 1)
        index, kept = self._places
        if len(index) != examples:
            missing = (0, 0, 0, examples - len(index))
            index, kept = (torch.nn.functional.pad(t, missing) for t in (index, kept))
        gathered = moved[:, index.to(tensor.device)]
        return gathered * kept.to(gathered).reshape(*kept.shape, *[1] * (moved.ndim - 2))

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Positions of each example up to the last that has any, `(N', R)`, and which of them are no padding."""
        owner = self.owner
        order = owner.argsort(stable=True)
        counts = torch.bincount(owner)
        number = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner[order]]
        index = torch.zeros(len(counts), max(int(counts.max()), 1), dtype=torch.long)
        kept = torch.zeros_like(index, dtype=torch.bool)
        index[owner[order], number] = order
        kept[owner[order], number] = True
        return index, kept


def digit_factors(examples: int, digit: int, like: Tensor) -> Tensor:
    """Powers of two `(N,)` that spell one digit of each example's number."""
    return torch.exp2((torch.arange(examples) // BASE**digit % BASE).double() - BASE // 2).to(like)


def digits(examples: int) -> int:
    """How many digits the largest of the examples' numbers has."""
    count = 1
    while BASE**count < examples:
        count += 1
    return count


def scaled_alike(one: Tensor, two: Tensor, factors: Tensor, axis: int, noise: float) -> bool:
    """Whether `two` is `one` times powers of two, position by position along an axis, up to the order of summation.

    Powers of two scale exactly, and are divided out again. Weak examples are compared with themselves, not with the
    strongest; a wrong factor is off by half of an example's own size at least. Where sums are taken in another order
    each time, what is zero but for rounding has any factor: `noise` units of rounding of the strongest are allowed.
    """
    eps = torch.finfo(one.dtype).eps
    difference, size = (t.abs().movedim(axis, 0).reshape(t.shape[axis], -1).amax(1) for t in (two / factors - one, one))
    return bool((difference <= min(1e3 * eps, 0.02) * size + noise * eps * size.max()).all())


def irregular_layout(one: Tensor, scaled: list[Tensor], examples: int, noise: float = 0) -> IrregularLayout | None:
    """The owners along the first axis on which every position belongs to a single example.

    Args:
        one: a node's cotangent.
        scaled: the same after the output's cotangent was multiplied by `digit_factors`, for each digit.
        examples: their number N.
        noise: see `scaled_alike`.

    Returns:
        The layout, or None if examples mix. A position at which nothing arrives counts as the first example's: it
        takes no part in any derivative, and has gone into the layer like the others.
    """
    if not one.numel():
        return None
    for axis, length in enumerate(one.shape):
        rows = one.movedim(axis, 0).reshape(length, -1)
        peak = rows.abs().argmax(1, keepdim=True)
        top = rows.gather(1, peak)
        alive = top[:, 0] != 0
        if not alive.any():
            continue
        owner = torch.zeros(len(rows), dtype=torch.long, device=one.device)
        fits = True
        for digit, two in enumerate(scaled):
            other = two.movedim(axis, 0).reshape(length, -1)
            power = (other.gather(1, peak) / torch.where(alive[:, None], top, 1)).abs().log2().round()
            power = torch.where(alive[:, None], power, 0)
            fits = fits and scaled_alike(rows, other, torch.exp2(power), 0, noise)
            fits = fits and bool(((power >= -BASE // 2) & (power < BASE // 2)).all())
            owner += (power[:, 0].long() + BASE // 2) * BASE**digit
        owner = torch.where(alive, owner, 0)
        if fits and bool((owner < examples).all()):
            return IrregularLayout(axis, owner.cpu())
    return None
