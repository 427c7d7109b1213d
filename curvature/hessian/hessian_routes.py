"""Second derivatives of weights through those of the outputs they make, for weights that enter once and linearly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lapkit.curvature.capture import internals
from lapkit.curvature.capture.backprop import Backprop
from lapkit.curvature.jacobians.embedding import EmbeddingJacobian
from lapkit.curvature.jacobians.outer_product import OuterProduct


@dataclass(frozen=True, eq=False)
class OutputRoute(ABC):
    """From `d^2 loss / dz dz` at the node where a weight enters to the diagonal of the weight's Hessian.

    Args:
        edge: the output z of the node.
        shape: of z.
        places: where in the flattened z each output stands, `(N, T, U)` with positions t and units u of each example.
    """

    edge: GradientEdge
    shape: torch.Size
    places: Tensor

    @property
    def count(self) -> int:
        """The number of second derivatives it takes, `T U`."""
        return self.places.shape[1] * self.places.shape[2]

    @abstractmethod
    def zeros(self) -> Tensor:
        """Nothing yet, in a form that `add` adds to."""

    def directions(self, which: Tensor, like: Tensor) -> Tensor:
        """Unit vectors of z at positions and units `(K, 2)`, of all examples at once: `(K, *shape)`."""
        flat = torch.zeros(len(which), self.shape.numel(), dtype=like.dtype, device=like.device)
        flat.scatter_(1, self.places[:, which[:, 0], which[:, 1]].T, 1)
        return flat.view(len(which), *self.shape)

    def rows(self, which: Tensor, second: Tensor) -> Tensor:
        """`d^2 loss / dz[n,t,u] dz[n,t',u]` out of second derivatives `(K, *shape)`: `(K, N, T)` over t'."""
        index = self.places[:, :, which[:, 1]].permute(2, 0, 1)  # (K, N, T)
        return second.flatten(1).gather(1, index.flatten(1)).view(index.shape)

    @abstractmethod
    def add(self, total: Tensor, which: Tensor, rows: Tensor) -> None:
        """Add what rows `(K, N, T)` mean for the weight, in place."""

    @abstractmethod
    def in_weight(self, total: Tensor, weight: Tensor) -> Tensor:
        """The diagonal in the weight's shape."""


@final
@dataclass(frozen=True, eq=False)
class ProductRoute(OutputRoute):
    """A weight that multiplies what went in; units are the outputs of all groups.

    Args:
        jacobian: of the weight, for its inputs.
    """

    jacobian: OuterProduct

    def zeros(self) -> Tensor:
        """`(G, O, I)`."""
        _, _, groups, inputs = self.jacobian.a.shape
        return self.jacobian.g.new_zeros(groups, self.jacobian.g.shape[-1], inputs)

    def add(self, total: Tensor, which: Tensor, rows: Tensor) -> None:
        """`sum_n a[n,t,i] sum_t' rows[n,t'] a[n,t',i]`."""
        outputs = total.shape[1]
        for group in which[:, 1].div(outputs, rounding_mode="floor").unique().tolist():
            mine = which[:, 1].div(outputs, rounding_mode="floor") == group
            t, unit = which[mine, 0], which[mine, 1] % outputs
            _, positions, _, inputs = self.jacobian.a.shape
            for part in self.jacobian.parts((len(t) + positions) * inputs):
                a = self.jacobian.a[part][:, :, group]  # (n, T, I)
                there = torch.einsum("knt,nti->kni", rows[mine][:, part].to(a.dtype), a)
                total[group].index_add_(0, unit, torch.einsum("kni,nki->ki", there, a[:, t]))

    def in_weight(self, total: Tensor, weight: Tensor) -> Tensor:
        """See `OutputRoute.in_weight`."""
        return self.jacobian.as_vector(total).view(weight.shape)


@final
@dataclass(frozen=True, eq=False)
class LookupRoute(OutputRoute):
    """A table of which rows are read; only places where the same row was read belong together.

    Args:
        jacobian: of the table, for what was read.
    """

    jacobian: EmbeddingJacobian

    def zeros(self) -> Tensor:
        """`(V, D)`."""
        return self.jacobian.g.new_zeros(self.jacobian.rows, self.places.shape[2])

    def add(self, total: Tensor, which: Tensor, rows: Tensor) -> None:
        """`sum_t' rows[n,t']` over the places t' of the same row; padding has no derivative."""
        index = self.jacobian.index
        read = index[:, which[:, 0]].T  # (K, N)
        same = (read[:, :, None] == index) & (read >= 0)[:, :, None]
        values = (rows.to(total.dtype) * same).sum(2)
        columns = which[:, 1, None].expand(-1, len(index))
        total.index_put_((read.clamp_min(0), columns), values, accumulate=True)

    def in_weight(self, total: Tensor, weight: Tensor) -> Tensor:
        """See `OutputRoute.in_weight`."""
        return total.view(weight.shape)


def output_route(backprop: Backprop, name: str) -> OutputRoute | None:
    """The way through the outputs of the one node where a parameter enters, if it has such a form.

    Args:
        backprop: the forward pass.
        name: the parameter.

    Returns:
        The way, or None: the parameter is used several times, in another form, or only in part.
    """
    uses = [use for found in backprop.uses.values() for use in found if use.parameter == name]
    if len(uses) != 1 or backprop.rules[uses[0]] is None:
        return None
    (use,) = uses
    shape = internals.shape_at(use.node, 0)
    # What the closed form makes of the numbers 0, 1, 2, ... tells where it puts each entry of z.
    numbers = torch.arange(shape.numel(), dtype=torch.float64, device=backprop.output.device).view(1, *shape)
    jacobian = backprop.rules[use](numbers)  # type: ignore[misc]
    edge = GradientEdge(use.node, 0)
    if isinstance(jacobian, OuterProduct) and jacobian.shape[2] == backprop.tensors[name].numel():
        places = _places(jacobian.g[0].flatten(2), shape)
        return None if places is None else ProductRoute(edge, shape, places, jacobian)
    if isinstance(jacobian, EmbeddingJacobian) and jacobian.shape[2] == backprop.tensors[name].numel():
        places = _places(jacobian.g[0], shape)
        return None if places is None else LookupRoute(edge, shape, places, jacobian)
    return None


def _places(found: Tensor, shape: torch.Size) -> Tensor | None:
    """The numbers as indices, if each stands in exactly one place."""
    index = found.round().long()
    whole = torch.arange(shape.numel(), device=index.device)
    return index if index.numel() == len(whole) and torch.equal(index.flatten().sort().values, whole) else None
