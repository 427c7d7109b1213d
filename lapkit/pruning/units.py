"""What is pruned as a whole: groups of weights, each of which is kept or removed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Units:
    """U groups of weights, each of which is kept or removed as a whole; a weight may be in several.

    Args:
        members: flat places of the weights, unit by unit, `(E,)`.
        counts: how many each unit has, at least one, `(U,)`.
        layers: the number of the layer that a unit is in, `(U,)`.
        names: of the layers.

    Raises:
        ValueError: if the shapes do not fit.
    """

    members: Tensor
    counts: Tensor
    layers: Tensor
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if int(self.counts.sum()) != len(self.members) or self.layers.shape != self.counts.shape:
            raise ValueError(
                f"{len(self.counts)} units of {int(self.counts.sum())} weights in {len(self.layers)} layers do not "
                f"match {len(self.members)} members."
            )

    @classmethod
    def of(cls, groups: Iterable[Tensor], layers: Sequence[int], names: Sequence[str]) -> Units:
        """Units from the flat places of each.

        Args:
            groups: one tensor of places for each unit; a place given twice counts once.
            layers: one number for each unit, into `names`.
            names: of the layers.

        Returns:
            The units.

        Raises:
            ValueError: if there is no unit, or one is empty.
        """
        listed = [torch.as_tensor(g).reshape(-1).unique() for g in groups]
        if not listed or not all(len(g) for g in listed):
            raise ValueError(f"Units are groups of at least one weight, got {len(listed)} groups.")
        counts = torch.tensor([len(g) for g in listed], device=listed[0].device)
        return cls(torch.cat(listed), counts, torch.as_tensor(list(layers), device=counts.device), tuple(names))

    def __len__(self) -> int:
        """The number of units U."""
        return len(self.counts)

    @property
    def single(self) -> bool:
        """Whether every unit is one weight."""
        return len(self.members) == len(self.counts)

    @property
    def owner(self) -> Tensor:
        """The unit of each member, `(E,)`."""
        return torch.arange(len(self), device=self.counts.device).repeat_interleave(self.counts)

    def total(self, values: Tensor) -> Tensor:
        """Sums over units of one value for each member, `(E,) -> (U,)`."""
        return torch.zeros(len(self), dtype=values.dtype, device=values.device).index_add(0, self.owner, values)

    def groups(self) -> tuple[Tensor, ...]:
        """The members of each unit."""
        return self.members.split(self.counts.tolist())

    def moved(self, members: Tensor) -> tuple[Units, Tensor]:
        """The same units at other places, without the members at -1 and the units that have none left.

        Args:
            members: the new places, `(E,)`.

        Returns:
            The units, and the numbers of those that are left.
        """
        here = members >= 0
        counts = self.total(here.long())
        left = (counts > 0).nonzero()[:, 0]
        return Units(members[here], counts[left], self.layers[left], self.names), left

    def union(self, chosen: Tensor, size: int) -> Tensor:
        """Which of `size` weights are in one of the chosen units, Boolean; chosen is Boolean `(U,)`."""
        gone = torch.zeros(size, dtype=torch.bool, device=self.members.device)
        gone[self.members[chosen[self.owner]]] = True
        return gone
