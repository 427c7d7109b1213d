"""What gpytorch's marginal likelihood needs to be that of the weights: the noise, and the terms at the mode."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.posteriors.function_space.gaussian_processes import gpytorch
from lapkit.posteriors.function_space.positive import by_logarithm


@final
class WhitenedNoise(gpytorch.likelihoods.GaussianLikelihood):  # type: ignore[misc]  # gpytorch has no types
    """Independent noise of the whitened observations, of variance `temperature / precision` of the likelihood.

    For a Gaussian likelihood this is `temperature * noise^2`, and a parameter to be tuned; otherwise it is fixed.

    Args:
        variance: where it starts.
        rows: the number of observations.
        tuned: whether it is a parameter.
        device: where the observations are.
    """

    def __init__(self, variance: float, rows: int, *, tuned: bool, device: torch.device) -> None:
        super().__init__(noise_constraint=by_logarithm())
        self.to(dtype=torch.float64, device=device)
        self.rows = rows
        self.noise = torch.tensor([variance], dtype=torch.float64, device=device)
        self.raw_noise.requires_grad_(tuned)

    def marginal(self, function_dist: Any, *args: Any, **kwargs: Any) -> Any:
        """The observations' distribution.

        Raises:
            ValueError: if the distribution is not that of the observations: predictions have other noise.
        """
        if tuple(function_dist.event_shape) != (self.rows,):
            raise ValueError(
                f"This noise belongs to the {self.rows} whitened observations, got a distribution over "
                f"{tuple(function_dist.event_shape)}. For targets at new inputs call posterior(x, "
                "observation_noise=True), or a link of lapkit.posteriors on functions(x)."
            )
        return super().marginal(function_dist, *args, **kwargs)


@final
class AtTheMode(gpytorch.mlls.AddedLossTerm):  # type: ignore[misc]  # gpytorch has no types
    """The part of the log evidence that does not come from the observations' covariance.

    Args:
        value: in nats.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def loss(self, *params: Any) -> Tensor:
        """The value."""
        return self.value


def target_noise(likelihood: Likelihood, outputs: Tensor) -> Tensor:
    """The covariance of an example's targets given its outputs, `(C, C)`.

    Args:
        likelihood: of targets given outputs.
        outputs: any, `(*, C)`.

    Raises:
        ValueError: if targets are not the outputs with Gaussian noise.
    """
    zero = outputs.new_zeros(1, outputs.shape[-1])
    with torch.no_grad():
        found = likelihood.predictive(zero, torch.diag_embed(zero))
    if not isinstance(found, MultivariateNormal) or found.mean.shape != zero.shape:
        raise ValueError(
            f"Targets of {type(likelihood).__name__} are not the outputs with Gaussian noise. Leave observation_noise "
            "away, and apply a link of lapkit.posteriors to functions(x)."
        )
    return found.covariance_matrix[0]
