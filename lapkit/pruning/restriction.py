"""What pruning asks of a matrix: some of its rows and columns, and blocks of its inverse, each in its structure."""

from __future__ import annotations

from collections.abc import Iterator
from functools import singledispatch

import torch
from torch import Tensor

from lapkit.curvature import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Factored,
    Kronecker,
    LowRank,
    SymmetricOperator,
    conjugate_gradients,
    principal,
)
from lapkit.curvature.operators.operator import spread
from lapkit.curvature.operators.woodbury import Woodbury

LARGEST = 4000  # rows up to which what is cut out of a Kronecker product is factored, beyond which it is iterated
TOLERANCE = 1e-11  # relative residual of the iterations


@singledispatch
def restricted(operator: SymmetricOperator, places: Tensor) -> SymmetricOperator:
    """`A[S, S]` in the structure of A where it has one there.

    Args:
        operator: A.
        places: S, distinct and ascending.

    Returns:
        The principal submatrix.
    """
    return principal(operator, places)


@restricted.register
def _(operator: BlockDiagonal, places: Tensor) -> SymmetricOperator:
    return BlockDiagonal(tuple(restricted(b, own) for b, own, _ in _by_block(operator, places) if len(own)))


@restricted.register
def _(operator: LowRank, places: Tensor) -> SymmetricOperator:
    return LowRank(operator.columns[places], _offset(operator)[places], operator.factor)


@restricted.register
def _(operator: Factored, places: Tensor) -> SymmetricOperator:
    """Jacobians in some of their weights stay Jacobians; those in none are left out."""
    ends = torch.tensor(operator.groups, device=places.device).cumsum(0)
    starts = ends - torch.tensor(operator.groups, device=places.device)
    own = [places[(places >= s) & (places < e)] - s for s, e in zip(starts, ends, strict=True)]
    batches = tuple(tuple(part.at(p) for part, p in zip(b, own, strict=True) if len(p)) for b in operator.batches)
    return Factored(batches, _offset(operator)[places], operator.factor)


def _offset(operator: LowRank | Factored) -> Tensor:
    """The diagonal part, one number for each weight."""
    offset = torch.as_tensor(operator.offset, dtype=torch.float64, device=operator.device)
    groups = operator.groups
    grouped = groups is not None and offset.shape == (len(groups),) and len(groups) != operator.size
    return spread(offset, groups or []) if grouped else offset.expand(operator.size)


def _by_block(operator: BlockDiagonal, places: Tensor) -> Iterator[tuple[SymmetricOperator, Tensor, Tensor]]:
    """Each block, the places in it, and which of all places those are."""
    start = 0
    for block in operator.blocks:
        here = ((places >= start) & (places < start + block.size)).nonzero()[:, 0]
        yield block, places[here] - start, here
        start += block.size


def compact(operator: SymmetricOperator) -> SymmetricOperator:
    """A matrix by its columns as a dense one, where that is no larger: it keeps more digits.

    Args:
        operator: any.

    Returns:
        The same matrix, in double precision.
    """
    wide = operator.to(torch.float64)
    return Dense(wide.to_dense()) if isinstance(wide, Woodbury) and wide.rank >= wide.size else wide


@singledispatch
def restricted_solve(operator: SymmetricOperator, places: Tensor, vector: Tensor) -> Tensor:
    """`A[S, S]^{-1} v`, without the inverse of A.

    Args:
        operator: A, positive definite.
        places: S, distinct and ascending.
        vector: `(S,)`.

    Returns:
        The solution, `(S,)`.
    """
    return restricted(operator, places).solve(vector)


@restricted_solve.register
def _(operator: BlockDiagonal, places: Tensor, vector: Tensor) -> Tensor:
    found = torch.zeros_like(vector)
    for block, own, here in _by_block(operator, places):
        if len(own):
            found[here] = restricted_solve(block, own, vector[here])
    return found


@restricted_solve.register
def _(operator: Kronecker, places: Tensor, vector: Tensor) -> Tensor:
    """A product that is cut is none any more: a dense matrix while it is small, products with the whole beyond.

    Raises:
        RuntimeError: if the iterations do not converge.
    """
    if len(places) <= LARGEST or len(places) == operator.size:
        return principal(operator, places).solve(vector)
    root = operator.diagonal()[places].sqrt()

    def matmul(v: Tensor) -> Tensor:
        everything = v.new_zeros(operator.size)
        everything[places] = v / root
        return operator.matmul(everything)[places] / root

    found = conjugate_gradients(matmul, vector / root, [len(places)], tolerance=TOLERANCE, max_iterations=2000)
    if not float(found.residuals.max()) <= 1e-6:
        raise RuntimeError(
            f"The survivors of a block of {operator.size} weights have not been compensated: a residual of "
            f"{float(found.residuals.max()):.1e} is left after {int(found.iterations.max())} iterations. A larger "
            "prior precision helps, or compensate=False."
        )
    return found.vector / root


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
    for block, own, here in _by_block(operator, places):
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
def _(operator: BlockDiagonal, places: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    parts = [marginal(b, own, vector[here]) for b, own, here in _by_block(operator, places) if len(own)]
    return torch.stack([p[0] for p in parts]).sum(), torch.stack([p[1] for p in parts]).sum()


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
