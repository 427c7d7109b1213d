"""Distributions: of targets, and of class probabilities."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor
from torch.distributions import Bernoulli as BernoulliDistribution
from torch.distributions import Categorical as CategoricalDistribution
from torch.distributions import Dirichlet, Distribution, Independent

from lapkit.curvature.likelihoods.binary import Bernoulli
from lapkit.curvature.likelihoods.classification import Categorical
from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.curvature.likelihoods.preference import BradleyTerry
from lapkit.curvature.likelihoods.regression import Gaussian, HeteroscedasticGaussian, PerOutputGaussian
from lapkit.posteriors.bridge import laplace_bridge
from lapkit.posteriors.functions import FunctionDistribution
from lapkit.posteriors.links import Link, closed_form, no_and_yes, probit


def predictive(
    likelihood: Likelihood,
    f: FunctionDistribution,
    link: Link = probit,
    n_samples: int = 100,
    generator: torch.Generator | None = None,
) -> Distribution:
    """`p(y|x)`, for classes with probabilities by a link of one's choice.

    Args:
        likelihood: of targets given outputs.
        f: the outputs' distribution.
        link: one of `LINKS`. The default is the likelihood's own closed form, the only one where there are no classes.
        n_samples: of a link that takes samples.
        generator: of a link that takes samples.

    Returns:
        `Categorical`, or `Bernoulli` of which the last axis is one event; otherwise what `closed_form` gives.

    Raises:
        TypeError: if the likelihood is not one of classes and the link is not the default.
    """
    if link is probit:
        return closed_form(likelihood, f)
    return class_distribution(likelihood, link(likelihood, f, n_samples, generator))


@singledispatch
def class_distribution(likelihood: Likelihood, probabilities: Tensor) -> Distribution:
    """The distribution of targets with these probabilities.

    Args:
        likelihood: `Categorical` or `Bernoulli`.
        probabilities: `(N, C)` or `(N, T, C)`.

    Returns:
        `Categorical`, or `Bernoulli` of which the last axis is one event.

    Raises:
        TypeError: if the likelihood is not one of classes.
    """
    raise TypeError(
        f"The mean of y alone does not make its distribution under {type(likelihood).__name__}. Use the link 'probit', "
        "its own closed form."
    )


@class_distribution.register
def _(likelihood: Categorical, probabilities: Tensor) -> Distribution:
    return CategoricalDistribution(probs=probabilities)


@class_distribution.register
def _(likelihood: Bernoulli, probabilities: Tensor) -> Distribution:
    return Independent(BernoulliDistribution(probs=probabilities), 1)


@singledispatch
def mean_outputs(likelihood: Likelihood, outputs: int) -> int:
    """How many of the outputs, the first ones, are means of targets: with them the targets' mean is Gaussian too.

    Args:
        likelihood: of targets given outputs.
        outputs: C.

    Returns:
        C, C / 2 where log variances follow, and 0 where the mean of y is no output, as for classes. Rewards, which no
        one observes, count as targets: they are what is predicted.
    """
    return 0


@mean_outputs.register(Gaussian)
@mean_outputs.register(PerOutputGaussian)
@mean_outputs.register(BradleyTerry)
def _(likelihood: Likelihood, outputs: int) -> int:
    return outputs


@mean_outputs.register
def _(likelihood: HeteroscedasticGaussian, outputs: int) -> int:
    return outputs // 2


@singledispatch
def dirichlet(likelihood: Likelihood, f: FunctionDistribution, *, normalise: bool = False) -> Dirichlet:
    """The Laplace bridge: a distribution over class probabilities, with all its moments. See `laplace_bridge`.

    Args:
        likelihood: `Categorical` or `Bernoulli`.
        f: the outputs' distribution.
        normalise: see `laplace_bridge`.

    Returns:
        Batch shape `(N,)` over C classes; for `Bernoulli` `(N, C)` over no and yes.

    Raises:
        TypeError: if the likelihood is not one of classes.
    """
    raise TypeError(f"The Laplace bridge is for class probabilities; {type(likelihood).__name__} has none.")


@dirichlet.register
def _(likelihood: Categorical, f: FunctionDistribution, *, normalise: bool = False) -> Dirichlet:
    return laplace_bridge(f.mean, f.covariance, normalise=normalise)


@dirichlet.register
def _(likelihood: Bernoulli, f: FunctionDistribution, *, normalise: bool = False) -> Dirichlet:
    return laplace_bridge(*no_and_yes(f), normalise=normalise)
