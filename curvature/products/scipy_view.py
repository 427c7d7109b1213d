"""Any symmetric matrix of lapkit as a `scipy.sparse.linalg.LinearOperator`, for scipy's solvers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator

from lapkit.curvature.products.estimators import Matrix


def scipy_view(matrix: Matrix) -> LinearOperator:
    """`matrix` for `cg`, `minres`, `gmres`, `eigsh` and the arithmetic of scipy's operators.

    Vectors are numpy's float64 on the outside and of the matrix's own type and device on the inside: solvers
    orthogonalise in double precision, and products are as exact as the matrix.

    Args:
        matrix: anything symmetric with `size`, `dtype`, `device` and `matmul`.

    Returns:
        A P x P operator of type float64 that is its own adjoint.

    Example:
        >>> import numpy, scipy, torch
        >>> from lapkit.curvature import Diagonal
        >>> solution, _ = scipy.sparse.linalg.cg(scipy_view(Diagonal(torch.tensor([1.0, 2.0]))), numpy.ones(2))
        >>> solution.round(4).tolist()
        [1.0, 0.5]
    """

    def multiply(vectors: Any) -> Any:
        inner = torch.from_numpy(np.array(vectors, dtype=np.float64))  # a copy: scipy's may be read-only or strided
        return matrix.matmul(inner.to(matrix.device, matrix.dtype)).detach().double().cpu().numpy()

    def column(vector: Any) -> Any:
        return multiply(vector.reshape(-1))

    shape = (matrix.size, matrix.size)
    return LinearOperator(
        shape, matvec=column, rmatvec=column, matmat=multiply, rmatmat=multiply, dtype=np.dtype(np.float64)
    )
