"""What pruning asks of a matrix: some of its rows and columns, in its structure; of its inverse, see `marginals`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import singledispatch

import torch
from torch import Tensor

from lapkit.curvature import (
    BlockDiagonal,
    Dense,
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
    return BlockDiagonal(tuple(restricted(b, own) for b, own, _ in by_block(operator, places) if len(own)))


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


def by_block(operator: BlockDiagonal, places: Tensor) -> Iterator[tuple[SymmetricOperator, Tensor, Tensor]]:
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
    for block, own, here in by_block(operator, places):
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
