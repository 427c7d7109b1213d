"""The likelihood of counts, and what becomes of it when the rate is uncertain."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints

from lapkit.curvature.columns.sampling import Draws
from lapkit.curvature.likelihoods.likelihood import DiagonalLikelihood, check_finite, like_outputs

LARGE = 20.0  # from here on Stirling's series of four terms is exact to 1e-15
SMALLEST = 1e-30
EXACT = 2.0**53  # the largest float64 that counts every integer below


@dataclass(frozen=True)
class Poisson(DiagonalLikelihood):
    """Counts with a rate whose logarithm is the output, `y_c ~ Poisson(exp(f_c))`.

    Targets are 0, 1, 2, ... in the shape of the outputs, or `(N,)` for C = 1. `loss = -log p(y|f) = exp(f) - y f +
    log y!`, summed over outputs; its Hessian is `diag(exp(f))`.

    Example:
        >>> import torch
        >>> Poisson().log_prob(torch.zeros(1, 1), torch.tensor([[2.0]]))
        tensor([-1.6931])
    """

    def check(self, f: Tensor, y: Tensor, output_axis: int | None = None) -> Tensor:
        """Counts in the shape of the outputs; `(N,)` stands for `(N, 1)`.

        Raises:
            ValueError: if the shape does not fit, or a target is not a count.
        """
        y = like_outputs(f, y, "(one for each log rate)", output_axis=output_axis)
        check_finite(y)
        if ((y < 0) | (y != y.round())).any():
            raise ValueError(f"Expected counts 0, 1, 2, ..., got values between {y.min():g} and {y.max():g}.")
        return y

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """`-log p(y|f)`."""
        return (f.exp() - y * f + torch.lgamma(y + 1)).flatten(1).sum(-1)

    def root_diagonal(self, f: Tensor, y: Tensor | None = None) -> Tensor:
        """`exp(f / 2)`."""
        return (f / 2).exp()

    def sample(self, f: Tensor, draws: Draws, draw: int = 0) -> Tensor:
        """Counts where the cumulative distribution passes a uniform number, found by bisection.

        Raises:
            ValueError: if a rate is so large that floating numbers do not count that far.
        """
        rate = f.double().exp()
        if rate.max() > EXACT:
            raise ValueError(f"A rate of exp({f.max():.3g}) cannot be sampled. Is the output a log rate?")
        level = draws.uniform(draw, *f.shape[1:])
        low, high = torch.full_like(rate, -1.0), (rate + 20 * rate.sqrt() + 50).ceil()
        for _ in range(math.ceil(math.log2(float(high.max()) + 1)) + 1):  # CDF(low) < level <= CDF(high)
            middle = ((low + high) / 2).floor().clamp_min(0)
            reached = torch.special.gammaincc(middle + 1, rate) >= level
            low, high = torch.where(reached, low, torch.minimum(middle, high)), torch.where(reached, middle, high)
        return high.to(f)

    def inverse_link(self, f: Tensor) -> Tensor:
        """The rate `exp(f)`."""
        return f.exp()

    def expectation(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """`exp(m + v / 2)`, exactly: the mean of a log-normal rate."""
        return (mean + covariance.diagonal(dim1=-2, dim2=-1) / 2).exp()

    def predictive(self, mean: Tensor, covariance: Tensor) -> Distribution:
        """Independent counts with the exact means and variances: the log-normal rate becomes a Gamma of its moments.

        The rate's variance is `(exp(v) - 1) E[rate]^2`; counts of a Gamma rate are negative binomial. Covariances
        between outputs are left out.
        """
        overdispersion = torch.expm1(covariance.diagonal(dim1=-2, dim2=-1))
        return Independent(GammaPoisson(self.expectation(mean, covariance), overdispersion), 1)


class GammaPoisson(Distribution):
    """Counts whose rate is Gamma distributed: the negative binomial distribution by mean and overdispersion.

    Unlike that of torch it keeps its digits down to an overdispersion of zero, where it is the Poisson distribution.

    Args:
        mean: M.
        overdispersion: s, the rate's variance in units of `M^2`; the variance is `M + s M^2`.
        validate_args: see `torch.distributions.Distribution`.

    Example:
        >>> import torch
        >>> GammaPoisson(torch.tensor(3.0), torch.tensor(0.5)).variance
        tensor(7.5000)
    """

    arg_constraints = {"mean": constraints.nonnegative, "overdispersion": constraints.nonnegative}  # noqa: RUF012
    support = constraints.nonnegative_integer

    def __init__(self, mean: Tensor, overdispersion: Tensor, validate_args: bool | None = None) -> None:
        self._mean, self.overdispersion = torch.broadcast_tensors(mean, overdispersion)
        super().__init__(self._mean.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> GammaPoisson:
        """The same distribution in another shape."""
        return GammaPoisson(self._mean.expand(batch_shape), self.overdispersion.expand(batch_shape), False)

    @property
    def mean(self) -> Tensor:
        """M."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        """`M + s M^2`."""
        return self._mean + self.overdispersion * self._mean.square()

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Counts at rates drawn from the Gamma distribution, with torch's global generator."""
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            concentration = 1 / self.overdispersion.clamp_min(SMALLEST).expand(shape)
            rate = torch.distributions.Gamma(concentration, concentration).sample()
            return torch.poisson(rate * self._mean)

    def log_prob(self, value: Tensor) -> Tensor:
        """`log [Gamma(y + r) / (Gamma(r) y!)] - (r + y) log(1 + s M) + y log(s M)`, `r = 1 / s`."""
        if self._validate_args:
            self._validate_sample(value)
        s = self.overdispersion.clamp_min(SMALLEST)
        r = 1 / s
        far = r.clamp_min(LARGE)
        close = r.clamp_max(LARGE)
        # log [Gamma(y + r) / Gamma(r)] - y log r loses all digits for large r, except by Stirling's formula.
        by_stirling = (far + value - 0.5) * torch.log1p(value / far) - value + _stirling(far + value) - _stirling(far)
        directly = torch.lgamma(value + close) - torch.lgamma(close) - value * close.log()
        rising = torch.where(r > LARGE, by_stirling, directly)
        return (
            rising
            - torch.lgamma(value + 1)
            - (r + value) * torch.log1p(s * self._mean)
            + torch.xlogy(value, self._mean)
        )


def _stirling(x: Tensor) -> Tensor:
    """What `log Gamma(x)` adds to `(x - 1/2) log x - x + log(2 pi) / 2`."""
    square = x.square().reciprocal()
    return (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square / 1680))) / x
