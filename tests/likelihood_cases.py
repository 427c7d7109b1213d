"""Every likelihood beside the distribution of torch that it stands for, and all that it can sample."""

import copy
import itertools
import math

import torch
from torch import distributions

from lapkit.curvature import Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian, PerOutputGaussian, Poisson

IMPROBABLE = 1e-4  # p-value below which a test fails; seeds are fixed, so it does so always or never


def close(actual, expected, rtol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-12)


def independent(distribution):
    return distributions.Independent(distribution, 1)


def heteroscedastic(f):
    mean, log_variance = f.chunk(2, dim=-1)
    return independent(distributions.Normal(mean, (log_variance / 2).exp()))


NOISES = torch.tensor([0.3, 2.0, 1.0], dtype=torch.float64)

# name: (likelihood, number of outputs C, the distribution of torch that it stands for)
LIKELIHOODS = {
    "categorical": (Categorical(), 4, lambda f: distributions.Categorical(logits=f)),
    "two classes": (Categorical(), 2, lambda f: distributions.Categorical(logits=f)),
    "bernoulli": (Bernoulli(), 3, lambda f: independent(distributions.Bernoulli(logits=f))),
    "one bernoulli": (Bernoulli(), 1, lambda f: independent(distributions.Bernoulli(logits=f))),
    "gaussian": (Gaussian(), 3, lambda f: independent(distributions.Normal(f, 1.0))),
    "gaussian with noise": (Gaussian(noise=0.3), 2, lambda f: independent(distributions.Normal(f, 0.3))),
    "gaussian with a tensor of noise": (
        Gaussian(noise=torch.tensor(2.0, dtype=torch.float64)),
        1,
        lambda f: independent(distributions.Normal(f, 2.0)),
    ),
    "noise for each output": (PerOutputGaussian(NOISES), 3, lambda f: independent(distributions.Normal(f, NOISES))),
    "scaled noise for each output": (
        PerOutputGaussian(NOISES, scale=0.5),
        3,
        lambda f: independent(distributions.Normal(f, 0.5 * NOISES)),
    ),
    "heteroscedastic": (HeteroscedasticGaussian(), 4, heteroscedastic),
    "poisson": (Poisson(), 2, lambda f: independent(distributions.Poisson(f.exp()))),
}


def outer(columns):
    """S S^T of each example, (N, C, C), and position."""
    return torch.einsum("k...c,k...d->...cd", columns, columns)


# The probabilities, and values in units of the standard deviation, that stand for a normal distribution up to degree 5.
HERMITE = [(1 / 6, -math.sqrt(3)), (2 / 3, 0.0), (1 / 6, math.sqrt(3))]


def possible(likelihood, f, distribution):
    """What y can be, for all examples at once, and with which probability (N,)."""
    if isinstance(likelihood, Categorical):
        return [(torch.full((len(f),), c), distribution(f).probs[:, c]) for c in range(f.shape[1])]
    if isinstance(likelihood, Bernoulli | Poisson):
        top = 2 if isinstance(likelihood, Bernoulli) else 60
        combinations = itertools.product(*[range(top)] * f.shape[1])
        values = [torch.tensor(c).to(f).expand_as(f) for c in combinations]
        return [(y, distribution(f).log_prob(y).exp()) for y in values]
    d = distribution(f)
    combinations = itertools.product(HERMITE, repeat=d.mean.shape[1])
    return [
        (d.mean + d.stddev * torch.tensor([z for _, z in c]), torch.full((len(f),), math.prod(w for w, _ in c)))
        for c in combinations
    ]


def with_samples(likelihood, values):
    """The same likelihood, whose draw number m is the m-th of the values."""
    other = copy.copy(likelihood)
    object.__setattr__(other, "sample", lambda f, draws, draw=0: values[draw])
    return other


def mean_of_columns(likelihood, f, y, outcomes):
    """`E[s s^T]` over all that can be sampled, by its definition."""
    likelihood = with_samples(likelihood, [value for value, _ in outcomes])
    columns = [likelihood.sampled_column(f, y, None, m) for m in range(len(outcomes))]
    return sum(p[:, None, None] * outer(s[None]) for s, (_, p) in zip(columns, outcomes, strict=True))
