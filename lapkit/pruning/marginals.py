"""Blocks of the inverse of a matrix, each in its structure: the marginals of a Gaussian with that precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import singledispatch

import torch
from torch import Tensor

from lapkit.curvature import BlockDiagonal, Dense, Diagonal, Kronecker, SymmetricOperator
from lapkit.pruning.restriction import by_block


@singledispatch
def inverse_block(operator: SymmetricOperator, places: Tensor) -> Tensor:
    """`[A^{-1}]_QQ`, the covariance of some weights, written out.

    Args:
        operator: A, positive definite.
        places: Q, distinct.

    Returns:
        `(Q, Q)`.
    """
    half = operator.inverse_root(_units(operator, places))
    return half.T @ half


@inverse_block.register
def _(operator: Diagonal, places: Tensor) -> Tensor:
    return operator.values[places].reciprocal().diag()


@inverse_block.register
def _(operator: BlockDiagonal, places: Tensor) -> Tensor:
    found = torch.zeros(len(places), len(places), dtype=operator.dtype, device=operator.device)
    for block, own, here in by_block(operator, places):
        if len(own):
            found[here[:, None], here] = inverse_block(block, own)
    return found


@inverse_block.register
def _(operator: Dense, places: Tensor) -> Tensor:
    half = torch.linalg.solve_triangular(operator.cholesky, _units(operator, places), upper=False)
    return half.T @ half


@inverse_block.register
def _(operator: Kronecker, places: Tensor) -> Tensor:
    """Entry (i, j) is `sum_ab L[r_i,a] L[r_j,a] R[c_i,b] R[c_j,b] / values[a,b]`: few rows or few columns are cheap."""
    _, rows, columns = operator.values.shape
    group, row, column = places // (rows * columns), places // columns % rows, places % columns
    if operator.left is None or len(group.unique()) > 1 or min(len(row.unique()), len(column.unique())) > 1:
        return inverse_block.dispatch(SymmetricOperator)(operator, places)
    g = int(group[0])
    left, right, inverse = operator.left[g][row], operator.right[g][column], operator.values[g].reciprocal()
    if len(row.unique()) == 1:
        return (right * (left[:1].square() @ inverse)) @ right.T
    return (left * (inverse @ right[0].square())) @ left.T


@singledispatch
def inverse_blocks(operator: SymmetricOperator, groups: Sequence[Tensor]) -> list[Tensor]:
    """`[A^{-1}]_QQ` of several groups of weights.

    Args:
        operator: A, positive definite.
        groups: Q of each, distinct.

    Returns:
        `(Q, Q)` each.
    """
    return [inverse_block(operator, places) for places in groups]


@inverse_blocks.register
def _(operator: Dense, groups: Sequence[Tensor]) -> list[Tensor]:
    """Many groups by one inverse, which costs as much as the columns of a third of the weights."""
    if 3 * sum(map(len, groups)) < operator.size:
        return [inverse_block(operator, places) for places in groups]
    whole = torch.cholesky_inverse(operator.cholesky)
    return [whole[places[:, None], places] for places in groups]


@inverse_blocks.register
def _(operator: BlockDiagonal, groups: Sequence[Tensor]) -> list[Tensor]:
    found = [torch.zeros(len(g), len(g), dtype=operator.dtype, device=operator.device) for g in groups]
    for block, inside in _groups_by_block(operator, groups):
        blocks = inverse_blocks(block, [own for _, own, _ in inside])
        for (number, _, here), part in zip(inside, blocks, strict=True):
            found[number][here[:, None], here] = part
    return found


def _groups_by_block(
    operator: BlockDiagonal, groups: Sequence[Tensor]
) -> Iterator[tuple[SymmetricOperator, list[tuple[int, Tensor, Tensor]]]]:
    """Each block with the groups that have places in it: their numbers, these places, and which of theirs they are."""
    inside: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in operator.blocks]
    for number, places in enumerate(groups):
        for found, (_, own, here) in zip(inside, by_block(operator, places), strict=True):
            if len(own):
                found.append((number, own, here))
    yield from zip(operator.blocks, inside, strict=True)


def _units(operator: SymmetricOperator, places: Tensor) -> Tensor:
    """Unit vectors as columns, `(P, Q)`."""
    units = torch.zeros(operator.size, len(places), dtype=operator.dtype, device=operator.device)
    units[places, torch.arange(len(places), device=places.device)] = 1
    return units


@singledispatch
def marginal(operator: SymmetricOperator, places: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """`w^T ([A^{-1}]_QQ)^{-1} w` and `log det [A^{-1}]_QQ`: of a Gaussian with precision A, the marginal over Q.

    Args:
        operator: A, positive definite.
        places: Q, distinct.
        vector: w, `(Q,)`.

    Returns:
        Two numbers.
    """
    return quadratic_and_logdet(inverse_block(operator, places), vector)


def quadratic_and_logdet(covariance: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """`w^T C^{-1} w` and `log det C` of matrices `(*, Q, Q)` and vectors `(*, Q)`."""
    root = torch.linalg.cholesky(covariance)
    half = torch.linalg.solve_triangular(root, vector[..., None], upper=False)[..., 0]
    return half.square().sum(-1), 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)


@marginal.register
def _(operator: Kronecker, places: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """Whole rows of a group decouple in the basis of its columns, whole columns in that of its rows."""
    _, rows, columns = operator.values.shape
    group, row, column = places // (rows * columns), places // columns % rows, places % columns
    if len(group.unique()) == 1 and operator.left is not None:
        g, own_rows, own_columns = int(group[0]), row.unique(), column.unique()
        box = len(own_rows) * len(own_columns) == len(places)
        inverse = operator.values[g].reciprocal()  # (R, C)
        boxed = vector.new_zeros(rows, columns).index_put((row, column), vector)
        if box and len(own_columns) == columns:
            return _decoupled(operator.left[g][own_rows], inverse.T, (boxed @ operator.right[g])[own_rows].T)
        if box and len(own_rows) == rows:
            return _decoupled(operator.right[g][own_columns], inverse, operator.left[g].T @ boxed[:, own_columns])
    return quadratic_and_logdet(inverse_block(operator, places), vector)


def _decoupled(basis: Tensor, variances: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over b of what covariances `U diag(v_b) U^T` make of vectors: `(q, n)`, `(B, n)` and `(B, q)`."""
    found = quadratic_and_logdet((basis * variances[:, None]) @ basis.T, vectors)
    return found[0].sum(), found[1].sum()


@singledispatch
def marginals(operator: SymmetricOperator, groups: Sequence[Tensor], vector: Tensor) -> tuple[Tensor, Tensor]:
    """`marginal` of several groups of weights.

    Args:
        operator: A, positive definite.
        groups: U of them, distinct places each.
        vector: w of all weights, `(P,)`.

    Returns:
        `(U,)` each.
    """
    found = [marginal(operator, places, vector[places]) for places in groups]
    return torch.stack([f[0] for f in found]), torch.stack([f[1] for f in found])


@marginals.register
def _(operator: Dense, groups: Sequence[Tensor], vector: Tensor) -> tuple[Tensor, Tensor]:
    pairs = zip(inverse_blocks(operator, groups), groups, strict=True)
    found = [quadratic_and_logdet(block, vector[places]) for block, places in pairs]
    return torch.stack([f[0] for f in found]), torch.stack([f[1] for f in found])


@marginals.register
def _(operator: BlockDiagonal, groups: Sequence[Tensor], vector: Tensor) -> tuple[Tensor, Tensor]:
    squares, logdets = vector.new_zeros(2, len(groups))
    parts = vector.split(operator.sizes)
    for (block, inside), part in zip(_groups_by_block(operator, groups), parts, strict=True):
        if inside:
            numbers = torch.tensor([number for number, _, _ in inside], device=vector.device)
            found = marginals(block, [own for _, own, _ in inside], part)
            squares[numbers] += found[0]
            logdets[numbers] += found[1]
    return squares, logdets
