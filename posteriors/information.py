"""What is uncertain because y is random, and what because the weights are unknown.

For classes, in nats: the entropy of the predictive is the expected entropy of y given f, the aleatoric part, plus the
mutual information of y and f, the epistemic part, which more data would remove. For real targets and counts the
variance of y is the expected variance given f plus the variance of the mean given f, in the square of the units of y.

For all T positions of an input, and for all yes-or-no answers or real targets, each has its own numbers: what they have
in common is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor
from torch.distributions import Dirichlet

from lapkit.curvature.likelihoods.binary import Bernoulli
from lapkit.curvature.likelihoods.classification import Categorical
from lapkit.curvature.likelihoods.counts import Poisson
from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.curvature.likelihoods.preference import BradleyTerry
from lapkit.curvature.likelihoods.regression import Gaussian, HeteroscedasticGaussian, PerOutputGaussian
from lapkit.posteriors.checks import check_variance
from lapkit.posteriors.functions import FunctionDistribution
from lapkit.posteriors.links import over_quasi_samples
from lapkit.posteriors.quadrature import difference, entropy_of_logit, expected_entropy, expected_sigmoid

STIRLING = 20.0  # from here on the series is exact to 1e-14


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """The two parts of the uncertainty of y, none of them negative.

    Args:
        aleatoric: expected under known weights: noise and overlapping classes.
        epistemic: of the weights: mutual information in nats, or a variance.
    """

    aleatoric: Tensor
    epistemic: Tensor

    @property
    def total(self) -> Tensor:
        """Of the predictive: `aleatoric + epistemic`."""
        return self.aleatoric + self.epistemic


@singledispatch
def uncertainty(
    likelihood: Likelihood,
    f: FunctionDistribution,
    n_samples: int = 512,
    generator: torch.Generator | None = None,
) -> Uncertainty:
    """Split the uncertainty of y.

    Args:
        likelihood: `Categorical` (two classes by quadrature, more by quasi-Monte Carlo), `Bernoulli` and, of pairs,
            `BradleyTerry` (quadrature), Gaussians and `Poisson` (exact).
        f: the outputs' distribution.
        n_samples: of quasi-Monte Carlo, best a power of two.
        generator: of quasi-Monte Carlo, the only source of randomness.

    Returns:
        For classes entropies `(N,)`, for yes or no `(N, C)`, for targets variances `(N, C)`; `(N, T)` and `(N, T, C)`
        with positions.

    Raises:
        TypeError: if the split of this likelihood is not known.
        ValueError: if f is no Gaussian, or there is no sample.

    Reference:
        Depeweg et al., Decomposition of uncertainty in Bayesian deep learning, 2018, eq. (3), (5); Houlsby et al.,
        Bayesian active learning for classification and preference learning, 2011.
    """
    raise TypeError(
        f"The uncertainty of {type(likelihood).__name__} is not split in closed form. For classes give samples of "
        "their log probabilities to uncertainty_of_samples."
    )


@uncertainty.register
def _(
    likelihood: Categorical,
    f: FunctionDistribution,
    n_samples: int = 512,
    generator: torch.Generator | None = None,
) -> Uncertainty:
    if f.mean.shape[-1] == 2:
        return uncertainty_of_logit(*difference(f.mean, f.covariance))

    def split(draws: Tensor) -> Tensor:
        parts = uncertainty_of_samples(draws.log_softmax(-1))
        return torch.stack([parts.aleatoric, parts.epistemic], dim=-1)

    return Uncertainty(*over_quasi_samples(split, f, n_samples, generator).unbind(-1))


@uncertainty.register
def _(
    likelihood: BradleyTerry,
    f: FunctionDistribution,
    n_samples: int = 512,
    generator: torch.Generator | None = None,
) -> Uncertainty:
    likelihood.predictive(f.mean, f.covariance)  # refuses what is no pair
    return uncertainty_of_logit(*difference(f.mean, f.covariance))


@uncertainty.register
def _(
    likelihood: Bernoulli,
    f: FunctionDistribution,
    n_samples: int = 512,
    generator: torch.Generator | None = None,
) -> Uncertainty:
    return uncertainty_of_logit(f.mean, f.variance)


@uncertainty.register
def _(
    likelihood: Gaussian,
    f: FunctionDistribution,
    n_samples: int = 512,
    generator: torch.Generator | None = None,
) -> Uncertainty:
    return Uncertainty(torch.as_tensor(likelihood.noise).to(f.mean).square().expand_as(f.mean), f.variance)


@uncertainty.register
def _(
    likelihood: PerOutputGaussian,
    f: FunctionDistribution,
    n_samples: int = 512,
    generator: torch.Generator | None = None,
) -> Uncertainty:
    return Uncertainty((likelihood.scale * likelihood.noise.to(f.mean)).square().expand_as(f.mean), f.variance)


@uncertainty.register
def _(
    likelihood: HeteroscedasticGaussian,
    f: FunctionDistribution,
    n_samples: int = 512,
    generator: torch.Generator | None = None,
) -> Uncertainty:
    """The noise `E[exp(s)] = exp(E[s] + Var[s] / 2)` counts as aleatoric, all of it: far from the data it explodes."""
    of_mean, of_log_noise = f.variance.chunk(2, dim=-1)
    return Uncertainty((f.mean.chunk(2, dim=-1)[1] + of_log_noise / 2).exp(), of_mean)


@uncertainty.register
def _(
    likelihood: Poisson,
    f: FunctionDistribution,
    n_samples: int = 512,
    generator: torch.Generator | None = None,
) -> Uncertainty:
    """The rate, the variance of y given it, is log-normal: mean `r = exp(m + v / 2)`, variance `r^2 (e^v - 1)`."""
    rate = likelihood.expectation(f.mean, f.covariance)
    return Uncertainty(rate, rate.square() * f.variance.expm1())


def uncertainty_of_logit(mean: Tensor, variance: Tensor) -> Uncertainty:
    """Of yes or no with logit `f ~ N(mean, variance)`, to 1e-12.

    Args:
        mean: any shape.
        variance: of the same shape.

    Returns:
        Entropies in nats, of that shape.

    Raises:
        TypeError: if the numbers are not floating.
        ValueError: if the shapes differ, a number is not finite, or a variance is negative.

    Example:
        >>> import torch
        >>> uncertainty_of_logit(torch.tensor(0.0), torch.tensor(100.0)).epistemic
        tensor(0.5648)
    """
    check_variance(mean, variance)
    m, v = mean.double(), variance.double()  # a small epistemic part is the difference of two large numbers
    aleatoric = expected_entropy(m, v)
    lower = torch.where(m > 0, -m, m)
    p = expected_sigmoid(lower, v).clamp_min(torch.finfo(m.dtype).tiny)  # entr has no derivative at 0
    total = torch.where(v == 0, entropy_of_logit(m), torch.special.entr(p) + torch.special.entr(1 - p))
    return Uncertainty(aleatoric.to(mean.dtype), (total - aleatoric).clamp_min(0).to(mean.dtype))


def uncertainty_of_samples(log_probabilities: Tensor) -> Uncertainty:
    """Of classes, by samples of their probabilities: of a posterior, or the members of an ensemble.

    The epistemic part is the mean relative entropy of the samples to their mean; with S samples it is at most `log S`,
    and too small by about the variance of the mean.

    Args:
        log_probabilities: `(S, ..., C)`, normalised, `-inf` allowed.

    Returns:
        Entropies in nats, `(...)`.

    Raises:
        TypeError: if the numbers are not floating.
        ValueError: if there is no sample, or probabilities do not sum to one.
    """
    _check_samples(log_probabilities)
    p = log_probabilities.exp()
    of_mean = log_probabilities.logsumexp(0) - torch.tensor(len(p), dtype=p.dtype).log()
    # Where p is zero so is its part, whatever its logarithm.
    own = torch.where(p > 0, log_probabilities, 0.0)
    gap = torch.where(p > 0, log_probabilities - of_mean, 0.0)
    return Uncertainty(-(p * own).sum(-1).mean(0), (p * gap).sum(-1).mean(0).clamp_min(0))


def _check_samples(log_probabilities: Tensor) -> None:
    """Refuse what are no samples of log probabilities.

    Raises:
        TypeError: if the numbers are not floating.
        ValueError: if there is no sample, or probabilities do not sum to one.
    """
    if not log_probabilities.is_floating_point():
        raise TypeError(f"Expected log probabilities of a floating type, got {log_probabilities.dtype}.")
    if log_probabilities.ndim < 2 or not len(log_probabilities):
        raise ValueError(f"Expected samples (S, ..., C), at least one, got {tuple(log_probabilities.shape)}.")
    error = log_probabilities.logsumexp(-1).abs()
    if not (error <= torch.finfo(error.dtype).eps ** 0.5).all():
        raise ValueError(
            "Expected logarithms of probabilities that sum to one over the last axis. Logits become such by "
            ".log_softmax(-1), probabilities by .log()."
        )


def uncertainty_of_dirichlet(probabilities: Dirichlet) -> Uncertainty:
    """Of classes whose probabilities have a Dirichlet distribution with concentrations a, in closed form.

    Total entropy is that of `p = a / a_0`, `a_0 = sum_c a_c`; the mutual information `sum_c p_c g(a_c) - g(a_0)` with
    `g(a) = digamma(a + 1) - log(a)`.

    Args:
        probabilities: of batch shape `(...)`.

    Returns:
        Entropies in nats, `(...)`.

    Reference:
        Malinin and Gales, Predictive uncertainty estimation via prior networks, 2018, eq. (17), (18).
    """
    a = probabilities.concentration
    a0 = a.sum(-1)
    p = a / a0[..., None]
    epistemic = ((p * _digamma_excess(a)).sum(-1) - _digamma_excess(a0)).clamp_min(0)
    return Uncertainty((torch.special.entr(p).sum(-1) - epistemic).clamp_min(0), epistemic)


def _digamma_excess(a: Tensor) -> Tensor:
    """`digamma(a + 1) - log(a)`, about `1 / (2 a)`, with all its digits where a is large."""
    large = a.clamp_min(STIRLING)
    square = large.square().reciprocal()
    series = 1 / (2 * large) - square / 12 * (1 - square / 10 * (1 - square * 10 / 21 * (1 - square * 21 / 20)))
    small = a.clamp_max(STIRLING)
    return torch.where(a < STIRLING, torch.digamma(small + 1) - small.log(), series)
