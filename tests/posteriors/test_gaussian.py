"""The posterior over the weights, for every structure, against the same normal written out densely."""

import pytest
import torch
from dense_laplace import NETS, STRUCTURES, problem
from scipy.stats import chi2, kstest
from torch.distributions import MultivariateNormal

from lapkit.curvature import Dense, Diagonal, Gaussian
from lapkit.posteriors import GaussianPosterior, GaussianPrior, laplace_posterior

NOISE, DELTA, TEMPERATURE = 0.6, 0.7, 1.3
IMPROBABLE = 1e-6  # a right sampler fails a test once in a million seeds; the seed is fixed


@pytest.fixture(params=STRUCTURES)
def structure(request):
    return request.param


@pytest.fixture(params=NETS)
def net(request):
    return request.param


@pytest.fixture
def posterior(fitted, structure, net):
    prior = GaussianPrior(DELTA)
    return laplace_posterior(fitted("regression", structure, net), Gaussian(NOISE), prior, TEMPERATURE)


@pytest.fixture
def oracle(structure, net):
    case = problem("regression", net)
    return MultivariateNormal(case.mean(), precision_matrix=case.precision(structure, DELTA, NOISE, TEMPERATURE))


def test_precision_log_prob_and_variance(posterior, oracle):
    torch.testing.assert_close(posterior.precision.to_dense(), oracle.precision_matrix, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(posterior.mean, oracle.mean, rtol=0, atol=0)
    torch.testing.assert_close(posterior.variance, oracle.variance, rtol=1e-8, atol=0)
    weights = oracle.mean + torch.randn(4, len(oracle.mean))
    torch.testing.assert_close(posterior.log_prob(weights), oracle.log_prob(weights), rtol=1e-8, atol=0)
    torch.testing.assert_close(posterior.log_prob(weights[0]), oracle.log_prob(weights[0]), rtol=1e-8, atol=0)


def test_samples_are_normal_with_the_posterior_mean_and_covariance(posterior, oracle):
    """Whitened by the dense Cholesky factor the draws are standard normal: their mean, covariance and shape are tested.

    sqrt(S) times the mean has P independent standard normal entries. Of sqrt(S) (covariance - 1) those above the
    diagonal tend to standard normals, those on it to normals of variance 2. Sums of squares are chi-squared.
    """
    S, P = 20_000, len(oracle.mean)
    draws = posterior.sample(S, torch.Generator().manual_seed(3))
    assert draws.shape == (S, P)
    white = (draws - oracle.mean) @ torch.linalg.cholesky(oracle.precision_matrix)  # L^T deviation, by rows
    assert S * white.mean(0).square().sum() < chi2.isf(IMPROBABLE, P)
    error = S**0.5 * (white.T @ white / S - torch.eye(P))
    squares = error.triu(1).square().sum() + error.diagonal().square().sum() / 2
    freedom = P * (P + 1) / 2
    assert chi2.isf(1 - IMPROBABLE, freedom) < squares < chi2.isf(IMPROBABLE, freedom)
    assert kstest(white.flatten()[::7], "norm").pvalue > IMPROBABLE


def test_the_generator_is_the_only_randomness(posterior):
    first = posterior.sample(3, torch.Generator().manual_seed(1))
    torch.manual_seed(99)
    assert torch.equal(first, posterior.sample(3, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, posterior.sample(3, torch.Generator().manual_seed(2)))


def test_layerwise_prior(fitted, structure, net):
    case = problem("regression", net)
    delta = torch.linspace(0.3, 3.0, len(case.all))
    posterior = laplace_posterior(fitted("regression", structure, net), Gaussian(NOISE), GaussianPrior(delta))
    dense = case.precision(structure, delta, NOISE)
    torch.testing.assert_close(posterior.precision.to_dense(), dense, rtol=1e-8, atol=1e-10)


def test_sizes_must_match():
    with pytest.raises(ValueError, match=r"Mean \(3,\) and precision of size 2"):
        GaussianPosterior(torch.zeros(3), Diagonal(torch.ones(2)))


def test_a_matrix_that_is_not_positive_definite_says_what_to_do():
    posterior = GaussianPosterior(torch.zeros(2), Dense(torch.tensor([[1.0, 2.0], [2.0, 1.0]])))
    with pytest.raises(ValueError, match="larger prior precision"):
        posterior.sample()
