"""`log det(A + delta I) - log det(delta I)` by the eigenvalues of A: few passes over them, and few digits lost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def log_det_ratio_of(eigenvalues: Tensor, shift: Tensor) -> Tensor:
    """`sum_i log(1 + h_i / delta)`, in float64, where the quotient of a large one and a tiny shift is finite.

    Args:
        eigenvalues: of any shape, not negative.
        shift: positive; one number `()`, or one for each eigenvalue.

    Returns:
        One number, differentiable in the shift.

    Example:
        >>> float(log_det_ratio_of(torch.ones(2), torch.tensor(1.0)))
        1.3862
    """
    shift = shift.double()
    if shift.ndim or eigenvalues.requires_grad or not shift.requires_grad:
        return (eigenvalues.double() / shift).log1p().sum()
    found: Tensor = _LogDetRatio.apply(shift, eigenvalues)
    return found


def effective_number(eigenvalues: Tensor, shift: Tensor) -> Tensor:
    """MacKay's effective number of parameters, `sum_i h_i / (h_i + delta)`, in float64, for one number as a shift."""
    shift, wide = shift.double(), eigenvalues.double()
    if not shift.requires_grad:
        return (wide / (wide + shift)).sum()
    found: Tensor = _Effective.apply(shift, wide)
    return found


class _LogDetRatio(torch.autograd.Function):
    """Its slope in delta is minus the effective number, over delta: a third of what a graph would compute."""

    @staticmethod
    def forward(shift: Tensor, eigenvalues: Tensor) -> Tensor:
        return (eigenvalues.double() / shift).log1p_().sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        shift, eigenvalues = ctx.saved_tensors
        return -gradient * effective_number(eigenvalues, shift) / shift, None


class _Effective(torch.autograd.Function):
    """With the shares `s_i = h_i / (h_i + delta)`, whose slope in delta is `-s_i (1 - s_i) / delta`."""

    @staticmethod
    def forward(shift: Tensor, eigenvalues: Tensor) -> Tensor:
        return (eigenvalues / (eigenvalues + shift)).sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        shift, eigenvalues = ctx.saved_tensors
        shares = eigenvalues / (eigenvalues + shift)
        return -gradient * (shares * (1 - shares)).sum() / shift, None
