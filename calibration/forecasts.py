"""What regression scores ask of a prediction: mean, spread, density, distribution function, quantiles, CRPS.

Whatever the user has becomes one of three: Gaussians (see `gaussian_forecasts`), samples, or another distribution of
torch. Targets are `(N, K)` float64 here; `forecast_inputs` sees to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor
from torch.distributions import Distribution

from lapkit.calibration.inputs import Array, as_tensor

# Nodes of the quadrature for distributions whose CRPS has no closed form here.
NODES = 256


class Forecast(ABC):
    """The predictive distribution of N examples with K targets each."""

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """Mean of each target, `(N, K)`."""

    @property
    @abstractmethod
    def std(self) -> Tensor:
        """Standard deviation of each target, `(N, K)`."""

    @property
    def like(self) -> Tensor:
        """Numbers in the shape of the targets, `(N, K)`, on their device."""
        return self.mean

    @abstractmethod
    def log_prob(self, y: Tensor) -> Tensor:
        """Log density of all targets of an example together, `(N, K)` to `(N,)`, in nats."""

    @abstractmethod
    def cdf(self, y: Tensor) -> Tensor:
        """`F(y)` of each target by itself, `(N, K)` to `(N, K)`."""

    @abstractmethod
    def quantile(self, level: float) -> Tensor:
        """`F^{-1}(level)` of each target by itself, `(N, K)`."""

    @abstractmethod
    def crps(self, y: Tensor) -> Tensor:
        """The continuous ranked probability score of each target by itself, `(N, K)` to `(N, K)`."""


@final
@dataclass(frozen=True, eq=False)
class Samples(Forecast):
    """Draws from the predictive distribution of the targets, observation noise included.

    Attributes:
        values: `(S, N)` or `(S, N, K)`, S at least 2.
        fair: estimate the CRPS of the distribution that the draws are from, without bias: pairs of different draws
            alone, `1 / (S (S - 1))`. Otherwise that of the empirical distribution of the draws, `1 / S^2`, which is
            right for an ensemble that is all there is.

    Raises:
        TypeError: if the values are not floating.
        ValueError: if their shape is another, or one is not finite.

    Example:
        >>> Samples(torch.tensor([[0.0, 2.0], [1.0, 2.0], [2.0, 5.0]])).mean
        tensor([[1.], [3.]], dtype=torch.float64)
    """

    values: Array
    fair: bool = True

    def __post_init__(self) -> None:
        values = as_finite(self.values, "samples")
        if values.ndim not in (2, 3) or len(values) < 2 or not values.numel():
            raise ValueError(f"shape of samples is {tuple(values.shape)}, expected (S, N) or (S, N, K) with S >= 2.")
        object.__setattr__(self, "values", values if values.ndim == 3 else values[..., None])

    @property
    def draws(self) -> Tensor:
        """The values as `(S, N, K)` float64."""
        assert isinstance(self.values, Tensor)  # since `__post_init__`
        return self.values

    @property
    def mean(self) -> Tensor:
        """Mean of the draws, `(N, K)`."""
        return self.draws.mean(0)

    @property
    def std(self) -> Tensor:
        """Standard deviation of the draws with `S - 1`, `(N, K)`."""
        return self.draws.std(0)

    def log_prob(self, y: Tensor) -> Tensor:
        """Draws have no density.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "Samples have no density. Score them with crps, or give the distribution that they were drawn from; "
            "a Gaussian with their moments is (samples.mean, samples.std)."
        )

    def cdf(self, y: Tensor) -> Tensor:
        """The rank of y among the draws as `(rank + 1/2) / (S + 1)`, uniform if y is one more draw; ties count half."""
        smaller, equal = (self.draws < y).sum(0), (self.draws == y).sum(0)
        return (smaller + equal / 2 + 0.5) / (len(self.draws) + 1)

    def quantile(self, level: float) -> Tensor:
        """The quantile of the draws, interpolated linearly."""
        ordered, place = self.draws.sort(dim=0).values, level * (len(self.draws) - 1)
        below = int(place)
        return torch.lerp(ordered[below], ordered[min(below + 1, len(ordered) - 1)], place - below)

    def crps(self, y: Tensor) -> Tensor:
        """`mean_i |x_i - y| - 1/2 mean_ij |x_i - x_j|`, the second by sorting; see `fair`.

        Reference:
            Gneiting and Raftery (2007), equation 21; fair: Ferro (2014), Fair scores for ensemble forecasts.
        """
        count = len(self.draws)
        rank = torch.arange(count, dtype=torch.float64, device=y.device)
        pairs = torch.tensordot(2 * rank - (count - 1), self.draws.sort(dim=0).values, dims=1)
        return (self.draws - y).abs().mean(0) - pairs / (count * (count - self.fair))


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


def as_finite(values: Array, name: str) -> Tensor:
    """Checked real numbers as float64.

    Args:
        values: of any shape.
        name: what the caller names them, for the error.

    Returns:
        The same, detached.

    Raises:
        TypeError: if they are no real numbers.
        ValueError: if one is not finite.
    """
    given = as_tensor(values)
    if given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"dtype of {name} is {given.dtype}, expected real numbers.")
    given = given.to(torch.float64)
    wrong = ~given.isfinite()
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(f"{name} at {place} is {given[place].item()}, expected finite numbers. Leave it out.")
    return given
