"""The reference's classes for all weights, one for each structure of the curvature."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lapkit.compat.laplace.options import BACKEND, KEYS, PRIOR
from lapkit.compat.laplace.parametric import ParametricLaplace
from lapkit.compat.laplace.utils.matrix import KronDecomposed
from lapkit.curvature import SymmetricOperator


class FullLaplace(ParametricLaplace):
    """The full matrix; `H` and `posterior_precision` are tensors `(P, P)`."""

    structure = "full"

    def _form(self, matrix: SymmetricOperator) -> Tensor:
        return matrix.to_dense()

    @property
    def posterior_covariance(self) -> Tensor:
        """`P^{-1}`, `(P, P)`."""
        return self.posterior_scale @ self.posterior_scale.mT

    @property
    def posterior_scale(self) -> Tensor:
        """A root of the covariance, `S S^T = P^{-1}`; the reference's is triangular, this one need not be."""
        precision = self.laplace.posterior_precision
        identity = torch.eye(precision.size, dtype=precision.dtype, device=precision.device)
        return precision.inverse_root_transpose(identity)


class KronLaplace(ParametricLaplace):
    """A Kronecker product for each parameter; `H` and `posterior_precision` are `KronDecomposed`."""

    structure = "kron"
    order: ClassVar[tuple[str, ...]] = (*PRIOR, "enable_backprop", *KEYS, "backend", "damping", *BACKEND[1:])

    def _form(self, matrix: SymmetricOperator) -> KronDecomposed:
        return KronDecomposed(matrix, tuple(self.parameters.sizes))


class LowRankLaplace(ParametricLaplace):
    """The full GGN by its columns, without truncation; `H` and `posterior_precision` are lapkit's operators.

    The reference takes ten eigenvectors of the Hessian, by a library that is not on the package index.
    """

    structure = "lowrank"
    order: ClassVar[tuple[str, ...]] = ("backend", *PRIOR, "enable_backprop", *KEYS, "backend_kwargs")

    def _form(self, matrix: SymmetricOperator) -> SymmetricOperator:
        return matrix


class DiagLaplace(ParametricLaplace):
    """The diagonal; `H` and `posterior_precision` are vectors `(P,)`."""

    structure = "diag"

    def _form(self, matrix: SymmetricOperator) -> Tensor:
        return matrix.diagonal()

    @property
    def posterior_variance(self) -> Tensor:
        """Marginal variances of the weights, `(P,)`."""
        return self.laplace.posterior.variance

    @property
    def posterior_scale(self) -> Tensor:
        """Standard deviations of the weights, `(P,)`."""
        return self.posterior_variance.sqrt()
