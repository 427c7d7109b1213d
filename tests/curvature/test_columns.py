"""The columns of every curvature, in output space and through a network."""

import oracles
import pytest
import torch
from torch import nn

from lapkit.curvature import (
    GGN,
    Bernoulli,
    Categorical,
    EmpiricalFisher,
    Gaussian,
    GGNDense,
    MonteCarloGGN,
    Parameters,
    accumulate,
)

LIKELIHOODS = {
    "categorical": (Categorical(), torch.tensor([0, 2, 1, 1])),
    "bernoulli": (Bernoulli(), torch.eye(4, 3, dtype=torch.float64)),
    "gaussian": (Gaussian(), torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)),
    "gaussian with noise": (Gaussian(noise=0.3), torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)),
}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.fixture(params=LIKELIHOODS)
def problem(request):
    """A likelihood, a network, inputs and targets, and the output Hessians by autograd."""
    likelihood, y = LIKELIHOODS[request.param]
    model, x = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)), torch.randn(4, 2)
    hessians = oracles.output_hessian(lambda f, t: likelihood.loss(f[None], t[None])[0], model(x), y)
    return likelihood, model, x, y, hessians


def matrix(columns, likelihood, model, batches, generator=None):
    parameters = Parameters.of(model)
    quantity = GGNDense(parameters)
    accumulate(model, parameters, likelihood, columns, batches, [quantity], generator=generator)
    return quantity.result().matrix


def test_exact_ggn(problem):
    likelihood, model, x, y, hessians = problem
    expected = oracles.ggn(oracles.jacobian(model, x), hessians)
    close(matrix(GGN(), likelihood, model, [(x, y)]), expected)


def test_exact_ggn_does_not_see_the_targets(problem):
    likelihood, model, x, y, _ = problem
    close(matrix(GGN(), likelihood, model, [(x, y.flip(0))]), matrix(GGN(), likelihood, model, [(x, y)]))


def test_empirical_fisher_is_the_sum_of_gradient_products(problem):
    """Of the loss, without the precision: `dispersion_power` says how often that enters."""
    likelihood, model, x, y, _ = problem
    expected = 0.0
    for x_n, y_n in zip(x, y, strict=True):
        loss = likelihood.loss(model(x_n[None]), y_n[None]).sum()
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        expected = expected + torch.outer(gradient, gradient)
    close(matrix(EmpiricalFisher(), likelihood, model, [(x, y)]), expected)
    expected_log_prob = 0.0
    for x_n, y_n in zip(x, y, strict=True):
        log_prob = likelihood.log_prob(model(x_n[None]), y_n[None]).sum()
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(log_prob, list(model.parameters()))])
        expected_log_prob = expected_log_prob + torch.outer(gradient, gradient)
    close(float(likelihood.precision) ** EmpiricalFisher.dispersion_power * expected, expected_log_prob)


def drawn(likelihood, model, x, y, samples, repeats):
    """S S^T of many independent draws, (repeats, N, C, C): each example stands in the batch many times."""
    f = model(x).detach().repeat(repeats, 1)
    s = MonteCarloGGN(samples)(likelihood, f, y.repeat(repeats, *[1] * (y.ndim - 1)), torch.Generator().manual_seed(0))
    assert s.shape == (samples, *f.shape)
    return torch.einsum("knc,knd->ncd", s, s).unflatten(0, (repeats, len(x)))


@pytest.mark.parametrize("samples", [1, 3])
def test_monte_carlo_columns_are_unbiased(problem, samples):
    """The mean over many draws lies within five of its own standard errors of the exact Hessian."""
    likelihood, model, x, y, hessians = problem
    draws = drawn(likelihood, model, x, y, samples, 20_000)
    standard_error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - hessians).abs() <= 5 * standard_error + 1e-12).all()
    assert standard_error.max() < 0.02  # so that the line above says something


def test_more_samples_spread_less(problem):
    likelihood, model, x, y, hessians = problem

    def spread(samples):
        return float((drawn(likelihood, model, x, y, samples, 4000) - hessians).square().mean())

    assert spread(8) == pytest.approx(spread(1) / 8, rel=0.1)


def test_monte_carlo_follows_the_generator(problem):
    likelihood, model, x, y, _ = problem
    fit = lambda seed: matrix(  # noqa: E731
        MonteCarloGGN(5), likelihood, model, [(x, y)], torch.Generator().manual_seed(seed)
    )
    assert torch.equal(fit(1), fit(1))
    assert not torch.equal(fit(1), fit(2))


def test_monte_carlo_approaches_the_ggn_through_a_network(problem):
    likelihood, model, x, y, hessians = problem
    exact = oracles.ggn(oracles.jacobian(model, x), hessians)
    estimate = matrix(MonteCarloGGN(4000), likelihood, model, [(x, y)], torch.Generator().manual_seed(0))
    # One sample is off by about the matrix itself, so 4000 by some 1/60 of it.
    assert (estimate - exact).norm() < 0.06 * exact.norm()


@pytest.mark.parametrize("samples", [0, -1])
def test_at_least_one_sample(samples):
    with pytest.raises(ValueError, match="At least one"):
        MonteCarloGGN(samples)
