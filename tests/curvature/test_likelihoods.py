"""Every likelihood against autograd's Hessian and torch.distributions."""

import itertools
import math

import numpy as np
import oracles
import pytest
import torch
from likelihood_cases import LIKELIHOODS, NOISES, close, outer
from torch import distributions

from lapkit.curvature import (
    Bernoulli,
    Categorical,
    Draws,
    FromLogProb,
    Gaussian,
    HeteroscedasticGaussian,
    PerOutputGaussian,
    Poisson,
)

EXAMPLES = 5
POSITIONS = 3


@pytest.fixture(params=LIKELIHOODS)
def everywhere(request):
    likelihood, outputs, distribution = LIKELIHOODS[request.param]
    return likelihood, 2 * torch.randn(EXAMPLES, outputs), distribution


@pytest.fixture(params=[case for case in LIKELIHOODS if case != "heteroscedastic"])
def case(request):
    """Those whose Hessian does not depend on the targets."""
    likelihood, outputs, distribution = LIKELIHOODS[request.param]
    return likelihood, 2 * torch.randn(EXAMPLES, outputs), distribution


def test_root_is_that_of_the_hessian(case):
    likelihood, f, distribution = case
    y = distribution(f).sample()
    of_one = lambda f_n, y_n: likelihood.loss(f_n[None], y_n[None])[0]  # noqa: E731
    close(outer(likelihood.hessian_root(f)), oracles.output_hessian(of_one, f, y))


def test_root_times_precision_is_the_curvature_of_log_prob(case):
    """With torch's own density, so that neither the loss nor its scale can be off."""
    likelihood, f, distribution = case
    y = distribution(f).sample()
    minus = lambda f_n, y_n: -distribution(f_n[None]).log_prob(y_n[None])[0]  # noqa: E731
    close(likelihood.precision * outer(likelihood.hessian_root(f)), oracles.output_hessian(minus, f, y))


def test_heteroscedastic_root_is_that_of_the_mean_hessian():
    """The Hessian is quadratic in y: its mean over y is that over `m - sigma` and `m + sigma`."""
    f, likelihood = torch.randn(EXAMPLES, 4), HeteroscedasticGaussian()
    mean, sigma = f[:, :2], (f[:, 2:] / 2).exp()
    of_one = lambda f_n, y_n: likelihood.loss(f_n[None], y_n[None])[0]  # noqa: E731
    ends = [mean + torch.tensor(signs) * sigma for signs in itertools.product([-1.0, 1.0], repeat=2)]
    close(outer(likelihood.hessian_root(f)), torch.stack([oracles.output_hessian(of_one, f, y) for y in ends]).mean(0))


def test_number_of_columns(everywhere):
    likelihood, f, _ = everywhere
    columns = f.shape[1] - 1 if isinstance(likelihood, Categorical) else f.shape[1]
    assert likelihood.hessian_root(f).shape == (columns, *f.shape)
    assert likelihood.rank(f) == columns


def test_some_columns_of_the_root(everywhere):
    likelihood, f, _ = everywhere
    whole = likelihood.hessian_root(f)
    for part in (slice(0, 1), slice(1, None), slice(0, 0)):
        close(likelihood.hessian_root(f, None, part), whole[part])


def test_class_root_has_one_column_for_each_output(everywhere):
    likelihood, f, _ = everywhere
    each = likelihood.class_root(f, None, torch.arange(f.shape[1]))
    close(outer(each), outer(likelihood.hessian_root(f)))
    some = torch.arange(f.shape[1]).flip(0)[:2]
    close(likelihood.class_root(f, None, some), each[some])


def test_class_root_of_classes():
    f = torch.randn(EXAMPLES, 4)
    p = f.softmax(1)
    expected = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]  # columns last
    close(Categorical().class_root(f, None, torch.arange(4)), expected.movedim(-1, 0))


def test_other_likelihoods_have_no_class_root():
    with pytest.raises(ValueError, match="FromLogProb has no root"):
        FromLogProb(lambda f, y: f.sum(-1)).class_root(torch.zeros(4, 3), None, torch.arange(2))


def test_positions_stand_for_examples(everywhere):
    """Whatever is asked of (N, T, C) is what (N T, C) gives, put together."""
    likelihood, f, distribution = everywhere
    rows = 2 * torch.randn(EXAMPLES * POSITIONS, f.shape[1])
    f = rows.unflatten(0, (EXAMPLES, POSITIONS))
    y = distribution(rows).sample()
    targets = y.unflatten(0, (EXAMPLES, POSITIONS))
    close(likelihood.loss(f, targets), likelihood.loss(rows, y).unflatten(0, (EXAMPLES, POSITIONS)).sum(1))
    close(likelihood.log_prob(f, targets), distribution(f).log_prob(targets).sum(1))
    close(likelihood.hessian_root(f), likelihood.hessian_root(rows).unflatten(1, f.shape[:2]))
    some = torch.tensor([f.shape[-1] - 1])
    close(likelihood.class_root(f, None, some), likelihood.class_root(rows, None, some).unflatten(1, f.shape[:2]))
    close(likelihood.loss_gradient(f, targets), likelihood.loss_gradient(rows, y).unflatten(0, f.shape[:2]))
    close(likelihood.inverse_link(f), likelihood.inverse_link(rows).unflatten(0, f.shape[:2]))
    draws = Draws.fresh(EXAMPLES)
    assert likelihood.sample(f, draws).shape == targets.shape
    assert likelihood.sampled_column(f, targets, draws).shape == f.shape
    assert torch.equal(likelihood.check(f, targets), targets)


def test_log_prob(everywhere):
    likelihood, f, distribution = everywhere
    y = distribution(f).sample()
    close(likelihood.log_prob(f, y), distribution(f).log_prob(y))
    total = likelihood.log_likelihood(likelihood.loss(f, y).sum(), len(f), f.shape[1])
    close(total, distribution(f).log_prob(y).sum())


def test_log_prob_is_differentiable_in_the_noise():
    f, y = torch.randn(4, 2), torch.randn(4, 2)
    noise = torch.tensor(0.7, requires_grad=True)
    (actual,) = torch.autograd.grad(Gaussian(noise=noise).log_prob(f, y).sum(), noise)
    other = torch.tensor(0.7, requires_grad=True)
    (expected,) = torch.autograd.grad(distributions.Normal(f, other).log_prob(y).sum(), other)
    close(actual, expected)


@pytest.mark.parametrize("name", ["noise", "scale"])
def test_log_prob_is_differentiable_in_all_noises(name):
    f, y = torch.randn(4, 3), torch.randn(4, 3)
    given = {"noise": NOISES.clone(), "scale": torch.tensor(0.7)}
    given[name].requires_grad_()
    (actual,) = torch.autograd.grad(PerOutputGaussian(**given).log_prob(f, y).sum(), given[name])
    (expected,) = torch.autograd.grad(
        distributions.Normal(f, given["noise"] * given["scale"]).log_prob(y).sum(), given[name]
    )
    close(actual, expected)


# -- predictions


def test_predictive_without_uncertainty_is_the_likelihood(everywhere):
    likelihood, f, distribution = everywhere
    none = torch.zeros(len(f), f.shape[1], f.shape[1])
    y = distribution(f).sample()
    close(likelihood.predictive(f, none).log_prob(y), distribution(f).log_prob(y))
    close(likelihood.expectation(f, none), likelihood.inverse_link(f))


@pytest.mark.parametrize("variance", [0.1, 1.0, 10.0, 1000.0])
def test_bernoulli_expectation_by_quadrature(variance):
    """The probit approximation is not exact; 0.018 is the largest distance of a sigmoid from a scaled probit."""
    m = torch.linspace(-3, 3, 25)[:, None] * math.sqrt(1 + variance)
    z = torch.linspace(-9, 9, 20_001)
    weights = torch.exp(-z.square() / 2) / torch.exp(-z.square() / 2).sum()
    exact = ((m + math.sqrt(variance) * z).sigmoid() * weights).sum(1, keepdim=True)
    approximate = Bernoulli().expectation(m, torch.full((25, 1, 1), variance))
    assert (approximate - exact).abs().max() < 0.018
    assert (approximate - exact).abs().max() > 1e-6  # it would be the same function


def test_gaussian_predictive_is_exact():
    mean, root = torch.randn(4, 2), torch.randn(4, 2, 2)
    predictive = Gaussian(noise=0.5).predictive(mean, root @ root.mT)
    close(predictive.mean, mean)
    close(predictive.covariance_matrix, root @ root.mT + 0.25 * torch.eye(2))


def quadrature(mean, covariance, function, nodes=40):
    """`E[function(f)]` of one `f ~ N(mean, covariance)` in two dimensions, by Gauss and Hermite."""
    x, w = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    z = torch.cartesian_prod(x, x) @ torch.linalg.cholesky(covariance).T + mean
    weights = torch.cartesian_prod(w, w).prod(1) / (2 * math.pi)
    values = function(z)
    return (weights.reshape(-1, *[1] * (values.ndim - 1)) * values).sum(0)


def test_heteroscedastic_predictive_has_the_exact_moments():
    mean, root = torch.randn(3, 2), torch.randn(3, 2, 2) / 2 + torch.eye(2)
    covariance = root @ root.mT
    predictive = HeteroscedasticGaussian().predictive(mean, covariance)
    for n in range(3):
        first = quadrature(mean[n], covariance[n], lambda f: f[:, 0])
        second = quadrature(mean[n], covariance[n], lambda f: f[:, 0] ** 2 + f[:, 1].exp())
        close(predictive.mean[n, 0], first)
        close(predictive.variance[n, 0], second - first**2)
    close(HeteroscedasticGaussian().expectation(mean, covariance), mean[:, :1])


def test_poisson_predictive_has_the_exact_moments():
    mean, root = torch.randn(3, 2), torch.randn(3, 2, 2) / 4
    covariance = root @ root.mT + 0.01 * torch.eye(2)
    predictive = Poisson().predictive(mean, covariance)
    for n in range(3):
        rate = quadrature(mean[n], covariance[n], torch.exp)
        close(predictive.mean[n], rate)
        close(predictive.variance[n], quadrature(mean[n], covariance[n], lambda f: (2 * f).exp()) - rate**2 + rate)
    close(Poisson().expectation(mean, covariance), predictive.mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli()], ids=["categorical", "bernoulli"])
def test_confident_outputs(likelihood, dtype):
    f = torch.tensor([[60.0, -60, 0], [-60, 60, 60], [200, 0, -200], [-1e4, 1e4, 0]], dtype=dtype)
    root = likelihood.hessian_root(f)
    assert torch.isfinite(root).all()
    y = torch.tensor([0, 1, 0, 1]) if isinstance(likelihood, Categorical) else torch.ones_like(f)
    of_one = lambda f_n, y_n: likelihood.loss(f_n[None], y_n[None])[0]  # noqa: E731
    exact = oracles.output_hessian(of_one, f.double(), y.double() if y.is_floating_point() else y)
    torch.testing.assert_close(outer(root).double(), exact, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [5.0, 30.0, 60.0])
def test_confident_roots_keep_their_digits(gap, dtype):
    """p (1 - p) = e^-gap / (1 + e^-gap)^2, which 1 - p in floating point loses; the root adds half of its rounding."""
    f = torch.tensor([[gap, 0.0], [0.0, gap]], dtype=dtype)
    exact = math.exp(-gap) / (1 + math.exp(-gap)) ** 2
    expected = exact * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    # A logit of 60 is known to 60 eps, and so is its exponential.
    rtol = 200 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        outer(Categorical().hessian_root(f)).double(), expected.expand(2, 2, 2), rtol=rtol, atol=0
    )
    bernoulli = outer(Bernoulli().hessian_root(f[:, :1] - f[:, 1:])).double()
    torch.testing.assert_close(bernoulli, torch.full((2, 1, 1), exact), rtol=rtol, atol=0)
