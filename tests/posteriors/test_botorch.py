"""Bayesian optimisation with BoTorch on a Laplace Gaussian process, against the same Gaussians by dense algebra."""

import copy

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


# -- a float32 network, as most are, with BoTorch's float64 inputs or its own type

SINGLE, DOUBLE = torch.float32, torch.float64


@pytest.fixture
def single():
    """A process of a float32 network, and the Gaussians of the same weights in float64."""
    net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).float()
    x, y = torch.rand(9, 2), torch.randn(9, 1)
    gp = laplace_gp(net, Gaussian(SIGMA), [(x.float(), y.float())], GaussianPrior(PRECISION))
    return gp, Dense(copy.deepcopy(net).double(), x), x


def check_same(gp, dense, x, dtype):
    """Acquisition functions of inputs of a type, each after those that cast the model."""
    points = torch.rand(4, 1, 2)
    for ours, theirs in zip(acquisitions(gp, x.to(dtype)), acquisitions(dense, x), strict=True):
        X, wanted = points.to(dtype).requires_grad_(), points.clone().requires_grad_()
        plain, found, expected = ours(X.detach()), ours(X), theirs(wanted)
        assert plain.dtype == found.dtype == DOUBLE
        torch.testing.assert_close(plain, expected.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        (gradient,) = torch.autograd.grad(found.sum(), X)
        assert gradient.dtype == dtype
        torch.testing.assert_close(
            gradient.double(), torch.autograd.grad(expected.sum(), wanted)[0], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("order", [(SINGLE, DOUBLE), (DOUBLE, SINGLE, DOUBLE)], ids=["single first", "double first"])
def test_a_float32_network_and_inputs_of_both_types(single, order):
    gp, dense, x = single
    for dtype in order:
        check_same(gp, dense, x, dtype)
    assert all(p.dtype == SINGLE for p in gp.tangents.engine.model.parameters())


@pytest.mark.parametrize(
    "cast",
    [lambda gp: gp.to(SINGLE), lambda gp: gp.float(), lambda gp: gp.double(), lambda gp: gp.float().double()],
    ids=["to", "float", "double", "float and double"],
)
@pytest.mark.parametrize("warm", [False, True], ids=["at once", "after a prediction"])
def test_casting_the_module_leaves_its_numbers(single, cast, warm):
    gp, dense, x = single
    wanted, evidence = dense.posterior(x), gp.log_marginal_likelihood().detach()
    if warm:
        gp.posterior(x)
    cast(gp)
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp.train())
    rescaled = mll(gp(*gp.train_inputs), gp.train_targets) * len(gp.observations)
    gp.eval()
    for value in (gp.log_marginal_likelihood(), rescaled):
        assert value.dtype == DOUBLE
        torch.testing.assert_close(value.detach(), evidence, rtol=1e-6, atol=0)
    for found in (gp.posterior(x), gp.posterior(x.float()), gp(x), gp(x.float())):
        assert (found.mean.dtype, found.variance.dtype) == (DOUBLE, DOUBLE)
        torch.testing.assert_close(found.mean.reshape(9, 1), wanted.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.variance.reshape(9, 1), wanted.variance, rtol=1e-5, atol=1e-6)
    check_same(gp, dense, x, DOUBLE)


@pytest.mark.parametrize("value", [0.3, torch.tensor(0.3)])
def test_hyper_parameters_of_a_module_that_was_cast(single, value):
    gp, dense, x = single
    kernel, likelihood = gp.float().covar_module, gp.likelihood
    rows = dense.jacobian(x)[:, 0]
    kernel.prior_precision, likelihood.noise = value, value
    assert kernel.raw_prior_precision.dtype == likelihood.raw_noise.dtype == SINGLE
    for found in (kernel.prior_precision, likelihood.noise):
        torch.testing.assert_close(found.detach(), torch.tensor([0.3]), rtol=3e-7, atol=0)
    lazy = kernel(x)
    assert lazy.dtype == lazy.to_dense().dtype == DOUBLE
    torch.testing.assert_close(lazy.to_dense().detach(), rows @ rows.T / 0.3, rtol=1e-5, atol=1e-6)
    covariance = rows @ (rows.T @ rows / 0.3 + 0.3 * torch.eye(rows.shape[1])).inverse() @ rows.T
    torch.testing.assert_close(gp.posterior(x).covariance, covariance, rtol=1e-5, atol=1e-6)


def test_iterative_solvers_of_a_module_that_was_cast(single):
    gp, _, x = single
    data = [(x.float(), torch.randn(9, 1).float())]
    loose = laplace_gp(gp.tangents.engine.model, Gaussian(SIGMA), data, GaussianPrior(PRECISION), iterative=True)
    with gpytorch.settings.max_cholesky_size(1):
        found = loose.float().posterior(x).covariance
    torch.testing.assert_close(found, gp.posterior(x).covariance, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize("acquisition", [LogExpectedImprovement, UpperConfidenceBound])
def test_candidates_of_a_float32_network(single, acquisition, dtype):
    gp, dense, _ = single
    starts, bounds = torch.rand(3, 1, 2), torch.tensor([[0.0, 0.0], [1.0, 1.0]])

    def best(model, dtype):
        return optimize_acqf(
            acquisition(model, 0.1),
            bounds.to(dtype),
            q=1,
            num_restarts=3,
            batch_initial_conditions=starts.to(dtype),
        )

    (candidate, value), (expected, highest) = best(gp, dtype), best(dense, DOUBLE)
    assert candidate.dtype == dtype
    torch.testing.assert_close(value, highest, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(candidate.double(), expected, rtol=0, atol=1e-2)


def test_a_network_of_several_types_takes_inputs_of_its_first_weights():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.head = nn.Linear(2, 4).bfloat16().requires_grad_(False), nn.Linear(4, 1).float()

        def forward(self, x):
            return self.head(self.frozen(x).float().tanh())

    x, y = torch.rand(9, 2), torch.randn(9, 1)
    gp = laplace_gp(Net(), Gaussian(SIGMA), [(x.bfloat16(), y.float())])
    torch.testing.assert_close(gp.posterior(x).covariance, gp.posterior(x.bfloat16()).covariance)
    assert torch.isfinite(UpperConfidenceBound(gp, beta=2.0)(x[:, None])).all()
