"""Bayesian optimisation with BoTorch on a Laplace Gaussian process, against the same Gaussians by dense algebra."""

import gpytorch
import pytest
import torch
from torch import Size, nn
from torch.func import functional_call, jacrev

from lapkit.curvature import Gaussian
from lapkit.posteriors import GaussianPrior
from lapkit.posteriors.function_space import laplace_gp

pytest.importorskip("botorch")  # for Python 3.11 or newer

from botorch.acquisition import (
    LogExpectedImprovement,
    UpperConfidenceBound,
    qLogExpectedImprovement,
    qLogNoisyExpectedImprovement,
    qUpperConfidenceBound,
)
from botorch.acquisition.objective import LinearMCObjective
from botorch.models.model import Model
from botorch.optim import optimize_acqf
from botorch.posteriors import GPyTorchPosterior
from botorch.sampling import SobolQMCNormalSampler
from botorch.sampling.get_sampler import get_sampler

SIGMA, PRECISION = 0.3, 0.8


class Dense(Model):
    """The posterior of the linearised network by weights, written down with dense matrices."""

    batch_shape = Size()

    def __init__(self, net, x):
        super().__init__()
        self.net, self.num = net, net(x).shape[1]
        rows = self.jacobian(x).flatten(0, 1)
        self.covariance = (rows.T @ rows / SIGMA**2 + PRECISION * torch.eye(rows.shape[1])).inverse()

    @property
    def num_outputs(self):
        return self.num

    def jacobian(self, x):
        """`(N, C, P)`."""
        weights = dict(self.net.named_parameters())
        found = jacrev(lambda w: functional_call(self.net, w, x))(weights)
        return torch.cat([found[name].flatten(2) for name in weights], 2)

    def posterior(self, X, output_indices=None, observation_noise=False, posterior_transform=None):
        rows = torch.stack([self.jacobian(x) for x in X.reshape(-1, *X.shape[-2:])]).flatten(1, 2)
        covariance = (rows @ self.covariance @ rows.mT).reshape(*X.shape[:-2], rows.shape[1], rows.shape[1])
        mean = self.net(X)
        if self.num == 1:
            return GPyTorchPosterior(gpytorch.distributions.MultivariateNormal(mean.squeeze(-1), covariance))
        return GPyTorchPosterior(gpytorch.distributions.MultitaskMultivariateNormal(mean, covariance))


@pytest.fixture(params=[1, 2], ids=["one output", "two outputs"])
def models(request):
    net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, request.param))
    x, y = torch.rand(9, 2), torch.randn(9, request.param)
    return laplace_gp(net, Gaussian(SIGMA), [(x, y)], GaussianPrior(PRECISION)), Dense(net, x), x


def objective_of(model):
    return LinearMCObjective(torch.tensor([1.0, -0.5])[: model.num_outputs])


def acquisitions(model, x):
    """Those for one output, and those for any."""
    sampled = {"objective": objective_of(model), "sampler": SobolQMCNormalSampler(Size([32]), seed=1)}
    if model.num_outputs == 1:
        yield LogExpectedImprovement(model, best_f=0.1)
        yield UpperConfidenceBound(model, beta=2.0)
    yield qUpperConfidenceBound(model, beta=2.0, **sampled)
    yield qLogExpectedImprovement(model, best_f=0.1, **sampled)
    yield qLogNoisyExpectedImprovement(model, x[:3], cache_root=False, prune_baseline=False, **sampled)


def test_acquisition_functions_and_their_gradients(models):
    gp, dense, x = models
    for ours, theirs in zip(acquisitions(gp, x), acquisitions(dense, x), strict=True):
        X = torch.rand(4, 1, 2).requires_grad_()
        found, expected = ours(X), theirs(X)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(
            *(torch.autograd.grad(value.sum(), X)[0] for value in (found, expected)), rtol=1e-8, atol=1e-8
        )


def test_batches_of_candidates(models):
    gp, dense, x = models
    X = torch.rand(3, 2, 2)
    for ours, theirs in zip(acquisitions(gp, x), acquisitions(dense, x), strict=True):
        if type(ours) not in (LogExpectedImprovement, UpperConfidenceBound):  # which take one candidate at a time
            torch.testing.assert_close(ours(X), theirs(X), rtol=1e-8, atol=1e-10)


def test_samplers_are_found(models):
    gp, _, x = models
    assert isinstance(get_sampler(gp.posterior(x[:3]), Size([8])), SobolQMCNormalSampler)
    assert torch.isfinite(qLogNoisyExpectedImprovement(gp, x, objective=objective_of(gp))(x[:2] + 0.1)).all()


@pytest.mark.parametrize("models", [1], indirect=True)
def test_the_best_candidate_is_the_best_of_a_grid(models):
    gp = models[0]
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    for acquisition in (LogExpectedImprovement(gp, best_f=0.1), qLogExpectedImprovement(gp, best_f=0.1)):
        candidate, value = optimize_acqf(acquisition, bounds, q=1, num_restarts=4, raw_samples=32)
        axis = torch.linspace(0, 1, 15)
        grid = torch.cartesian_prod(axis, axis)[:, None]
        assert value >= acquisition(grid).max() - 1e-6
        assert ((candidate >= 0) & (candidate <= 1)).all()
