"""The ends of the spectrum of a matrix that can only be multiplied by: its extreme eigenpairs, by Lanczos."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from torch import Tensor

from lapkit.curvature.products.estimators import Matrix, gaussian
from lapkit.curvature.products.scipy_view import scipy_view

FEW = 20  # vectors that eigsh keeps at least: up to that size a matrix is formed with as many products


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Some eigenvalues with their eigenvectors.

    Args:
        values: `(k,)`, in float64.
        vectors: orthonormal columns `(P, k)`.
        residuals: `|A v - value v|` of each, `(k,)`: some eigenvalue is no farther than that from the value given.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor


def largest_eigenpairs(
    matrix: Matrix,
    k: int = 1,
    *,
    tolerance: float | None = None,
    max_products: int | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """The k largest eigenvalues, in descending order, by implicitly restarted Lanczos.

    Vectors are orthogonalised in float64 by `scipy.sparse.linalg.eigsh`; products are made in the matrix's own type.

    Args:
        matrix: anything symmetric with products, definite or not.
        k: how many.
        tolerance: of the eigenvalues, relative; that of the matrix's floating type by default.
        max_products: give up after about as many products; ten for each row by default.
        generator: of the start vector.

    Returns:
        The eigenpairs.

    Raises:
        ValueError: if there are not k eigenvalues.
        RuntimeError: if they are not found within the products allowed.

    Example:
        >>> import torch
        >>> from lapkit.curvature import Diagonal
        >>> largest_eigenpairs(Diagonal(torch.arange(30.0)), 2).values
        tensor([29., 28.], dtype=torch.float64)

    Reference:
        Lehoucq, Sorensen and Yang, ARPACK users' guide, 1998.
    """
    return _extreme(matrix, k, "LA", tolerance, max_products, generator)


def smallest_eigenpairs(
    matrix: Matrix,
    k: int = 1,
    *,
    tolerance: float | None = None,
    max_products: int | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """The k smallest eigenvalues, in ascending order, negative ones first; arguments as for `largest_eigenpairs`.

    Those of a singular semi-definite matrix, all zero, converge slowly; there is little to learn from them.

    Raises:
        ValueError: if there are not k eigenvalues.
        RuntimeError: if they are not found within the products allowed.
    """
    return _extreme(matrix, k, "SA", tolerance, max_products, generator)


def _extreme(
    matrix: Matrix,
    k: int,
    which: str,
    tolerance: float | None,
    max_products: int | None,
    generator: torch.Generator | None,
) -> Eigenpairs:
    if not 1 <= k <= matrix.size:
        raise ValueError(f"Asked for {k} eigenpairs of a matrix with {matrix.size} rows.")
    kept = max(2 * k + 1, FEW)
    values, vectors = (
        _dense(matrix) if kept >= matrix.size else _lanczos(matrix, k, which, kept, tolerance, max_products, generator)
    )
    order = np.argsort(values)
    order = order[::-1][:k] if which == "LA" else order[:k]
    chosen = torch.from_numpy(values[order].copy()).to(matrix.device)
    columns = torch.from_numpy(vectors[:, order].copy()).to(matrix.device, matrix.dtype)
    residuals = (matrix.matmul(columns).double() - columns.double() * chosen).norm(dim=0)
    return Eigenpairs(chosen, columns, residuals)


def _dense(matrix: Matrix) -> tuple[np.ndarray, np.ndarray]:
    full = matrix.matmul(torch.eye(matrix.size, dtype=matrix.dtype, device=matrix.device)).double()
    values, vectors = torch.linalg.eigh((full + full.T).cpu() / 2)
    return values.numpy(), vectors.numpy()


def _lanczos(
    matrix: Matrix,
    k: int,
    which: str,
    kept: int,
    tolerance: float | None,
    max_products: int | None,
    generator: torch.Generator | None,
) -> tuple[np.ndarray, np.ndarray]:
    tolerance = torch.finfo(matrix.dtype).eps if tolerance is None else tolerance
    allowed = 10 * matrix.size if max_products is None else max_products
    direction = gaussian(matrix, 1, generator)
    start = direction[:, 0].double().cpu().numpy()
    if not matrix.matmul(direction).any():  # the zero matrix: no direction is better than another
        return np.zeros(k), np.eye(matrix.size, k)
    try:
        return eigsh(
            scipy_view(matrix),
            k,
            which=which,
            v0=start,
            ncv=kept,
            tol=tolerance,
            maxiter=max(1, allowed // (kept - k)),  # a restart costs about as many products
        )
    except ArpackNoConvergence as error:
        raise RuntimeError(
            f"Of {k} eigenpairs {len(error.eigenvalues)} converged to a tolerance of {tolerance:g} within about "
            f"{allowed} products. Allow more (max_products), ask for a coarser tolerance, or for fewer: clustered "
            "eigenvalues, such as the many near zero of a curvature, take long."
        ) from error
