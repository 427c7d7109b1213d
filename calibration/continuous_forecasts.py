"""Distributions of torch as predictions of real targets, by their distribution functions and quantiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor
from torch.distributions import Distribution

from lapkit.calibration.forecasts import Forecast

# Nodes of the quadrature for distributions whose CRPS has no closed form here.
NODES = 256


@final
@dataclass(frozen=True, eq=False)
class Continuous(Forecast):
    """Another distribution of torch; all but the NLL and the mean need its `cdf` and `icdf`.

    Attributes:
        distribution: of batch shape `(N,)` or `(N, K)`, of independent targets.
    """

    distribution: Distribution

    @property
    def mean(self) -> Tensor:
        """Mean of each target, `(N, K)`."""
        return self._existing(self.like, "mean")

    @property
    def std(self) -> Tensor:
        """Standard deviation of each target, `(N, K)`."""
        try:
            return self._existing(_table(self.distribution.stddev), "standard deviation")
        except NotImplementedError as error:
            raise self._unknown("standard deviation") from error

    @property
    def like(self) -> Tensor:
        """The means, where there are any.

        Raises:
            TypeError: if torch does not know them.
        """
        try:
            return _table(self.distribution.mean)
        except NotImplementedError as error:
            raise self._unknown("mean") from error

    def log_prob(self, y: Tensor) -> Tensor:
        """Log density of all targets of an example together, in nats."""
        return _table(self.distribution.log_prob(self._own(y))).sum(1)

    def cdf(self, y: Tensor) -> Tensor:
        """`F(y)` of each target.

        Raises:
            TypeError: if the distribution has no such function in torch.
        """
        try:
            return _table(self.distribution.cdf(self._own(y)))
        except NotImplementedError as error:
            raise self._unknown() from error

    def quantile(self, level: float) -> Tensor:
        """`F^{-1}(level)` of each target."""
        return self._inverse(torch.full_like(self.like, level))

    def crps(self, y: Tensor) -> Tensor:
        """`2 int_0^1 (1[y <= q_a] - a) (q_a - y) da`, the levels a on either side of y by Gauss-Legendre.

        Good to about six digits in float64 where tails fall exponentially.

        Reference:
            Gneiting and Ranjan (2011), Comparing density forecasts using threshold- and quantile-weighted scoring
            rules, section 2.
        """
        u, total = self.cdf(y), torch.zeros_like(y)
        for node, weight in zip(*leggauss(NODES), strict=True):
            t = (1 + float(node)) / 2
            below, above = u * t, u + (1 - u) * t
            total += float(weight) * u * below * self._distance(y, below)
            total += float(weight) * (1 - u) * (1 - above) * self._distance(y, above)
        return total

    def _distance(self, y: Tensor, levels: Tensor) -> Tensor:
        """Between targets and quantiles; none to infinity, where rounding puts levels that weigh nothing."""
        distance = (y - self._inverse(levels)).abs()
        return distance.where(distance.isfinite(), 0.0)

    def _existing(self, moment: Tensor, name: str) -> Tensor:
        """A moment, if there is one.

        Raises:
            ValueError: if there is none, as of a Cauchy distribution.
        """
        if moment.isnan().any():
            raise ValueError(f"{type(self.distribution).__name__} has no {name}. Score it with predictive_nll or crps.")
        return moment

    def _inverse(self, levels: Tensor) -> Tensor:
        try:
            return _table(self.distribution.icdf(self._own(levels)))
        except NotImplementedError as error:
            raise self._unknown() from error

    def _unknown(self, what: str = "distribution function (cdf and icdf)") -> TypeError:
        return TypeError(
            f"{type(self.distribution).__name__} has no {what} in torch. Draw from it: "
            "Samples(distribution.sample((1000,)))."
        )

    def _own(self, y: Tensor) -> Tensor:
        """In the shape and type of the distribution's parameters."""
        mean = self.distribution.mean
        return y.to(mean.dtype).reshape(mean.shape)


def _table(values: Tensor) -> Tensor:
    return values.detach().double().reshape(len(values), -1)
