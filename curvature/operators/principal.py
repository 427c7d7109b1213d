"""Rows and columns of some of the weights, out of a matrix over more of them."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from lapkit.curvature.memory import chunk_length, default_budget
from lapkit.curvature.operators.dense import Dense
from lapkit.curvature.operators.diagonal import Diagonal
from lapkit.curvature.operators.kronecker import Kronecker
from lapkit.curvature.operators.kronecker_product import KroneckerProduct
from lapkit.curvature.operators.operator import SymmetricOperator


def principal(operator: SymmetricOperator, places: Tensor) -> SymmetricOperator:
    """The principal submatrix `A[S, S]`: the precision of these weights, given the values of the others.

    Of a product `B (x) A` it is a product of submatrices where the chosen weights are whole rows of whole columns,
    `B[R, R] (x) A[C, C]`. Elsewhere it is no product, and is written out: entry `(i, j)` is
    `B[r_i, r_j] A[c_i, c_j]`. So is that of a matrix which is diagonal in a Kronecker basis (EKFAC), where the basis
    has to be cut.

    Args:
        operator: over P weights.
        places: S of them, distinct and ascending.

    Returns:
        A matrix over S weights.

    Raises:
        ValueError: if it has to be written out and would not fit into the memory that is free.

    Example:
        >>> import torch
        >>> from lapkit.curvature import Diagonal
        >>> principal(Diagonal(torch.arange(3.0)), torch.tensor([0, 2])).diagonal()
        tensor([0., 2.])
    """
    return operator if len(places) == operator.size else _principal(operator, places)


@singledispatch
def _principal(operator: SymmetricOperator, places: Tensor) -> SymmetricOperator:
    """By products with unit vectors, some at a time."""
    count = len(places)
    _check_fits(operator, count)
    matrix = torch.empty(count, count, dtype=operator.dtype, device=operator.device)
    step = chunk_length(count, 4 * 8 * operator.size, default_budget(operator.device))
    for start in range(0, count, step):
        some = places[start : start + step]
        unit = matrix.new_zeros(operator.size, len(some))
        unit[some, torch.arange(len(some), device=some.device)] = 1
        matrix[:, start : start + step] = operator.matmul(unit)[places]
    return Dense((matrix + matrix.T) / 2)


@_principal.register
def _(operator: Diagonal, places: Tensor) -> SymmetricOperator:
    return Diagonal(operator.values[places])


@_principal.register
def _(operator: Kronecker, places: Tensor) -> SymmetricOperator:
    mask, groups = _by_group(places, tuple(operator.values.shape))
    if not bool(mask[groups].all()):
        return _principal.dispatch(SymmetricOperator)(operator, places)
    left, left_squares, right_squares = (
        None if t is None else t[groups] for t in (operator.left, operator.left_squares, operator.right_squares)
    )
    return Kronecker(left, operator.right[groups], operator.values[groups], left_squares, right_squares)


@_principal.register
def _(operator: KroneckerProduct, places: Tensor) -> SymmetricOperator:
    left, right = operator.left, operator.right
    mask, groups = _by_group(places, (len(left), left.shape[1], right.shape[1]))
    rows, columns = mask[groups[0]].any(1), mask[groups[0]].any(0)
    if bool((mask[groups] == rows[:, None] & columns).all()):
        left = left[groups][:, rows]
        left = left if left.ndim == 2 else left[:, :, rows]
        return KroneckerProduct(left, right[groups][:, columns][:, :, columns])
    _check_fits(operator, len(places))
    return Dense(_written_out(operator, places))


def _by_group(places: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Which weights of each group are chosen, `(G, R, C)`, and the groups that have one."""
    mask = torch.zeros(shape, dtype=torch.bool, device=places.device)
    mask.view(-1)[places] = True
    return mask, mask.flatten(1).any(1).nonzero()[:, 0]


def _written_out(operator: KroneckerProduct, places: Tensor) -> Tensor:
    """`B[r_i, r_j] A[c_i, c_j]` within a group, zero between groups."""
    left, right = operator.left, operator.right
    columns = right.shape[1]
    row, column = places // columns, places % columns
    group, row = row // left.shape[1], row % left.shape[1]
    matrix = torch.zeros(len(places), len(places), dtype=left.dtype, device=left.device)
    for number in group.unique().tolist():
        here = (group == number).nonzero()[:, 0]
        r, c = row[here], column[here]
        outer = left[number].diag() if left.ndim == 2 else left[number]
        matrix[here[:, None], here] = outer[r[:, None], r] * right[number][c[:, None], c]
    return matrix


def _check_fits(operator: SymmetricOperator, count: int) -> None:
    """Refuse what memory has no room for.

    Raises:
        ValueError: if the matrix would not fit.
    """
    needed = count**2 * operator.dtype.itemsize
    if needed > 4 * default_budget(operator.device):
        raise ValueError(
            f"{count} single weights of a tensor cut a Kronecker product into something that is none, and the matrix "
            f"over them would take {needed / 2**30:.1f} GiB, more than is free. Choose fewer weights, whole rows and "
            "columns of the tensor, or hessian_structure='diag'."
        )
