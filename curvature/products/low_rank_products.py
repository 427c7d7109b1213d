"""The nearest matrix of low rank to one that can only be multiplied by, such as the GGN of a whole data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lapkit.curvature.operators.low_rank import LowRank
from lapkit.curvature.products.estimators import Matrix, gaussian
from lapkit.curvature.products.spectrum import largest_eigenpairs

OVERSAMPLING = 10  # random vectors beyond the rank


@dataclass(frozen=True, eq=False)
class LowRankApproximation:
    """The largest eigenpairs of a matrix as a matrix of low rank.

    Args:
        operator: `V V^T`, V `(P, k)` with orthogonal columns of descending length.
        values: the k eigenvalues, `(k,)`, in float64: exact to the tolerance by Lanczos, from below by a sketch.
        dropped: which fraction of the trace is missing, if the trace is known.
    """

    operator: LowRank
    values: Tensor
    dropped: float | None


def low_rank_from_products(
    matrix: Matrix,
    rank: int,
    *,
    method: Literal["lanczos", "randomised"] = "lanczos",
    trace: float | Tensor | None = None,
    tolerance: float | None = None,
    max_products: int | None = None,
    passes: int = 2,
    generator: torch.Generator | None = None,
) -> LowRankApproximation:
    """`V V^T` of rank k from matrix-vector products alone: neither columns nor Jacobians of the data are kept.

    "lanczos" finds the nearest matrix of that rank, by as many products as its eigenvalues need, one after the other.
    "randomised" multiplies blocks of `k + 10` random vectors, `passes` times; it is close where eigenvalues decay fast,
    never above the matrix, and needs less patience.

    Args:
        matrix: symmetric and positive semi-definite, with products; over a data loader, `GGNProduct`.
        rank: the number k of columns.
        method: by implicitly restarted Lanczos, or by a Nystrom sketch of subspace iterations.
        trace: of the matrix, exact (`GGNDiagonal`) or estimated (`hutchpp_trace`), to tell what is dropped.
        tolerance: of Lanczos' eigenvalues, relative; that of the floating type by default.
        max_products: Lanczos gives up after about as many.
        passes: how often the sketch multiplies its block: the more, the closer.
        generator: of start vectors.

    Returns:
        The approximation.

    Raises:
        ValueError: if the matrix has no such rank, is not positive semi-definite, or method or passes are not known.
        RuntimeError: if Lanczos does not converge within the products allowed.

    Example:
        >>> import torch
        >>> from lapkit.curvature import Diagonal
        >>> found = low_rank_from_products(Diagonal(torch.arange(30.0)), 2, trace=435.0)
        >>> found.values.round().tolist(), round(found.dropped, 3)
        ([29.0, 28.0], 0.869)

    Reference:
        Lehoucq, Sorensen and Yang, ARPACK users' guide, 1998; Tropp, Yurtsever, Udell and Cevher, Fixed-rank
        approximation of a positive-semidefinite matrix from streaming data, 2017, algorithm 3.
    """
    if not 1 <= rank <= matrix.size:
        raise ValueError(f"Asked for a rank of {rank} of a matrix with {matrix.size} rows.")
    if method == "lanczos":
        pairs = largest_eigenpairs(matrix, rank, tolerance=tolerance, max_products=max_products, generator=generator)
        values, vectors = pairs.values, pairs.vectors
        _check_semidefinite(values, matrix.dtype)
    elif method == "randomised":
        if passes < 1:
            raise ValueError(f"A sketch takes one pass at least, got passes={passes}.")
        values, vectors = _nystrom(matrix, rank, passes, generator)
    else:
        raise ValueError(f"Unknown method {method!r}; known are 'lanczos' and 'randomised'.")
    values = values.clamp_min(0)
    columns = vectors * values.sqrt().to(vectors)
    dropped = None if trace is None else max(1 - float(values.sum()) / float(trace), 0.0) if float(trace) else 0.0
    return LowRankApproximation(LowRank(columns), values, dropped)


def _nystrom(matrix: Matrix, rank: int, passes: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Eigenpairs of `Y (Q^T Y)^{-1} Y^T`, `Y = A Q`, Q an orthonormal basis of `A^(passes - 1)` times random vectors.

    A is shifted so that the small matrix has a Cholesky factor, and the shift is taken off the eigenvalues again.
    """
    basis = torch.linalg.qr(gaussian(matrix, min(rank + OVERSAMPLING, matrix.size), generator).double())[0]
    for _ in range(passes - 1):
        basis = torch.linalg.qr(_multiplied(matrix, basis))[0]
    image = _multiplied(matrix, basis)
    if not image.any():
        return image.new_zeros(rank), basis[:, :rank].to(matrix.dtype)
    inner = basis.T @ image
    _check_semidefinite(torch.linalg.eigvalsh(inner + inner.T) / 2, matrix.dtype)
    shift = torch.finfo(matrix.dtype).eps * image.norm() * len(inner) ** 0.5
    image, inner = image + shift * basis, (inner + inner.T) / 2 + shift * torch.eye(len(inner)).to(inner)
    half = torch.linalg.solve_triangular(torch.linalg.cholesky(inner).mT, image, upper=True, left=False)
    vectors, lengths, _ = torch.linalg.svd(half, full_matrices=False)
    return (lengths.square() - shift)[:rank], vectors[:, :rank].to(matrix.dtype)


def _multiplied(matrix: Matrix, vectors: Tensor) -> Tensor:
    """Products in the matrix's own type, kept in float64."""
    return matrix.matmul(vectors.to(matrix.dtype)).double()


def _check_semidefinite(values: Tensor, dtype: torch.dtype) -> None:
    """Refuse what has no real root.

    Raises:
        ValueError: if a value is negative, beyond rounding.
    """
    lowest, largest = float(values.min()), float(values.abs().max())
    if lowest < -100 * torch.finfo(dtype).eps * largest:
        raise ValueError(
            f"V V^T has no negative eigenvalue, but the matrix has one near {lowest:.3g} beside {largest:.3g}. Give a "
            "positive semi-definite matrix: GGNProduct instead of HessianProduct."
        )
