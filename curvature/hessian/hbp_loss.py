"""Where the recursion starts: first and second derivatives of the loss in what the last module returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lapkit.curvature.capture.forward import canonical, check_positions
from lapkit.curvature.columns.columns import GGN
from lapkit.curvature.hessian.hbp_modes import Mode
from lapkit.curvature.jacobians.jacobian import summable
from lapkit.curvature.likelihoods.likelihood import Likelihood


@final
@dataclass(frozen=True, eq=False)
class OutputLoss:
    """The loss as a function of the raw output `z`, `(N, *shape)`.

    Args:
        likelihood: of targets given outputs.
        mode: which curvature; a positive one starts from the likelihood's own root.
        output_axis: the axis of classes in the raw output.
    """

    likelihood: Likelihood
    mode: Mode
    output_axis: int | None

    def total(self, f: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
        """The summed loss of outputs."""
        wide = summable(f)
        losses = self.likelihood.loss(wide, self.likelihood.check(wide.detach(), y, self.output_axis))
        return losses.sum() if weights is None else (weights.to(losses) * losses).sum()

    def derivatives(self, z: Tensor, y: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gradients `(N, *shape)` and Hessians `(N, h, h)` in the raw output.

        Raises:
            ValueError: if the likelihood refuses outputs or targets, or these stand at other positions.
        """
        check_positions(z.shape, self.output_axis, y)
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            f = canonical(leaf, self.output_axis)
            gradient = torch.autograd.grad(self.total(f, y, weights), leaf, create_graph=True)[0]
            if not self.mode.positive:
                return gradient.detach(), _second_derivatives(gradient, leaf)
            matrices = self._positive(leaf, f, y)
        return gradient.detach(), matrices if weights is None else weights.to(matrices)[:, None, None] * matrices

    def _positive(self, leaf: Tensor, f: Tensor, y: Tensor) -> Tensor:
        """`S S^T` of the likelihood's root, a column at a time."""
        wide = summable(f.detach())
        columns = GGN()(self.likelihood, wide, self.likelihood.check(wide, y, self.output_axis))
        total = leaf.new_zeros(len(leaf), leaf[0].numel(), leaf[0].numel())
        for k in range(len(columns)):
            column = columns[k : k + 1][0].to(f.dtype)
            raw = torch.autograd.grad(f, leaf, column, retain_graph=True)[0].flatten(1)
            total += raw[:, :, None] * raw[:, None, :]
        return total


def _second_derivatives(gradient: Tensor, leaf: Tensor) -> Tensor:
    """`d gradient_n / d leaf_n`, `(N, h, h)`; a loss that is linear in the outputs has none."""
    size = leaf[0].numel()
    if not gradient.requires_grad:
        return leaf.new_zeros(len(leaf), size, size)
    flat = gradient.flatten(1)
    rows = [
        torch.autograd.grad(flat[:, k].sum(), leaf, retain_graph=True, materialize_grads=True)[0] for k in range(size)
    ]
    return torch.stack(rows, 1).flatten(2).detach()
