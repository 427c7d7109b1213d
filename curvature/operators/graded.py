"""Determinants of sums whose terms differ by so many orders of magnitude that the sum has lost the small ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy.linalg.lapack import dgejsv, dlauum, dpotrf, dpstrf
from torch import Tensor

UNBEARABLE = 1e10  # a quotient of curvature and prior; beyond, too few digits are left of the identity in their sum
HOPELESS = 1e25  # likewise; beyond, rounding of the columns themselves may exceed the identity


def log_det_one_plus(weights: Tensor, columns: Tensor) -> Tensor:
    """`log det(I + V^T diag(w) V)`, for weights of any size.

    The matrix is `G^T G` with the rows `G = [diag(w)^{1/2} V; I]`, which is not formed. By Gaussian elimination with
    pivots, `G = P L U`, rows of very different size stay apart: the sizes are in U, of which the determinant is a
    product, and L, whose entries are at most one, is well conditioned.

    Args:
        weights: positive, `(P,)`.
        columns: `V`, `(P, R)`.

    Returns:
        One number in float64, differentiable in the weights.

    Raises:
        ValueError: if weights are infinite, or so large that rounding decides whether columns are independent.

    Example:
        >>> weights = torch.tensor([1e20, 1e-20], dtype=torch.float64)
        >>> float(log_det_one_plus(weights, torch.tensor([[1.0, 1.0], [0.0, 1.0]])) - weights[0].log())
        0.6931...

    Reference:
        Peters and Wilkinson, The least squares problem and pseudo-inverses, 1970; Higham, Accuracy and Stability of
        Numerical Algorithms, 2002, section 20.6.
    """
    weights, columns = weights.double(), columns.detach().double()
    if not torch.isfinite(weights).all():
        raise ValueError("A prior precision is zero in its type, or next to it. Use a larger one, or a wider type.")
    found: Tensor = _LogDetOnePlus.apply(weights, columns)
    if weights.detach() @ columns.square().sum(1) > HOPELESS:
        _check_same(found, _LogDetOnePlus.apply(weights, columns.flip(1)))
    return found


def _check_same(one: Tensor, two: Tensor) -> None:
    """Refuse what is rounding: columns in another order are rounded in another way.

    Raises:
        ValueError: if the numbers differ.
    """
    if not torch.isclose(one, two, rtol=1e-9, atol=1e-6):
        raise ValueError(
            "The curvature exceeds the prior precision by so much that double precision does not tell in how many "
            f"directions: its log determinant is {float(one.detach()):.9g} or {float(two.detach()):.9g}. Use a larger "
            "prior precision."
        )


class _LogDetOnePlus(torch.autograd.Function):
    """Its slope in the logarithm of a weight is the leverage of that row, `g (G^T G)^{-1} g^T`."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, columns: Tensor) -> Tensor:
        eye = torch.eye(columns.shape[1], dtype=columns.dtype, device=columns.device)
        packed, swaps = torch.linalg.lu_factor(torch.cat([weights.sqrt()[:, None] * columns, eye]))
        lower = packed.tril(-1)
        lower.diagonal().fill_(1)
        root = torch.linalg.cholesky(lower.T @ lower)
        leverages = torch.linalg.solve_triangular(root, lower.T, upper=False).square().sum(0)
        found = torch.empty_like(leverages)
        found[_order(swaps, len(leverages))] = leverages
        ctx.save_for_backward(weights, found[: len(weights)])
        return 2 * (packed.diagonal().abs().log().sum() + root.diagonal().log().sum())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Where prior precisions lie ten orders of magnitude below the curvature, a log determinant has "
                "one derivative here, no second one. Take it without create_graph=True, or use larger precisions."
            )
        weights, leverages = ctx.saved_tensors
        return gradient * leverages / weights, None


def _order(swaps: Tensor, size: int) -> Tensor:
    """Which row has come to each place by the swaps of a factorisation, counted from 1."""
    order = list(range(size))
    for place, other in enumerate(swaps.tolist()):
        order[place], order[other - 1] = order[other - 1], order[place]
    return torch.tensor(order, device=swaps.device)


def pivoted_cholesky(matrix: Tensor, tolerance: float) -> Tensor:
    """Columns `V` with `V V^T` a positive semi-definite matrix, as many as its rank is without round-off.

    They come from a Cholesky factor with pivots, which stops where no pivot exceeds rounding: that relative to the
    diagonal of the same row, as weights with small curvature are no less determined than those with large.

    Args:
        matrix: finite, `(P, P)`.
        tolerance: of pivots, relative to the diagonal.

    Returns:
        `(P, r)`, in float64.

    Example:
        >>> pivoted_cholesky(torch.ones(3, 3), 1e-6).shape
        torch.Size([3, 1])
    """
    scale, lower, order, rank = _pivoted(matrix, tolerance)
    out = torch.empty(len(matrix), rank, dtype=torch.float64)
    out[order] = torch.from_numpy(lower.T[:rank]).triu_().mT
    return out.mul_(scale[:, None]).to(matrix.device)


def without_rounding(matrix: Tensor, tolerance: float) -> np.ndarray:
    """A matrix with those eigenvalues of a positive semi-definite one that are more than round-off, and perhaps zeros.

    It is `V^T V` with the columns of `pivoted_cholesky` where they are fewer than the rows, and the matrix itself else.
    Many columns are overwritten by it, so that one matrix in float64 is all that it takes.

    Args:
        matrix: finite, `(P, P)`.
        tolerance: of pivots, relative to the diagonal.

    Returns:
        `(n, n)` with `n <= P`, in float64 and ordered by columns, as LAPACK wants it. Its lower triangle counts; zeros
        come last.

    Example:
        >>> without_rounding(torch.ones(3, 3), 1e-6).tolist()
        [[3.0]]
    """
    scale, lower, order, rank = _pivoted(matrix, tolerance)
    size = len(matrix)
    if rank == size:
        del lower
        return matrix.detach().to("cpu", torch.float64, copy=True).numpy().T
    rows = torch.from_numpy(lower.T)[: rank if 2 * rank < size else size].mul_(scale[order])
    if 2 * rank < size:
        rows.triu_()
        return (rows @ rows.mT).numpy().T
    rows[rank:] = 0
    product, _ = dlauum(lower, lower=1, overwrite_c=1)
    return product


def graded_eigenvalues(columns: Tensor) -> Tensor:
    """Eigenvalues of `V V^T` that are not zero, each to nearly all of its digits however large the others are.

    They are the squared singular values of V by Jacobi's method, which is exact for rows of very different size.

    Args:
        columns: `V`, `(P, r)`, of full rank.

    Returns:
        `(r,)`, ascending, in float64 on the processor.

    Example:
        >>> graded_eigenvalues(torch.tensor([[1e9], [1e-9]])).tolist()
        [1e+18]

    Reference:
        Drmac and Veselic, New fast and accurate Jacobi SVD algorithm, 2008.
    """
    rows = np.asfortranarray(columns.detach().double().cpu().numpy())
    found = dgejsv(rows, joba=2, jobu=3, jobv=3, jobr=0, jobt=0, jobp=0)
    values, work = found[0], found[3]
    return torch.from_numpy(np.sort((values * (work[0] / work[1])) ** 2))


def log_det_one_plus_over(matrix: np.ndarray, delta: float) -> float | None:
    """`log det(I + A / delta)` by a Cholesky factor in the place of A, or None where there is none.

    Args:
        matrix: positive semi-definite, of which the lower triangle counts; overwritten.
        delta: positive.

    Example:
        >>> log_det_one_plus_over(np.ones((1, 1)), 1.0)
        0.6931...
    """
    if not len(matrix):
        return 0.0
    matrix /= delta
    matrix[np.diag_indices_from(matrix)] += 1
    factor, failed = dpotrf(matrix, lower=1, clean=0, overwrite_a=1)
    return None if failed else 2 * float(np.log(factor.diagonal()).sum())


def _pivoted(matrix: Tensor, tolerance: float) -> tuple[Tensor, np.ndarray, Tensor, int]:
    """Roots of the diagonal, and of the matrix scaled by them the factor, the order of its rows, and its rank.

    On the processor, as PyTorch has no such factorisation.

    Raises:
        ValueError: if the diagonal is not finite.
    """
    scale = matrix.detach().diagonal().to("cpu", torch.float64).clamp_min(0).sqrt()
    if not scale.isfinite().all():
        raise ValueError("The curvature holds NaN or infinite values, and has no determinant.")
    inverse = torch.where(scale > 0, scale.reciprocal(), 0.0)
    scaled = matrix.detach().to("cpu", torch.float64, copy=True).mul_(inverse).mul_(inverse[:, None])
    # LAPACK counts by columns: of a symmetric matrix the transpose is the same, and needs no copy.
    lower, order, rank, _ = dpstrf(scaled.numpy().T, lower=1, tol=tolerance, overwrite_a=1)
    return scale, lower, torch.from_numpy(order).long() - 1, int(rank)


def rounding(size: int, eps: float) -> float:
    """Of a sum of outer products, relative to its diagonal: where its eigenvalues, and those of its factor, are lost.

    As the norm of a matrix of independent errors it grows with the root of the size.

    Args:
        size: of the matrix.
        eps: of the type that it was summed in.
    """
    return 2 * eps * math.sqrt(size)


def cleared(values: Tensor, bound: Tensor) -> Tensor:
    """Eigenvalues without round-off: those that are lost in it are zero, unless all together they are not.

    Their sum is known better than each of them, as errors of either sign cancel in it. Where their mean is more than a
    mean of so many errors, they are given it.

    Args:
        values: `(*, n)`.
        bound: of the error of each, `(*, n)`.
    """
    lost = values < bound
    number = lost.sum(-1, keepdim=True).clamp_min(1)
    mean, error = (torch.where(lost, x, 0.0).sum(-1, keepdim=True) / number for x in (values, bound))
    return torch.where(lost, torch.where(mean > error / number.sqrt(), mean, 0.0), values)
