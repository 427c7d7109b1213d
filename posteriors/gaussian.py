"""The Gaussian over the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.curvature.operators.diagonal import Diagonal
from lapkit.curvature.operators.operator import SymmetricOperator
from lapkit.posteriors.fit import Fit
from lapkit.posteriors.priors import GaussianPrior


@dataclass(frozen=True, eq=False)
class GaussianPosterior:
    """`N(mean, precision^{-1})`.

    Args:
        mean: `(P,)`.
        precision: positive definite, of size P.

    Raises:
        ValueError: if sizes differ.

    Example:
        >>> import torch
        >>> from lapkit.curvature import Diagonal
        >>> GaussianPosterior(torch.zeros(2), Diagonal(torch.ones(2))).log_prob(torch.zeros(2))
        tensor(-1.8379)

    Reference:
        Dangel, Backpropagation Beyond the Gradient, eq. (3.32).
    """

    mean: Tensor
    precision: SymmetricOperator

    def __post_init__(self) -> None:
        if self.mean.shape != (self.precision.size,):
            raise ValueError(f"Mean {tuple(self.mean.shape)} and precision of size {self.precision.size} do not match.")

    def sample(self, n_samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Draws `mean + R^T epsilon` with `R^T R = precision^{-1}`, `(S, P)`.

        Args:
            n_samples: how many, S.
            generator: the only source of randomness.

        Returns:
            One draw a row.
        """
        shape = (n_samples, len(self.mean))  # the numbers of a draw side by side, which is faster and stays so
        noise = torch.randn(shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        drawn = self.precision.inverse_root_transpose(noise.T).T
        return drawn + self.mean if drawn.requires_grad else drawn.add_(self.mean)  # fewer copies of many weights

    def log_prob(self, weights: Tensor, normalized: bool = True) -> Tensor:
        """The log density at weights `(P,)`, or at several `(S, P)`.

        Args:
            weights: where.
            normalized: with the constants; otherwise `-square_norm / 2`.

        Returns:
            `()` or `(S,)`.

        Raises:
            ValueError: if the last axis is not of length P.
        """
        constant = self.precision.logdet() - len(self.mean) * math.log(2 * math.pi) if normalized else 0.0
        return (constant - self.square_norm(weights)) / 2

    def square_norm(self, weights: Tensor) -> Tensor:
        """`(w - mean)^T precision (w - mean)` at weights `(P,)`, or at several `(S, P)`.

        Raises:
            ValueError: if the last axis is not of length P.
        """
        if weights.shape[-1:] != self.mean.shape:
            size = len(self.mean)
            raise ValueError(f"Expected weights ({size},) or (S, {size}), got {tuple(weights.shape)}.")
        deviation = (weights - self.mean).reshape(-1, len(self.mean))
        return (deviation.T * self.precision.matmul(deviation.T)).sum(0).reshape(weights.shape[:-1])

    @property
    def variance(self) -> Tensor:
        """Marginal variances of the weights, `(P,)`."""
        return self.precision.inverse_diagonal()

    @property
    def scale(self) -> Tensor:
        """`S` with `S S^T` the covariance, `(P, P)`; of a diagonal one the standard deviations, `(P,)`."""
        if isinstance(self.precision, Diagonal):
            return self.precision.values.rsqrt()
        return self.precision.inverse_root_transpose(self._eye)

    @property
    def covariance(self) -> Tensor:
        """The whole matrix, `(P, P)`."""
        return self.precision.solve(self._eye)

    @property
    def _eye(self) -> Tensor:
        return torch.eye(len(self.mean), dtype=self.mean.dtype, device=self.mean.device)


def laplace_posterior(
    fit: Fit, likelihood: Likelihood, prior: GaussianPrior, temperature: float = 1.0
) -> GaussianPosterior:
    """The Laplace approximation `N(MAP, (scale * H + diag(prior precision))^{-1})`.

    Args:
        fit: curvature H and mode.
        likelihood: whose precision scales the curvature.
        prior: Gaussian.
        temperature: of the likelihood, `p(y|f)^(1/T)`; below one makes the posterior colder.

    Returns:
        The posterior over the fitted weights.
    """
    scale = fit.curvature_scale(likelihood, temperature)
    unscaled = not isinstance(scale, Tensor) and scale == 1  # of a full matrix, a copy that is not made
    scaled = fit.curvature if unscaled else fit.curvature.scale(scale)
    return GaussianPosterior(fit.mean, scaled.shift(prior.values(fit.parameters), fit.parameters.sizes))
