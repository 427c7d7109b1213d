"""Eigenvalues without round-off, and eigenvectors."""

from __future__ import annotations

import torch
from torch import Tensor

from lapkit.curvature.operators.graded import cleared, rounding


def symmetric_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, at least zero, and eigenvectors of positive semi-definite matrices `(*, n, n)`, computed in float64.

    In float32 the round-off of small eigenvalues, of the order of 1e-7 times the largest, would compete with small
    prior precisions. So does that of the entries, of which an eigenvector u sees `eps u^T diag(A) u`: eigenvalues that
    are lost in it are cleared.
    """
    if matrix.shape[-1] == 1:
        return matrix[..., 0].clamp_min(0), torch.ones_like(matrix)
    values, vectors = torch.linalg.eigh(matrix.double())
    diagonal, eps = matrix.diagonal(dim1=-2, dim2=-1).double(), torch.finfo(matrix.dtype).eps
    seen = (diagonal[..., None, :] @ vectors.square())[..., 0, :]
    values = cleared(values, rounding(matrix.shape[-1], eps) * seen)
    return values.clamp_min(0).to(matrix.dtype), vectors.to(matrix.dtype)
