"""How predictions follow from the observations: gpytorch's strategy by triangular solves, with an eye on rounding."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from linear_operator import to_dense, to_linear_operator
from linear_operator.operators import LinearOperator
from torch import Tensor

from lapkit.posteriors.function_space.gaussian_processes import DefaultPredictionStrategy, gpytorch

LOST = 1e-3  # of a variance: the largest share that rounding may have without a warning


class ObservedStrategy(DefaultPredictionStrategy):  # type: ignore[misc]  # gpytorch has no types
    """Predictive covariances `own - k A^{-1} k^T` from solves with the Cholesky factor of A, not from its inverse.

    Where the data determine much, A is ill conditioned, and a product with the inverse of its root loses three digits
    and more that a solve keeps.

    Args:
        given: what gpytorch's strategy takes.
        iterative: with gpytorch's approximate inverse root instead.
    """

    def __init__(self, *given: Any, iterative: bool = False) -> None:
        super().__init__(*given)
        self.iterative = iterative
        self._factor: Tensor | None = None

    @property
    def factor(self) -> Tensor:
        """`L` with `L L^T = A`, or an inverse root of A where solvers are iterative."""
        if self.iterative:
            return self.covar_cache
        if self._factor is None:
            found = self.lik_train_train_covar.cholesky().to_dense()
            self._factor = found.detach() if gpytorch.settings.detach_test_caches.on() else found
        return self._factor

    def half(self, cross: Tensor) -> Tensor:
        """`k L^{-T}` of the covariances with the observations, `(*, R)`."""
        if self.iterative:
            return cross @ self.factor
        return torch.linalg.solve_triangular(self.factor.mT, cross, upper=True, left=False)

    def exact_predictive_covar(self, test_test_covar: Any, test_train_covar: Any) -> LinearOperator:
        """See gpytorch's `DefaultPredictionStrategy`."""
        if gpytorch.settings.skip_posterior_variances.on():
            return super().exact_predictive_covar(test_test_covar, test_train_covar)
        half = self.half(to_dense(test_train_covar))
        after = to_dense(test_test_covar) - half @ half.mT
        self.check_digits(half, after.diagonal(dim1=-2, dim2=-1))
        return to_linear_operator(after)

    def check_digits(self, half: Tensor, after: Tensor) -> None:
        """Warn where rounding shows in a variance, which is a difference from the prior's.

        A is known to a relative error of a rounding, and `k A^{-1} k^T` therefore to `eps |A| |A^{-1} k^T|^2`.

        Args:
            half: `k L^{-T}`, `(*, R)`.
            after: the variances, `(*)`.
        """
        with torch.no_grad():
            norm = self.lik_train_train_covar.to_dense().abs().sum(-1).max()
            if self.iterative:
                weights = half @ self.factor.mT
            else:
                weights = torch.linalg.solve_triangular(self.factor, half, upper=False, left=False)
            rounding = torch.finfo(norm.dtype).eps * norm * weights.square().sum(-1)
            lost = bool((rounding > LOST * after).any())
        if lost:
            warnings.warn(
                f"Rounding may be more than {LOST:g} of a posterior variance: the data determine an output so much "
                "better than the prior that few digits are left in function space. Raise the prior precision, or use "
                "a weight-space posterior.",
                stacklevel=5,
            )
