"""Curvature as other libraries see it: `linear_operator` (GPyTorch) and `scipy.sparse.linalg`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lapkit.curvature.products.estimators import Matrix
from lapkit.curvature.products.scipy_view import scipy_view

if TYPE_CHECKING:
    from linear_operator import LinearOperator

__all__ = ["linear_operator_view", "scipy_view"]


def linear_operator_view(matrix: Matrix) -> LinearOperator:
    """`matrix` as a `linear_operator.LinearOperator`, for GPyTorch and the solvers below it.

    Structures that the library has are handed over as such, with its own closed forms: diagonal and dense matrices,
    Kronecker products, blocks of all these. Anything else is multiplied by, with conjugate gradients and Lanczos.
    Add a prior precision with `view.add_diagonal(torch.tensor(tau))`. How exact conjugate gradients are is a setting of
    the library, `linear_operator.settings.cg_tolerance(1e-4)` for instance; by default they stop early.

    Args:
        matrix: anything symmetric with `size`, `dtype`, `device` and `matmul`; the library's solvers and determinants
            need it positive definite.

    Returns:
        A P x P operator.
    """
    # It would warn of its own use of torch.jit whenever lapkit is imported.
    from lapkit.curvature.products.linear_operators import view

    return view(matrix)
