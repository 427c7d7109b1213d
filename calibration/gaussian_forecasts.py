"""Gaussian predictions of real targets, and mixtures of them, in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from lapkit.calibration.forecasts import Forecast

SQRT_TAU = math.sqrt(2 * math.pi)
# Halvings of a bracket until float64 cannot tell its ends apart.
HALVINGS = 100


@final
@dataclass(frozen=True, eq=False)
class Gaussians(Forecast):
    """A Gaussian, or a mixture of M of them.

    Attributes:
        means: `(M, N, K)`.
        stds: `(M, N, K)`, positive.
        weights: `(M, N)`, which sum to one over M.
        roots: `(M, N, K, K)` lower triangular, of the covariance of the K targets; None where it is diagonal.
    """

    means: Tensor
    stds: Tensor
    weights: Tensor
    roots: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """Mean of each target, `(N, K)`."""
        return self._mixed(self.means)

    @property
    def std(self) -> Tensor:
        """Standard deviation of each target, that between the components included, `(N, K)`."""
        return self._mixed(self.stds.square() + (self.means - self.mean).square()).sqrt()

    def log_prob(self, y: Tensor) -> Tensor:
        """Log density of all targets of an example together, in nats."""
        if self.roots is None:
            components: Distribution = Independent(Normal(self.means, self.stds), 1)
        else:
            components = MultivariateNormal(self.means, scale_tril=self.roots)
        return torch.logsumexp(self.weights.log() + components.log_prob(y), dim=0)

    def cdf(self, y: Tensor) -> Tensor:
        """`F(y)` of each target by itself."""
        return self._mixed(torch.special.ndtr((y - self.means) / self.stds))

    def quantile(self, level: float) -> Tensor:
        """`F^{-1}(level)` of each target: between the smallest and the largest of the components' quantiles."""
        z = torch.special.ndtri(torch.tensor(level, dtype=torch.float64, device=self.means.device))
        low, high = torch.aminmax(self.means + z * self.stds, dim=0)
        for _ in range(HALVINGS if len(self.means) > 1 else 0):
            middle = (low + high) / 2
            below = self.cdf(middle) < level
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def crps(self, y: Tensor) -> Tensor:
        """Closed form; of one Gaussian `s (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi))`, `z = (y - m) / s`.

        Reference:
            Gneiting and Raftery (2007), section 4.2; mixtures: Grimit, Gneiting, Berrocal and Johnson (2006),
            equation 5.
        """
        variances = self.stds.square()
        spread = torch.zeros_like(y)
        for mean, variance, weight in zip(self.means, variances, self.weights, strict=True):
            apart = _absolute_moment(mean - self.means, (variance + variances).sqrt())
            spread += weight[:, None] * self._mixed(apart)
        return self._mixed(_absolute_moment(y - self.means, self.stds)) - spread / 2

    def _mixed(self, values: Tensor) -> Tensor:
        return (self.weights[..., None] * values).sum(0)


def _absolute_moment(mean: Tensor, std: Tensor) -> Tensor:
    """`E|X|` of a Gaussian."""
    z = mean / std
    return mean * torch.erf(z / math.sqrt(2)) + 2 * std * (-z.square() / 2).exp() / SQRT_TAU
