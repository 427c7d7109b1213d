"""The Jacobian in all parameters of a network: one part for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from lapkit.curvature.jacobians.jacobian import Jacobian


@dataclass(frozen=True, eq=False)
class NetworkJacobian(Jacobian):
    """The Jacobians of several parameters side by side, in flat order.

    Args:
        parts: one for each parameter, with the same columns and examples.

    Raises:
        ValueError: if columns or examples differ.
    """

    parts: tuple[Jacobian, ...]

    def __post_init__(self) -> None:
        if len({part.shape[:2] for part in self.parts}) != 1:
            raise ValueError(f"Parts must share columns and examples, got {[p.shape for p in self.parts]}.")

    @property
    def budget(self) -> int:
        """See `Jacobian.budget`."""
        return min(part.budget for part in self.parts)

    @property
    def sizes(self) -> list[int]:
        """Number of weights of each part."""
        return [part.shape[2] for part in self.parts]

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(K, N, P)`."""
        return (*self.parts[0].shape[:2], sum(self.sizes))

    def to_dense(self) -> Tensor:
        """See `Jacobian.to_dense`."""
        return torch.cat([part.to_dense() for part in self.parts], dim=-1)

    def square_sum(self) -> Tensor:
        """See `Jacobian.square_sum`."""
        return torch.cat([part.square_sum() for part in self.parts])

    def square_norms(self) -> Tensor:
        """See `Jacobian.square_norms`."""
        return torch.stack([part.square_norms() for part in self.parts]).sum(0)

    def weighted_gram(self, weights: Tensor) -> Tensor:
        """See `Jacobian.weighted_gram`."""
        pieces = zip(self.parts, weights.split(self.sizes), strict=True)
        return torch.stack([part.weighted_gram(w) for part, w in pieces]).sum(0)

    def _gram(self, other: Jacobian | None) -> Tensor:
        """The sum over parameters; expanded if the other is not made of the same."""
        if other is None:
            return reduce(torch.add, (part.gram() for part in self.parts))
        if not isinstance(other, NetworkJacobian) or other.sizes != self.sizes:
            return super()._gram(other)
        return reduce(torch.add, (one.gram(two) for one, two in zip(self.parts, other.parts, strict=True)))

    def project(self, vectors: Tensor) -> Tensor:
        """See `Jacobian.project`."""
        pieces = zip(self.parts, vectors.split(self.sizes), strict=True)
        return reduce(torch.add, (part.project(v) for part, v in pieces))

    def pull_back(self, cotangent: Tensor) -> Tensor:
        """See `Jacobian.pull_back`."""
        return torch.cat([part.pull_back(cotangent) for part in self.parts])

    def pull_back_all(self, cotangents: Tensor) -> Tensor:
        """See `Jacobian.pull_back_all`."""
        return torch.cat([part.pull_back_all(cotangents) for part in self.parts])

    def select(self, part: slice) -> NetworkJacobian:
        """See `Jacobian.select`."""
        return NetworkJacobian(tuple(jacobian.select(part) for jacobian in self.parts))

    def split(self, sizes: Sequence[int]) -> Iterator[Jacobian]:
        """Whole parts, gathered until each size is reached.

        Raises:
            ValueError: if a size ends inside a part, or the sizes do not add up to P.
        """
        if sum(sizes) != sum(self.sizes):
            raise ValueError(f"Groups of {list(sizes)} weights do not make up parts of {self.sizes}.")
        parts = iter(self.parts)
        for size in sizes:
            group: list[Jacobian] = []
            while sum(part.shape[2] for part in group) < size:
                group.append(next(parts))
            if sum(part.shape[2] for part in group) != size:
                raise ValueError(f"Cannot cut parts of {self.sizes} weights into groups of {list(sizes)}.")
            yield group[0] if len(group) == 1 else NetworkJacobian(tuple(group))
