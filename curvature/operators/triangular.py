"""The inverse of a triangular matrix."""

from __future__ import annotations

import torch
from torch import Tensor

LEAF = 256  # rows of a matrix that is inverted by substitution


def inverse_of_lower(matrix: Tensor) -> Tensor:
    """`L^{-1}` of a lower triangular `L` `(n, n)`, by halves: a third of the multiplications of a substitution.

    `[[A, 0], [B, C]]^{-1} = [[A^{-1}, 0], [-C^{-1} B A^{-1}, C^{-1}]]`, nearly all of it in matrix products.

    Args:
        matrix: with no zero on the diagonal; what is above it is not read.

    Returns:
        The inverse, lower triangular, without derivatives.

    Example:
        >>> import torch
        >>> inverse_of_lower(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        tensor([[ 0.5000,  0.0000],
                [-0.5000,  1.0000]])

    Reference:
        Higham, Accuracy and stability of numerical algorithms, 2002, section 14.2.
    """
    inverse = torch.zeros_like(matrix)  # of which half is never touched
    _invert(matrix.detach(), inverse)
    return inverse


def _invert(matrix: Tensor, inverse: Tensor) -> None:
    """Write the inverse of one block into its place."""
    size = len(matrix)
    if size <= LEAF:
        eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        inverse.copy_(torch.linalg.solve_triangular(matrix, eye, upper=False))
        return
    half = size // 2
    for part in (slice(half), slice(half, None)):
        _invert(matrix[part, part], inverse[part, part])
    inverse[half:, :half] = (inverse[half:, half:] @ (matrix[half:, :half] @ inverse[:half, :half])).neg_()
