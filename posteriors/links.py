"""From a distribution over outputs f to one over targets y."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution

from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.posteriors.functions import FunctionDistribution


def closed_form(likelihood: Likelihood, f: FunctionDistribution) -> Distribution:
    """`p(y|x)` without sampling: exact for a Gaussian likelihood, MacKay's probit approximation for classes.

    Args:
        likelihood: of targets given outputs.
        f: the outputs' distribution.

    Returns:
        A distribution of y; observation noise is part of it.
    """
    return likelihood.predictive(f.mean, f.covariance)


def monte_carlo(
    likelihood: Likelihood,
    f: FunctionDistribution,
    n_samples: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The mean of y, `E[inverse_link(f)]`, over samples of f.

    Args:
        likelihood: of targets given outputs.
        f: the outputs' distribution.
        n_samples: S; the error falls as `1 / sqrt(S)`.
        generator: the only source of randomness.

    Returns:
        `(N, C)`: probabilities for classes.

    Raises:
        ValueError: if there is not at least one sample.
    """
    if n_samples < 1:
        raise ValueError(f"A mean needs at least one sample, got n_samples={n_samples}.")
    return likelihood.inverse_link(f.sample(n_samples, generator)).mean(0)
