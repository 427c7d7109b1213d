"""Columns in single precision, with a prior far below the curvature: against the full matrix in double precision."""

import pytest
import torch
from torch import nn

from lapkit import Laplace

SPACES = ("weights", "functions")
PRIORS = (1e-2, 1e-3)
RELATIVE = 1e-3
DRAWS = 4_000


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))


def data(examples, dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(examples, 2, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.stack([x.sum(1).sin(), x.prod(1)], dim=1).to(dtype)


def fitted(dtype, structure, prior, examples, **options):
    model = network().float().to(dtype)  # the same weights in both types
    la = Laplace(model, "regression", "all", structure, prior_precision=prior, sigma_noise=0.1, **options)
    return la.fit([data(examples, dtype)])


@pytest.fixture(params=[15, 80], ids=["fewer columns than weights", "more"])
def examples(request):
    return request.param


def both(space, prior, examples):
    """Columns in float32, the matrix in float64, and new inputs."""
    single = fitted(torch.float32, "lowrank", prior, examples, space=space)
    return single, fitted(torch.float64, "full", prior, examples), data(4, torch.float32)[0]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("prior", PRIORS)
def test_variances_of_weights_and_outputs(space, prior, examples):
    single, double, x = both(space, prior, examples)
    assert single.posterior.variance.dtype == torch.float32
    close(single.posterior.variance, double.posterior.variance)
    close(single.function_distribution(x).variance, double.function_distribution(x.double()).variance)
    close(single.log_marginal_likelihood(), double.log_marginal_likelihood())


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("prior", PRIORS)
def test_outputs_at_several_inputs_together(space, prior, examples):
    """In the directions of the exact covariance, of which the small ones are those that inputs have in common."""
    single, double, x = both(space, prior, examples)
    covariance, wanted = single(x, joint=True)[1].double(), double(x.double(), joint=True)[1]
    root = torch.linalg.cholesky(wanted)
    whitened = torch.linalg.solve_triangular(root, covariance, upper=False)
    whitened = torch.linalg.solve_triangular(root, whitened.T, upper=False)
    torch.testing.assert_close(whitened, torch.eye(8), rtol=0, atol=RELATIVE)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("prior", PRIORS)
def test_draws_of_outputs_and_of_weights(space, prior, examples):
    """White in the directions of the exact covariance, as far as so many draws can tell."""
    single, double, x = both(space, prior, examples)
    draws = single.functional_samples(x, DRAWS, torch.Generator().manual_seed(0), joint=True).flatten(1)
    mean, covariance = double(x.double(), joint=True)
    white(draws.double() - mean.flatten(), covariance)
    weights = single.sample(DRAWS, torch.Generator().manual_seed(1)).double()
    white(weights - double.posterior.mean, torch.linalg.inv(double.posterior.precision.to_dense()))


def close(single, double):
    torch.testing.assert_close(single.double(), double, rtol=RELATIVE, atol=0)


def white(draws, covariance):
    standard = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), draws.T, upper=False)
    error = standard @ standard.T / DRAWS - torch.eye(len(covariance))
    assert float(error.abs().max()) < 6 * (2 / DRAWS) ** 0.5
