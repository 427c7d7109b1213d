"""The log determinant of a matrix whose eigenvalues are one at least."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def logdet_from_one(matrix: Tensor) -> Tensor:
    """`log det` of a symmetric matrix whose eigenvalues are at least one, `I + A` with semi-definite A.

    Beside eigenvalues beyond `1 / eps` those near one are lost in round-off and there is no Cholesky factor. They are
    one then, to all the digits that the sum has.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix.detach())
    if failed.any():
        return torch.linalg.eigvalsh(matrix).clamp_min(1).log().sum()
    found: Tensor = _LogDet.apply(matrix, factor)
    return found


class _LogDet(torch.autograd.Function):
    """Its derivative is the inverse, which takes a third of what it takes to differentiate the Cholesky factor."""

    @staticmethod
    def forward(matrix: Tensor, factor: Tensor) -> Tensor:
        return 2 * factor.diagonal().log().sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        matrix, factor = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is asked for
            factor = torch.linalg.cholesky(matrix)
        return gradient * torch.cholesky_inverse(factor), None
