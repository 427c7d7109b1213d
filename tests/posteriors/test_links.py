"""From outputs to targets: probit, Gaussian, and samples against quadrature."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from lapkit.curvature import Bernoulli, Categorical, Gaussian
from lapkit.posteriors import FunctionDistribution, closed_form, monte_carlo

NODES, WEIGHTS = (torch.as_tensor(v) for v in np.polynomial.hermite_e.hermegauss(60))
WEIGHTS = WEIGHTS / WEIGHTS.sum()
STANDARD_ERRORS = 5  # a right sampler passes; one draw in a million would not


@pytest.fixture
def f():
    B = torch.randn(5, 3, 3)
    return FunctionDistribution(2 * torch.randn(5, 3), B @ B.mT)


def expectations(function, mean, covariance):
    """Mean and standard deviation of `function(f)` for `f ~ N(mean, covariance)`, by Gauss-Hermite quadrature."""
    axes = len(mean)
    grid = torch.cartesian_prod(*[NODES] * axes).reshape(-1, axes)
    weights = torch.cartesian_prod(*[WEIGHTS] * axes).reshape(-1, axes).prod(1)
    values = function(mean + grid @ torch.linalg.cholesky(covariance).T)
    expected = weights @ values
    return expected, (weights @ (values - expected).square()).sqrt()


@pytest.mark.parametrize("likelihood", [Bernoulli(), Categorical()], ids=["bernoulli", "categorical"])
def test_monte_carlo_agrees_with_quadrature(likelihood, f):
    S = 20_000
    inverse_link = torch.sigmoid if isinstance(likelihood, Bernoulli) else lambda z: z.softmax(-1)
    ours = monte_carlo(likelihood, f, S, torch.Generator().manual_seed(4))
    for n in range(len(f.mean)):
        expected, deviation = expectations(inverse_link, f.mean[n], f.covariance[n])
        assert ((ours[n] - expected).abs() < STANDARD_ERRORS * deviation / S**0.5).all()
        assert (deviation > 0.05).all()  # else the bound would say nothing


def test_monte_carlo_uses_the_correlation_of_the_outputs():
    """Two equal logits, whatever they are, give one half; independent ones of the same variances do not."""
    mean, variance = torch.tensor([[1.0, 0.0]]), 9.0
    together = FunctionDistribution(mean, variance * torch.ones(1, 2, 2))
    apart = FunctionDistribution(mean, variance * torch.eye(2)[None])
    generator = torch.Generator().manual_seed(0)
    assert monte_carlo(Categorical(), together, 1000, generator)[0, 0] == pytest.approx(
        1 / (1 + math.exp(-1)), rel=1e-6
    )
    expected, deviation = expectations(torch.sigmoid, torch.tensor([1.0]), torch.tensor([[2 * variance]]))
    ours = monte_carlo(Categorical(), apart, 20_000, generator)[0, 0]
    assert float((ours - expected).abs()) < STANDARD_ERRORS * float(deviation) / 20_000**0.5
    assert float(expected) < 0.65


def test_monte_carlo_of_a_gaussian_is_the_mean_of_f(f):
    ours = monte_carlo(Gaussian(0.3), f, 20_000, torch.Generator().manual_seed(4))
    assert ((ours - f.mean).abs() < STANDARD_ERRORS * (f.variance / 20_000).sqrt()).all()


def test_the_generator_is_the_only_randomness(f):
    first = monte_carlo(Categorical(), f, 5, torch.Generator().manual_seed(1))
    torch.manual_seed(99)
    assert torch.equal(first, monte_carlo(Categorical(), f, 5, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, monte_carlo(Categorical(), f, 5, torch.Generator().manual_seed(2)))


def test_monte_carlo_needs_a_sample(f):
    with pytest.raises(ValueError, match="at least one sample, got n_samples=0"):
        monte_carlo(Categorical(), f, 0)


def test_probit_of_classes_is_mackays_formula(f):
    kappa = 1 / torch.sqrt(1 + math.pi / 8 * torch.stack([c.diagonal() for c in f.covariance]))
    predicted = closed_form(Categorical(), f)
    assert isinstance(predicted, torch.distributions.Categorical)
    wanted = torch.exp(f.mean * kappa) / torch.exp(f.mean * kappa).sum(1, keepdim=True)
    torch.testing.assert_close(predicted.probs, wanted, rtol=1e-12, atol=0)


def test_probit_of_yes_or_no_is_mackays_formula_and_near_the_truth(f):
    predicted = closed_form(Bernoulli(), f)
    variance = torch.stack([c.diagonal() for c in f.covariance])
    wanted = 1 / (1 + torch.exp(-f.mean / torch.sqrt(1 + math.pi / 8 * variance)))
    torch.testing.assert_close(predicted.mean, wanted, rtol=1e-12, atol=0)
    y = torch.tensor([1.0, 0.0, 1.0]).expand(5, 3)
    log_prob = torch.where(y == 1, wanted, 1 - wanted).log().sum(1)
    torch.testing.assert_close(predicted.log_prob(y), log_prob, rtol=1e-12, atol=0)


def test_gaussian_is_exact_and_its_noise_enters_once(f):
    predicted = closed_form(Gaussian(0.7), f)
    wanted = MultivariateNormal(f.mean, f.covariance + 0.49 * torch.eye(3))
    torch.testing.assert_close(predicted.covariance_matrix, wanted.covariance_matrix, rtol=1e-12, atol=1e-14)
    y = torch.randn(5, 3)
    torch.testing.assert_close(predicted.log_prob(y), wanted.log_prob(y), rtol=1e-10, atol=0)


def test_gaussian_density_is_the_integral_over_f():
    """`p(y|x) = int p(y|f) N(f) df` by quadrature: nowhere is the noise counted twice."""
    f = FunctionDistribution(torch.tensor([[0.4]]), torch.tensor([[[1.5]]]))
    y = torch.tensor([1.3])
    density, _ = expectations(lambda z: Normal(z, 0.9).log_prob(y).exp(), f.mean[0], f.covariance[0])
    ours = closed_form(Gaussian(0.9), f).log_prob(y).exp()
    torch.testing.assert_close(ours, density, rtol=1e-8, atol=0)


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian(0.5)], ids=lambda k: type(k).__name__)
def test_without_uncertainty_the_network_itself_speaks(likelihood, f):
    certain = FunctionDistribution(f.mean, torch.zeros(5, 3, 3))
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(monte_carlo(likelihood, certain, 3, generator), likelihood.inverse_link(f.mean))
    torch.testing.assert_close(likelihood.expectation(f.mean, certain.covariance), likelihood.inverse_link(f.mean))
