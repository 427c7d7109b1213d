"""What the outputs of a network say about the targets: p(y|f), its curvature in f, and samples from it.

Every likelihood is written as an exponential dispersion

    log p(y|f) = -precision * loss(f, y) + log_normaliser(count)

so that a fit, which needs only the loss, stays valid when the dispersion (a Gaussian's noise) is tuned afterwards.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal


class Likelihood(ABC):
    """A conditional distribution of targets given a network's outputs f of shape `(N, C)`."""

    @abstractmethod
    def check(self, f: Tensor, y: Tensor) -> Tensor:
        """The targets in the form that the other methods take, or an error that says what is wrong with them.

        Args:
            f: outputs `(N, C)`.
            y: targets as the user's data loader gives them.

        Returns:
            Targets on the device of `f`.

        Raises:
            ValueError: if shape or values do not fit.
            TypeError: if the type does not fit.
        """

    @abstractmethod
    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """Loss of each example in nats, `(N, C), checked targets -> (N,)`, without dispersion and normaliser."""

    @abstractmethod
    def hessian_root(self, f: Tensor) -> Tensor:
        """Columns `S` of shape `(K, N, C)` with `sum_k S_k S_k^T = d^2 loss / df^2` for each example."""

    @abstractmethod
    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One target for each example, y ~ p(y|f)."""

    @abstractmethod
    def inverse_link(self, f: Tensor) -> Tensor:
        """The mean of y given f: probabilities, rates, or f itself."""

    @abstractmethod
    def expectation(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """`E[y]` for Gaussian outputs `f ~ N(mean, covariance)`, in closed form, `(N, C)`: probabilities or means."""

    @abstractmethod
    def predictive(self, mean: Tensor, covariance: Tensor) -> Distribution:
        """`p(y)` for Gaussian outputs `f ~ N(mean, covariance)`, `(N, C)` and `(N, C, C)`, in closed form."""

    @property
    def precision(self) -> Tensor | float:
        """What multiplies the loss, 1 unless the likelihood has a dispersion."""
        return 1.0

    def log_normaliser(self, count: int, outputs: int) -> Tensor | float:
        """What the normaliser adds to the log likelihood of `count` examples with `outputs` outputs each."""
        return 0.0

    def log_likelihood(self, loss: Tensor, count: int, outputs: int) -> Tensor:
        """Log likelihood of data whose summed loss is known: `-precision * loss + log_normaliser`."""
        return -self.precision * loss + self.log_normaliser(count, outputs)

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        """Normalised log p(y|f) of each example, `(N,)`."""
        return -self.precision * self.loss(f, y) + self.log_normaliser(1, f.shape[-1])


def same_length(f: Tensor, y: Tensor) -> None:
    """Refuse targets that are not one for each example.

    Raises:
        ValueError: if their number differs from that of the outputs.
    """
    if y.ndim == 0 or len(y) != len(f):
        raise ValueError(
            f"Got {tuple(y.shape)} targets for outputs {tuple(f.shape)}: one target an example is expected."
        )


def check_finite(y: Tensor) -> None:
    """Refuse missing targets.

    Raises:
        ValueError: if one is NaN or infinite.
    """
    if not torch.isfinite(y).all():
        raise ValueError("The targets hold NaN or infinite values. Remove or impute these examples first.")


def one_for_each_output(f: Tensor, y: Tensor, meaning: str) -> Tensor:
    """Finite targets in shape, type and place of the outputs; `(N,)` stands for `(N, 1)`.

    Raises:
        ValueError: if the shape does not fit, or a target is not finite.
    """
    same_length(f, y)
    y = y[:, None] if y.ndim == 1 and f.shape[-1] == 1 else y
    if y.shape != f.shape:
        raise ValueError(f"Expected targets of shape {tuple(f.shape)} {meaning}, got {tuple(y.shape)}.")
    y = y.to(f.device, f.dtype)
    check_finite(y)
    return y


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Real targets with independent noise, `y ~ N(f, noise^2 I)`.

    Targets have the shape `(N, C)` of f, or `(N,)` for C = 1. The loss is `|y - f|^2 / 2`, the precision `1 / noise^2`.

    Args:
        noise: standard deviation of the observation noise, in the units of y.

    Raises:
        ValueError: if the noise is not positive.

    Example:
        >>> import torch
        >>> Gaussian(noise=1.0).log_prob(torch.zeros(1, 1), torch.zeros(1, 1))
        tensor([-0.9189])
    """

    noise: Tensor | float = 1.0

    def __post_init__(self) -> None:
        noise = torch.as_tensor(self.noise).detach()
        if noise.numel() != 1 or not 0 < float(noise) < math.inf:
            raise ValueError(f"The observation noise must be one positive number, got {noise.tolist()}.")

    def check(self, f: Tensor, y: Tensor) -> Tensor:
        """Real numbers in the shape of `f`; `(N,)` stands for `(N, 1)`.

        Raises:
            ValueError: if the shape does not fit, or a target is not finite.
        """
        return one_for_each_output(f, y, "like the outputs")

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """`|y - f|^2 / 2`."""
        return (y - f).square().sum(-1) / 2

    def hessian_root(self, f: Tensor) -> Tensor:
        """The identity, one column an output."""
        outputs = f.shape[-1]
        eye = torch.eye(outputs, dtype=f.dtype, device=f.device)
        return eye[:, None, :].expand(outputs, len(f), outputs)

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`f + noise * epsilon`."""
        return f + self.noise * torch.randn(f.shape, generator=generator, dtype=f.dtype, device=f.device)

    def inverse_link(self, f: Tensor) -> Tensor:
        """The identity."""
        return f

    def expectation(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """The outputs' mean."""
        return mean

    def predictive(self, mean: Tensor, covariance: Tensor) -> MultivariateNormal:
        """`N(mean, covariance + noise^2 I)`, exactly."""
        noise = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device) * self.noise**2
        return MultivariateNormal(mean, covariance + noise)

    @property
    def precision(self) -> Tensor | float:
        """`1 / noise^2`."""
        return self.noise**-2

    def log_normaliser(self, count: int, outputs: int) -> Tensor | float:
        """`-count * outputs * log(noise * sqrt(2 pi))`."""
        log_noise = self.noise.log() if isinstance(self.noise, Tensor) else math.log(self.noise)
        return -count * outputs * (log_noise + math.log(2 * math.pi) / 2)
