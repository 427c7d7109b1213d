"""The recursion itself: the Hessian of the loss in an activation, from the outputs down to the first weights.

    H_x = J_x^T H_z J_x + sum_k (nabla^2_x z_k) delta_k        H_w = J_w^T H_z J_w + sum_k (nabla^2_w z_k) delta_k

Reference:
    Dangel, Backpropagation Beyond the Gradient, eq. (4.7); Dangel, Harmeling and Hennig, Modular block-diagonal
    curvature approximations for feedforward architectures, 2020, eq. (7).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from lapkit.curvature.hessian.hbp_derivatives import Derivatives
from lapkit.curvature.hessian.hbp_modes import Mode
from lapkit.curvature.hessian.hbp_residuals import ModuleHessian, module_hessian


class ActivationHessian(ABC):
    """`d^2 loss_n / dz_n^2` for the examples of a batch, or what a mode keeps of it."""

    @abstractmethod
    def matmul(self, columns: Tensor) -> Tensor:
        """`H_n u`, `(K, N, *shape) -> (K, N, *shape)`."""

    @abstractmethod
    def below(self, derivatives: Derivatives, residual: ModuleHessian | None) -> ActivationHessian:
        """That of the module's input, from that of its output."""

    @abstractmethod
    def around(self, inner: Derivatives, through: ActivationHessian) -> ActivationHessian:
        """That of the input of `z = x + s(x)`, where `through` is what the recursion through `s` alone gives."""


@final
@dataclass(frozen=True, eq=False)
class Matrices(ActivationHessian):
    """Explicit matrices.

    Args:
        values: `(N, h, h)`.
    """

    values: Tensor

    def matmul(self, columns: Tensor) -> Tensor:
        """See `ActivationHessian.matmul`."""
        return torch.einsum("nij,knj->kni", self.values, columns.flatten(2)).view_as(columns)

    def below(self, derivatives: Derivatives, residual: ModuleHessian | None) -> Matrices:
        """Two passes of the rows: `h_out` columns and then `h_in`."""
        half = derivatives.pull(self._columns(derivatives.delta)).flatten(2)  # (h_out, N, h_in)
        rows = half.permute(2, 1, 0).unflatten(2, derivatives.delta.shape[1:])  # (h_in, N, *out)
        values = derivatives.pull(rows).flatten(2).transpose(0, 1)
        if residual is not None:
            unit = torch.eye(values.shape[-1], dtype=values.dtype, device=values.device)
            columns = unit.unflatten(1, derivatives.x.shape[1:])[:, None]
            values = values + residual.matmul(columns.expand(-1, *derivatives.x.shape)).flatten(2).transpose(0, 1)
        return Matrices(values)

    def around(self, inner: Derivatives, through: ActivationHessian) -> Matrices:
        """`(I + J)^T H (I + J)` with one pass of the rows."""
        assert isinstance(through, Matrices)  # the recursion keeps one form
        half = inner.pull(self._columns(inner.delta)).flatten(2).transpose(0, 1)  # (N, h, h): H J
        return Matrices(self.values + half + half.mT + through.values)

    def _columns(self, like: Tensor) -> Tensor:
        return self.values.transpose(0, 1).unflatten(2, like.shape[1:])


@final
@dataclass(frozen=True, eq=False)
class Products(ActivationHessian):
    """Matrices known by their products, which go up to the loss and come back.

    Args:
        matmul_of: a linear function of columns `(K, N, *shape)`.
    """

    matmul_of: Callable[[Tensor], Tensor]

    def matmul(self, columns: Tensor) -> Tensor:
        """See `ActivationHessian.matmul`."""
        return self.matmul_of(columns)

    def below(self, derivatives: Derivatives, residual: ModuleHessian | None) -> Products:
        """`u -> J^T H J u + R u`."""

        def product(u: Tensor) -> Tensor:
            out = derivatives.pull(self.matmul(derivatives.push(u)))
            return out if residual is None else out + residual.matmul(u)

        return Products(product)

    def around(self, inner: Derivatives, through: ActivationHessian) -> Products:
        """`u -> H u + H J u + J^T H u + (J^T H J + R) u`."""

        def product(u: Tensor) -> Tensor:
            straight = self.matmul(u)
            return straight + self.matmul(inner.push(u)) + inner.pull(straight) + through.matmul(u)

        return Products(product)


class Link(ABC):
    """One stage of the chain at a batch."""

    weights: Mapping[str, str]
    derivatives: Derivatives

    @abstractmethod
    def descend(self, top: ActivationHessian, visit: Visit, *, to_input: bool) -> ActivationHessian:
        """Show every weight the Hessian at the output of its module, and return that at the input."""


Visit = Callable[["ModuleLink", ActivationHessian], None]


@final
@dataclass(frozen=True, eq=False)
class ModuleLink(Link):
    """A module.

    Args:
        derivatives: of the module at the batch.
        weights: the selected parameters: their names in the model and in the module.
        mode: what becomes of the module's own second derivatives.
    """

    derivatives: Derivatives
    weights: Mapping[str, str]
    mode: Mode

    @cached_property
    def raw_residual(self) -> ModuleHessian | None:
        """The module's second derivatives, where the mode keeps any."""
        return None if self.mode.change is None else module_hessian(self.derivatives)

    @cached_property
    def residual(self) -> ModuleHessian | None:
        """What the mode makes of them, example by example."""
        return None if self.raw_residual is None else self.raw_residual.changed(self.mode)

    def descend(self, top: ActivationHessian, visit: Visit, *, to_input: bool) -> ActivationHessian:
        """See `Link.descend`."""
        if self.weights:
            visit(self, top)
        return top.below(self.derivatives, self.residual) if to_input else top


@final
@dataclass(frozen=True, eq=False)
class SkipLink(Link):
    """`z = x + s(x)`.

    Args:
        derivatives: of `s` at the batch.
        weights: the selected parameters inside.
        inner: the links of `s`.
    """

    derivatives: Derivatives
    weights: Mapping[str, str]
    inner: tuple[Link, ...]

    def descend(self, top: ActivationHessian, visit: Visit, *, to_input: bool) -> ActivationHessian:
        """See `Link.descend`; a change of `s` is a change of `z`, so the recursion enters `s` as it is."""
        through = descend(self.inner, top, visit, to_input=to_input)
        return top.around(self.derivatives, through) if to_input else top


def descend(links: Sequence[Link], top: ActivationHessian, visit: Visit, *, to_input: bool) -> ActivationHessian:
    """Go down a chain, as far as there are weights, or to its input.

    Args:
        links: in forward order.
        top: the Hessian at the output.
        visit: called with every module that holds weights and the Hessian at its output.
        to_input: whether the Hessian at the input is wanted.

    Returns:
        The Hessian where the descent ended.
    """
    lowest = 0 if to_input else next((i for i, link in enumerate(links) if link.weights), len(links))
    for i in reversed(range(lowest, len(links))):
        top = links[i].descend(top, visit, to_input=to_input or i > lowest)
    return top
