"""The second derivatives of a module, weighted with what it is sent back: `R_n = sum_k (nabla^2_x z_nk) delta_nk`.

Zero for affine and piecewise linear modules, diagonal for elementwise ones, a full matrix for any other. Which of them
is found by two products, not by the name of the module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lapkit.curvature.hessian.hbp_derivatives import Derivatives, Linear
from lapkit.curvature.hessian.hbp_modes import Mode

# What two differently ordered sums may differ by, relative to the largest entry.
ROUND_OFF = 1e4


class ModuleHessian(ABC):
    """Symmetric matrices, one for each example."""

    @abstractmethod
    def matmul(self, columns: Tensor) -> Tensor:
        """`R_n u`, `(K, N, *in) -> (K, N, *in)`."""

    @abstractmethod
    def total(self) -> Tensor:
        """`sum_n R_n`, `(h, h)`."""

    @abstractmethod
    def changed(self, mode: Mode) -> ModuleHessian:
        """What a mode makes of it."""


@final
@dataclass(frozen=True, eq=False)
class DiagonalHessian(ModuleHessian):
    """`diag(phi''(x_n) * delta_n)`.

    Args:
        values: `(N, *in)`.
    """

    values: Tensor

    def matmul(self, columns: Tensor) -> Tensor:
        """See `ModuleHessian.matmul`."""
        return self.values * columns

    def total(self) -> Tensor:
        """See `ModuleHessian.total`."""
        return torch.diag(self.values.flatten(1).sum(0))

    def changed(self, mode: Mode) -> DiagonalHessian:
        """See `ModuleHessian.changed`."""
        return DiagonalHessian(mode.diagonal(self.values))


@final
@dataclass(frozen=True, eq=False)
class FullHessian(ModuleHessian):
    """Any other.

    Args:
        values: `(N, h, h)`.
    """

    values: Tensor

    def matmul(self, columns: Tensor) -> Tensor:
        """See `ModuleHessian.matmul`."""
        return torch.einsum("nij,knj->kni", self.values, columns.flatten(2)).view_as(columns)

    def total(self) -> Tensor:
        """See `ModuleHessian.total`."""
        return self.values.sum(0)

    def changed(self, mode: Mode) -> FullHessian:
        """See `ModuleHessian.changed`."""
        return FullHessian(mode.matrix(self.values))


def module_hessian(derivatives: Derivatives) -> ModuleHessian | None:
    """The second derivatives of a module in its input, in the smallest of the three forms; None if they vanish.

    A symmetric matrix R is zero if `R v` is, for a random v, and diagonal if `R v` equals `v * (R 1)`.

    Args:
        derivatives: of the module.

    Returns:
        The matrices, or None.
    """
    x = derivatives.x
    ones, direction = torch.ones_like(x), _direction(x)
    row_sums, product = derivatives.bend(ones), derivatives.bend(direction)
    scale = torch.maximum(row_sums.abs().max(), product.abs().max())
    if scale == 0:
        return None
    allowed = ROUND_OFF * torch.finfo(x.dtype).eps * scale
    if bool(((product - direction * row_sums).abs() <= allowed).all()):
        return DiagonalHessian(row_sums)
    derivatives.settle(derivatives.bend, torch.stack([ones, direction]))
    columns = derivatives.each(derivatives.bend, unit_columns(x, slice(0, x[0].numel())))  # (h, N, *in)
    return FullHessian(columns.flatten(2).permute(1, 2, 0))


def weight_hessian(derivatives: Derivatives, weight: str) -> Linear | None:
    """Products with the second derivatives in a weight, summed over examples; None for modules linear in it."""
    bend, direction = derivatives.bend_weight(weight), _direction(derivatives.values[weight])
    if not bool((bend(direction) != 0).any()):
        return None
    derivatives.settle(bend, torch.stack([torch.ones_like(direction), direction]))
    return bend


def unit_columns(like: Tensor, which: slice) -> Tensor:
    """Unit vectors of an activation, the same for all examples: `(K, N, *shape)`."""
    size = like[0].numel()
    unit = torch.eye(size, dtype=like.dtype, device=like.device)[which]
    return unit.unflatten(1, like.shape[1:])[:, None].expand(len(unit), *like.shape)


def _direction(like: Tensor) -> Tensor:
    """A reproducible vector without equal entries."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
