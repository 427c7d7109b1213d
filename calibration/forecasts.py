"""What regression scores ask of a prediction: mean, spread, density, distribution function, quantiles, CRPS.

Whatever the user has becomes one of three: Gaussians (see `gaussian_forecasts`), samples, or another distribution of
torch (see `continuous_forecasts`). Targets are `(N, K)` float64 here; `forecast_inputs` sees to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lapkit.calibration.inputs import Array, as_finite


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
        object.__setattr__(self, "values", values)

    @property
    def draws(self) -> Tensor:
        """The values as `(S, N, K)` float64."""
        assert isinstance(self.values, Tensor)  # since `__post_init__`
        return self.values if self.values.ndim == 3 else self.values[..., None]

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
