"""Samples of every likelihood: their distribution, and columns made of them."""

import math

import pytest
import torch
from likelihood_cases import IMPROBABLE, LIKELIHOODS, close, mean_of_columns, outer, possible
from scipy import stats
from torch.nn import functional

from lapkit.curvature import Categorical, Draws, Gaussian, Poisson

EXAMPLES = 5


@pytest.fixture(params=LIKELIHOODS)
def everywhere(request):
    likelihood, outputs, distribution = LIKELIHOODS[request.param]
    return likelihood, 2 * torch.randn(EXAMPLES, outputs), distribution


def test_mean_and_samples(everywhere):
    likelihood, f, distribution = everywhere
    draws = 20_000
    samples = likelihood.sample(f[:1].expand(draws, -1), Draws(0, torch.arange(draws)))
    if isinstance(likelihood, Categorical):
        samples = functional.one_hot(samples, f.shape[1]).to(f)
        mean = distribution(f[0]).probs
        variance = mean * (1 - mean)
    else:
        mean, variance = distribution(f[0]).mean, distribution(f[0]).variance
    close(likelihood.inverse_link(f)[0], mean)
    # Five standard errors; the variance of a sample variance is below 2 v^2 / n + v / n for these distributions.
    assert ((samples.mean(0) - mean).abs() <= 5 * (variance / draws).sqrt() + 1e-12).all()
    error = (samples.var(0) - variance).abs()
    assert (error <= 5 * ((2 * variance**2 + variance) / draws).sqrt() + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_have_their_distribution(dtype):
    n = 20_000
    draws = Draws(2, torch.arange(n))
    many = lambda *f: torch.tensor([f], dtype=dtype).expand(n, -1)  # noqa: E731
    classes = many(0.0, 1.0, -30.0, 2.0)
    counts = torch.bincount(Categorical().sample(classes, draws, 3), minlength=4)
    assert counts[2] == 0
    p = classes[0].double().softmax(0)[[0, 1, 3]]
    assert stats.chisquare(counts[[0, 1, 3]], (n * p / p.sum()).numpy()).pvalue > IMPROBABLE
    counts = Poisson().sample(many(1.1), draws, 3)[:, 0].long().bincount(minlength=40)
    bins, rest = counts[:9].tolist(), int(counts[9:].sum())
    mass = stats.poisson(math.exp(torch.tensor(1.1, dtype=dtype))).pmf(range(9))
    assert stats.chisquare([*bins, rest], n * torch.tensor([*mass, 1 - mass.sum()])).pvalue > IMPROBABLE
    normal = Gaussian(0.5).sample(many(2.0), draws, 3)[:, 0]
    assert normal.dtype == dtype
    assert stats.kstest(normal.numpy(), stats.norm(2, 0.5).cdf).pvalue > IMPROBABLE


def test_samples_follow_the_draws(everywhere):
    likelihood, f, _ = everywhere
    f = f.repeat(20, 1)
    draw = lambda seed, which=0: likelihood.sample(f, Draws(seed, torch.arange(len(f))), which)  # noqa: E731
    before = torch.get_rng_state()
    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    assert not torch.equal(draw(3), draw(3, 1))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0.0, 1e-30, 0.5, 1.0])
def test_the_ends_of_the_uniform_numbers_give_possible_samples(dtype, level, monkeypatch):
    """Also where the probabilities add up to a little less than one, or begin and end with none at all."""
    level = min(max(level, 2.0**-24), 1 - 2.0**-24)
    monkeypatch.setattr(
        Draws, "uniform", lambda self, draw, *shape, dtype=dtype: torch.full((len(self), *shape), level).to(dtype)
    )
    draws = Draws(0, torch.arange(60))
    f = torch.full((60, 5000), -1e4, dtype=dtype)  # with many rows, some end a little below one
    f[:, 100:4900:3] = torch.randn(60, 1600, dtype=dtype)
    y = Categorical().sample(f, draws)
    assert (f.softmax(1).gather(1, y[:, None]) > 0).all()
    counts = Poisson().sample(torch.tensor([[-50.0, 0.0, 3.0, 12.0]], dtype=dtype).expand(60, 4), draws)
    exact = stats.poisson(torch.tensor([-50.0, 0.0, 3.0, 12.0], dtype=torch.float64).exp()).ppf(level)
    assert torch.equal(counts[0].double(), torch.from_numpy(exact))


def test_rates_beyond_the_integers_are_not_sampled():
    with pytest.raises(ValueError, match="Is the output a log rate"):
        Poisson().sample(torch.full((1, 1), 40.0), Draws.fresh(1))


def test_sampled_columns_are_unbiased(everywhere):
    likelihood, f, distribution = everywhere
    f = f / 2  # rates for which 60 counts are enough
    outcomes = possible(likelihood, f, distribution)
    close(sum(p for _, p in outcomes), torch.ones(len(f)))
    y = distribution(f).sample()
    torch.testing.assert_close(
        mean_of_columns(likelihood, f, y, outcomes), outer(likelihood.hessian_root(f)), rtol=1e-9, atol=1e-11
    )
