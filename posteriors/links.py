"""From a distribution over outputs f to one over targets y."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution

from lapkit.curvature.likelihoods.binary import Bernoulli
from lapkit.curvature.likelihoods.classification import Categorical
from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.posteriors.bridge import bridge, bridge_norm
from lapkit.posteriors.functions import FunctionDistribution
from lapkit.posteriors.quadrature import gauss_hermite
from lapkit.posteriors.sampling import sobol_normal, spread
from lapkit.posteriors.softmax import mean_field, probit_centered

PIECE = 2**22  # sampled numbers at a time


class Link(Protocol):
    """The mean of y, `E[inverse_link(f)]`, `(N, C)`; what takes no samples ignores the last two arguments."""

    def __call__(
        self,
        likelihood: Likelihood,
        f: FunctionDistribution,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Probabilities for classes."""


def closed_form(likelihood: Likelihood, f: FunctionDistribution) -> Distribution:
    """`p(y|x)` without sampling: exact for a Gaussian likelihood, MacKay's probit approximation for classes.

    Args:
        likelihood: of targets given outputs.
        f: the outputs' distribution.

    Returns:
        A distribution of y; observation noise is part of it.
    """
    return likelihood.predictive(f.mean, f.covariance)


def probit(
    likelihood: Likelihood,
    f: FunctionDistribution,
    n_samples: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The likelihood's own closed form of the mean of y: MacKay's approximation for classes, exact for most others.

    Args:
        likelihood: of targets given outputs.
        f: the outputs' distribution.
        n_samples: not used.
        generator: not used.

    Returns:
        `(N, C)`: probabilities for classes.
    """
    return likelihood.expectation(f.mean, f.covariance)


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


def quasi_monte_carlo(
    likelihood: Likelihood,
    f: FunctionDistribution,
    n_samples: int = 128,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The mean of y, `E[inverse_link(f)]`, over evenly spread samples of f, the same points for every input.

    With 128 points its root mean squared error is 12 times smaller than Monte Carlo's for three classes, 4 times for
    ten, 2 times for a hundred; with 1024 points 40, 8 and 3 times.

    Args:
        likelihood: of targets given outputs.
        f: the outputs' distribution; where a covariance is singular, it has no derivative.
        n_samples: S, best a power of two; the error falls nearly as `1 / S`.
        generator: the only source of randomness.

    Returns:
        `(N, C)`: probabilities for classes.

    Raises:
        TypeError: if the numbers are not floating.
        ValueError: if f is no Gaussian, there is no sample, or there are more outputs than Sobol sequences are known
            for.
    """
    return over_quasi_samples(lambda draws: likelihood.inverse_link(draws).mean(0), f, n_samples, generator)


def over_quasi_samples(
    statistic: Callable[[Tensor], Tensor], f: FunctionDistribution, n_samples: int, generator: torch.Generator | None
) -> Tensor:
    """A statistic of samples `(S, B, ...)` of f, `(B, ...)`, for as many inputs at a time as there is room for."""
    points = sobol_normal(n_samples, f.mean.shape[-1], generator)
    step = max(1, PIECE * len(f.mean) // max(1, n_samples * f.mean.numel()))
    pieces = zip(f.mean.split(step), f.covariance.split(step), strict=True)
    return torch.cat([statistic(spread(mean, covariance, points)) for mean, covariance in pieces])


# -- links of classes


@singledispatch
def over_classes(
    likelihood: Likelihood, f: FunctionDistribution, probabilities: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Apply a closed form for softmax probabilities to a likelihood of classes.

    Args:
        likelihood: `Categorical`, or `Bernoulli`, whose logit f counts as the two logits `(-f / 2, f / 2)`.
        f: the outputs' distribution.
        probabilities: means `(..., C)` and covariances `(..., C, C)` to `(..., C)`.

    Returns:
        Probabilities `(N, C)`.

    Raises:
        TypeError: if the likelihood is not one of classes.
    """
    raise TypeError(
        f"This link is for class probabilities; {type(likelihood).__name__} has none. Use 'probit', which is the "
        "likelihood's own closed form, 'mc' or 'qmc'."
    )


@over_classes.register
def _(likelihood: Categorical, f: FunctionDistribution, probabilities: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return probabilities(f.mean, f.covariance)


@over_classes.register
def _(likelihood: Bernoulli, f: FunctionDistribution, probabilities: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return probabilities(*no_and_yes(f))[..., 1]


def no_and_yes(f: FunctionDistribution) -> tuple[Tensor, Tensor]:
    """Each logit f as logits `(-f / 2, f / 2)` of two classes: means `(..., C, 2)`, covariances `(..., C, 2, 2)`."""
    sign = f.mean.new_tensor([-1.0, 1.0])
    return f.mean[..., None] * sign / 2, f.variance[..., None, None] * sign[:, None] * sign / 4


def _of_classes(probabilities: Callable[[Tensor, Tensor], Tensor]) -> Link:
    def link(
        likelihood: Likelihood,
        f: FunctionDistribution,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return over_classes(likelihood, f, probabilities)

    return link


LINKS: dict[str, Link] = {
    "probit": probit,
    "probit_centered": _of_classes(probit_centered),
    "mean_field": _of_classes(mean_field),
    "bridge": _of_classes(bridge),
    "bridge_norm": _of_classes(bridge_norm),
    "gauss_hermite": _of_classes(gauss_hermite),
    "mc": monte_carlo,
    "qmc": quasi_monte_carlo,
}
