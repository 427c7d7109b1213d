"""Counts at a Gamma rate against scipy's negative binomial, torch's Poisson distribution, and by their definition."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from lapkit.curvature import GammaPoisson

MEANS = torch.tensor([0.01, 0.7, 5.0, 40.0, 3000.0], dtype=torch.float64)


def values(mean):
    return (mean * torch.tensor([0.0, 0.5, 1.0, 1.7, 4.0])[:, None]).round()


@pytest.mark.parametrize("overdispersion", [1e-4, 0.01, 0.0499, 0.05, 0.0501, 0.3, 1.0, 20.0])
def test_log_prob_is_that_of_the_negative_binomial(overdispersion):
    y, r = values(MEANS), 1 / overdispersion
    expected = stats.nbinom(r, (r / (r + MEANS)).numpy()).logpmf(y)
    actual = GammaPoisson(MEANS, torch.tensor(overdispersion)).log_prob(y)
    # scipy's own digits: its log Gamma functions of 1e4 cancel.
    torch.testing.assert_close(actual, torch.from_numpy(np.asarray(expected)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("overdispersion", [0.0498, 0.0499])
def test_the_series_is_exact_where_it_begins(overdispersion):
    mean, r = torch.tensor(2.0), 1 / overdispersion
    y = torch.arange(6.0)
    expected = torch.from_numpy(stats.nbinom(r, r / (r + 2.0)).logpmf(y.numpy()))
    actual = GammaPoisson(mean, torch.tensor(overdispersion)).log_prob(y)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("overdispersion", [0.0, 1e-300, 1e-16])
def test_no_overdispersion_is_poisson(overdispersion):
    y = values(MEANS)
    actual = GammaPoisson(MEANS, torch.tensor(overdispersion)).log_prob(y)
    torch.testing.assert_close(actual, torch.distributions.Poisson(MEANS).log_prob(y), rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("overdispersion", [1e-12, 1e-8, 1e-5])
def test_little_overdispersion_by_its_expansion(overdispersion):
    """`log p = log Poisson + s ((y - M)^2 - y) / 2 + O(s^2)`, where the closed form of others has no digits left."""
    mean, y = torch.tensor(30.0), torch.arange(60.0)
    difference = GammaPoisson(mean, torch.tensor(overdispersion)).log_prob(y) - torch.distributions.Poisson(
        mean
    ).log_prob(y)
    expected = overdispersion * ((y - mean) ** 2 - y) / 2
    torch.testing.assert_close(difference, expected, rtol=0, atol=1e-12 + 1e5 * overdispersion**2)


def test_probabilities_by_the_mixture_of_rates():
    mean, s = 3.0, 0.4
    for y in (0, 2, 9):
        mixed, _ = integrate.quad(
            lambda rate, y=y: stats.gamma(1 / s, scale=s * mean).pdf(rate) * stats.poisson(rate).pmf(y), 0, 60
        )
        assert math.exp(GammaPoisson(torch.tensor(mean), torch.tensor(s)).log_prob(torch.tensor(float(y)))) == (
            pytest.approx(mixed, rel=1e-8)
        )


@pytest.mark.parametrize("overdispersion", [0.0, 0.01, 0.06, 2.0])
def test_probabilities_add_up_to_the_moments(overdispersion):
    d = GammaPoisson(torch.tensor(4.0), torch.tensor(overdispersion))
    y = torch.arange(3000.0)
    p = d.log_prob(y).exp()
    assert float(p.sum()) == pytest.approx(1, rel=1e-10)
    assert float((p * y).sum()) == pytest.approx(float(d.mean), rel=1e-10)
    assert float((p * (y - d.mean) ** 2).sum()) == pytest.approx(float(d.variance), rel=1e-10)


@pytest.mark.parametrize("overdispersion", [0.0, 0.01, 0.3])
def test_samples_have_the_moments(overdispersion):
    d = GammaPoisson(torch.tensor([2.0, 50.0]), torch.tensor(overdispersion))
    y = d.sample((40_000,))
    assert y.shape == (40_000, 2)
    assert ((y.mean(0) - d.mean).abs() < 5 * (d.variance / len(y)).sqrt()).all()
    assert ((y.var(0) / d.variance - 1).abs() < 0.06).all()


def test_single_precision_keeps_its_digits():
    y = values(MEANS)
    for overdispersion in (0.0, 1e-9, 1e-4, 0.049, 0.051, 1.0):
        exact = GammaPoisson(MEANS, torch.tensor(overdispersion)).log_prob(y)
        single = GammaPoisson(MEANS.float(), torch.tensor(overdispersion).float()).log_prob(y.float())
        # Terms are as large as 4 * 3000 * log(3000): so many units in the last place.
        torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=0.02)
        torch.testing.assert_close(single.double()[:, :3], exact[:, :3], rtol=1e-5, atol=1e-4)


def test_shapes_and_refusals():
    # Asked for: torch.compile, once used in a process, turns the default off for all distributions.
    d = GammaPoisson(torch.ones(2, 1), torch.ones(3), validate_args=True)
    assert d.batch_shape == (2, 3)
    assert d.expand((4, 2, 3)).log_prob(torch.zeros(4, 2, 3)).shape == (4, 2, 3)
    with pytest.raises(ValueError, match="mean"):
        GammaPoisson(torch.tensor(-1.0), torch.tensor(1.0), validate_args=True)
    with pytest.raises(ValueError, match="support"):
        d.log_prob(torch.tensor(0.5))
