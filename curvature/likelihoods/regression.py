"""Likelihoods of real targets: Gaussian noise of one size, of one size for each output, or as the network says."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from lapkit.curvature.columns.sampling import Draws
from lapkit.curvature.likelihoods.likelihood import DiagonalLikelihood, check_finite, like_outputs

LOG_ROOT_TWO_PI = math.log(2 * math.pi) / 2


def real_targets(f: Tensor, y: Tensor, output_axis: int | None, outputs: int | None = None) -> Tensor:
    """Finite targets in the form of the outputs; see `like_outputs`."""
    y = like_outputs(f, y, "like the outputs", output_axis=output_axis, outputs=outputs)
    check_finite(y)
    return y


def _log(value: Tensor | float) -> Tensor | float:
    return value.log() if isinstance(value, Tensor) else math.log(value)


def _check_noise(noise: Tensor | float) -> None:
    """Refuse what is no standard deviation.

    Raises:
        ValueError: if it is not one positive number.
    """
    value = torch.as_tensor(noise).detach()
    if value.numel() != 1 or not 0 < float(value) < math.inf:
        raise ValueError(f"The observation noise must be one positive number, got {value.tolist()}.")


@dataclass(frozen=True)
class Gaussian(DiagonalLikelihood):
    """Real targets with independent noise, `y ~ N(f, noise^2 I)`.

    Targets have the shape of f, or `(N,)` for C = 1. The loss is `|y - f|^2 / 2`, the precision `1 / noise^2`.

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
        _check_noise(self.noise)

    def check(self, f: Tensor, y: Tensor, output_axis: int | None = None) -> Tensor:
        """Real numbers in the shape of the outputs; `(N,)` stands for `(N, 1)`.

        Raises:
            ValueError: if the shape does not fit, or a target is not finite.
        """
        return real_targets(f, y, output_axis)

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """`|y - f|^2 / 2`."""
        return (y - f).square().flatten(1).sum(-1) / 2

    def root_diagonal(self, f: Tensor, y: Tensor | None = None) -> Tensor:
        """Ones: the Hessian is the identity."""
        return f.new_ones(())

    def sample(self, f: Tensor, draws: Draws, draw: int = 0) -> Tensor:
        """`f + noise * epsilon`."""
        return f + self.noise * draws.normal(draw, *f.shape[1:], dtype=f.dtype)

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

    def with_noise(self, noise: Tensor | float) -> Gaussian:
        """See `Likelihood.with_noise`."""
        return Gaussian(noise)

    @property
    def precision(self) -> Tensor | float:
        """`1 / noise^2`."""
        return 1 / self.noise**2  # a negative power is an error for integers

    def log_normaliser(self, count: float, outputs: float) -> Tensor | float:
        """`-count * outputs * log(noise * sqrt(2 pi))`."""
        return -count * outputs * (_log(self.noise) + LOG_ROOT_TWO_PI)


@dataclass(frozen=True, eq=False)
class PerOutputGaussian(DiagonalLikelihood):
    """Real targets whose outputs have noise of different sizes, `y_c ~ N(f_c, (scale * noise_c)^2)`.

    The loss is `sum_c ((y_c - f_c) / noise_c)^2 / 2`, the precision `1 / scale^2`: after a fit the scale, which all
    outputs share, can be tuned; other ratios of the noises need another fit.

    Args:
        noise: standard deviations `(C,)`, in the units of y.
        scale: a factor of all of them.

    Raises:
        ValueError: if noise or scale are not positive, or the noise is no vector.

    Example:
        >>> import torch
        >>> PerOutputGaussian(torch.tensor([1.0, 2.0])).log_prob(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([-2.5310])
    """

    noise: Tensor
    scale: Tensor | float = 1.0

    def __post_init__(self) -> None:
        _check_noise(self.scale)
        noise = torch.as_tensor(self.noise).detach()
        if noise.ndim != 1 or not len(noise) or not ((noise > 0) & torch.isfinite(noise)).all():
            raise ValueError(f"Expected positive noises, one for each output (C,), got {noise.tolist()}.")

    def check(self, f: Tensor, y: Tensor, output_axis: int | None = None) -> Tensor:
        """Real numbers in the shape of the outputs; `(N,)` stands for `(N, 1)`.

        Raises:
            ValueError: if the shape does not fit, there is not one noise for each output, or a target is not finite.
        """
        if f.shape[-1] != len(self.noise):
            raise ValueError(f"The likelihood has {len(self.noise)} noises for {f.shape[-1]} outputs.")
        return real_targets(f, y, output_axis)

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """`sum_c ((y_c - f_c) / noise_c)^2 / 2`."""
        return ((y - f) / self.noise.to(f)).square().flatten(1).sum(-1) / 2

    def root_diagonal(self, f: Tensor, y: Tensor | None = None) -> Tensor:
        """`1 / noise`."""
        return self.noise.to(f).reciprocal()

    def sample(self, f: Tensor, draws: Draws, draw: int = 0) -> Tensor:
        """`f + scale * noise * epsilon`."""
        return f + self.scale * self.noise.to(f) * draws.normal(draw, *f.shape[1:], dtype=f.dtype)

    def inverse_link(self, f: Tensor) -> Tensor:
        """The identity."""
        return f

    def expectation(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """The outputs' mean."""
        return mean

    def predictive(self, mean: Tensor, covariance: Tensor) -> MultivariateNormal:
        """`N(mean, covariance + scale^2 diag(noise^2))`, exactly."""
        return MultivariateNormal(mean, covariance + torch.diag((self.scale * self.noise.to(mean)).square()))

    def with_noise(self, noise: Tensor | float) -> PerOutputGaussian:
        """See `Likelihood.with_noise`: another scale of all outputs' noises."""
        return PerOutputGaussian(self.noise, noise)

    @property
    def precision(self) -> Tensor | float:
        """`1 / scale^2`."""
        return 1 / self.scale**2  # a negative power is an error for integers

    def log_normaliser(self, count: float, outputs: float) -> Tensor | float:
        """`-count * T * sum_c log(scale * noise_c * sqrt(2 pi))`, `outputs = T C`."""
        return -count * outputs * (_log(self.scale) + self.noise.log().mean() + LOG_ROOT_TWO_PI)


@dataclass(frozen=True)
class HeteroscedasticGaussian(DiagonalLikelihood):
    """Real targets with noise that the network predicts: outputs are D means and D log variances s.

    `loss = -log p(y|f) = sum_d [(y_d - m_d)^2 exp(-s_d) + s_d + log(2 pi)] / 2` for `f = (m, s)`, targets `(N, D)`.
    Its Hessian depends on y and can be indefinite, so the curvature is the Fisher information, its mean over
    `y ~ p(y|f)`: `diag(exp(-s), 1/2)`.

    Example:
        >>> import torch
        >>> HeteroscedasticGaussian().log_prob(torch.zeros(1, 2), torch.zeros(1, 1))
        tensor([-0.9189])

    Reference:
        Nix and Weigend, Estimating the mean and variance of the target probability distribution, 1994.
    """

    def check(self, f: Tensor, y: Tensor, output_axis: int | None = None) -> Tensor:
        """Real numbers, half as many as outputs; `(N,)` stands for `(N, 1)`.

        Raises:
            ValueError: if the number of outputs is odd, the shape does not fit, or a target is not finite.
        """
        if f.shape[-1] % 2:
            raise ValueError(f"Expected means and log variances, an even number of outputs, got {f.shape[-1]}.")
        return real_targets(f, y, output_axis, outputs=f.shape[-1] // 2)

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """`-log p(y|f)`."""
        mean, log_variance = f.chunk(2, dim=-1)
        each = (y - mean).square() * (-log_variance).exp() + log_variance
        return (each / 2 + LOG_ROOT_TWO_PI).flatten(1).sum(-1)

    def root_diagonal(self, f: Tensor, y: Tensor | None = None) -> Tensor:
        """`(exp(-s / 2), sqrt(1 / 2))`, the root of the Fisher information."""
        log_variance = f.chunk(2, dim=-1)[1]
        return torch.cat([(-log_variance / 2).exp(), torch.full_like(log_variance, math.sqrt(0.5))], dim=-1)

    def sample(self, f: Tensor, draws: Draws, draw: int = 0) -> Tensor:
        """`m + exp(s / 2) * epsilon`."""
        mean, log_variance = f.chunk(2, dim=-1)
        return mean + (log_variance / 2).exp() * draws.normal(draw, *mean.shape[1:], dtype=f.dtype)

    def inverse_link(self, f: Tensor) -> Tensor:
        """The means `(N, D)`."""
        return f.chunk(2, dim=-1)[0]

    def expectation(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """The means `(N, D)`, exactly."""
        return self.inverse_link(mean)

    def with_noise(self, noise: Tensor | float) -> HeteroscedasticGaussian:
        """Refused.

        Raises:
            ValueError: always, as the noise is an output.
        """
        raise ValueError(
            "HeteroscedasticGaussian has no observation noise to set or tune: the network predicts it, and training "
            "has found it. Train on, or take PerOutputGaussian, whose noise does not depend on the input."
        )

    def predictive(self, mean: Tensor, covariance: Tensor) -> MultivariateNormal:
        """The Gaussian with the exact mean and covariance of y, `Cov[m] + diag(E[exp(s)])`.

        `E[exp(s)] = exp(E[s] + Var[s] / 2)`. The true distribution, a scale mixture, has heavier tails. Far from the
        data, where `Var[s]` is large, this mean of a log-normal variance explodes, although the median `exp(E[s])` need
        not; for the quantiles of y there, draw f by `functional_samples` and y given f.
        """
        means, log_variance = mean.chunk(2, dim=-1)
        outputs = means.shape[-1]
        spread = covariance.diagonal(dim1=-2, dim2=-1)[..., outputs:]
        noise = torch.diag_embed((log_variance + spread / 2).exp())
        return MultivariateNormal(means, covariance[..., :outputs, :outputs] + noise)
