"""The Gaussian over outputs: J P^-1 J^T for every structure, its samples, and the memory budget."""

import pytest
import torch
from dense_laplace import KINDS, NETS, STRUCTURES, problem
from scipy.stats import chi2

from lapkit.curvature import Dense, Engine, Gaussian, Parameters, borrowed
from lapkit.posteriors import FunctionDistribution, GaussianPrior, laplace_posterior, linearized

IMPROBABLE = 1e-6


def pushforward(case, precision, x, budget=None):
    parameters = Parameters.of(case.model)
    with borrowed(case.model, parameters):
        return linearized(Engine(case.model, parameters, memory_budget=budget), x, precision)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_covariance_is_that_of_the_linearised_network(fitted, net, kind, structure):
    case = problem(kind, net)
    delta = torch.linspace(0.3, 3.0, len(case.all))
    posterior = laplace_posterior(fitted(kind, structure, net), Gaussian(1.0), GaussianPrior(delta))
    f = pushforward(case, posterior.precision, case.new_x)
    wanted = case.function_covariance(case.precision(structure, delta))
    torch.testing.assert_close(f.mean, case.model(case.new_x).detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(f.covariance, wanted, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(f.variance, wanted.diagonal(dim1=1, dim2=2), rtol=1e-8, atol=0)
    assert torch.equal(f.covariance, f.covariance.mT)
    assert not f.mean.requires_grad
    assert not f.covariance.requires_grad


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_small_memory_budget_gives_the_same_in_pieces(fitted, net, structure, monkeypatch):
    case = problem("classification", net)
    precision = laplace_posterior(fitted("classification", structure, net), Gaussian(1.0), GaussianPrior(0.7)).precision
    whole = pushforward(case, precision, case.x)
    sizes = []
    original = Engine.__call__
    monkeypatch.setattr(Engine, "__call__", lambda self, x: sizes.append(len(x)) or original(self, x))
    pieces = pushforward(case, precision, case.x, budget=4000)
    assert max(sizes[1:]) < len(case.x), sizes  # the first pass sees the whole batch and finds it too large
    torch.testing.assert_close(pieces.mean, whole.mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(pieces.covariance, whole.covariance, rtol=1e-10, atol=1e-12)


def root(*shape, rank=3):
    return torch.randn(*shape, 3, rank)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_samples_are_normal_with_the_given_covariance(rank):
    """Also of lower rank, as dead units make it: projected on the eigenvectors of each input's covariance.

    Along those with variance v, the sum of squares over v is chi-squared; along the others there is no deviation.
    """
    N, S = 4, 20_000
    B = root(N, rank=rank)
    f = FunctionDistribution(torch.randn(N, 3), B @ B.mT)
    draws = f.sample(S, torch.Generator().manual_seed(1))
    assert draws.shape == (S, N, 3)
    for n in range(N):
        values, vectors = torch.linalg.eigh(f.covariance[n])
        along = (draws[:, n] - f.mean[n]) @ vectors
        dead, live = along[:, : 3 - rank], along[:, 3 - rank :] / values[3 - rank :].sqrt()
        assert (dead.abs() < 1e-6).all()  # the square root of rounding, 1e-16, in the covariance
        assert S * live.mean(0).square().sum() < chi2.isf(IMPROBABLE, rank) or rank == 0
        error = S**0.5 * (live.T @ live / S - torch.eye(rank))
        squares = error.triu(1).square().sum() + error.diagonal().square().sum() / 2
        assert squares < chi2.isf(IMPROBABLE, rank * (rank + 1) / 2) or rank == 0


def test_samples_of_different_inputs_are_independent():
    S, N = 20_000, 3
    f = FunctionDistribution(torch.zeros(N, 1), torch.ones(N, 1, 1))
    draws = f.sample(S, torch.Generator().manual_seed(1))[:, :, 0]
    correlations = S**0.5 * (draws.T @ draws / S).triu(1)
    assert correlations.square().sum() < chi2.isf(IMPROBABLE, 3)


def test_one_singular_input_does_not_disturb_the_others():
    covariance = torch.stack([torch.eye(2), torch.zeros(2, 2)])
    f = FunctionDistribution(torch.zeros(2, 2), covariance)
    draws = f.sample(5000, torch.Generator().manual_seed(0))
    assert (draws[:, 1] == 0).all()
    assert draws[:, 0].var() == pytest.approx(1, abs=5 * (2 / 10_000) ** 0.5)


def test_the_generator_is_the_only_randomness():
    f = FunctionDistribution(torch.zeros(2, 3), torch.eye(3).expand(2, 3, 3))
    first = f.sample(3, torch.Generator().manual_seed(1))
    torch.manual_seed(99)
    assert torch.equal(first, f.sample(3, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, f.sample(3, torch.Generator().manual_seed(2)))


def test_inputs_that_cannot_be_cut_are_taken_whole():
    """A dictionary with a tensor that has no axis of examples, under a budget that asks for pieces."""
    case = problem("classification")

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = case.fresh

        def forward(self, batch):
            return self.net(batch["x"] * batch["scale"])

    model = Scaled()
    parameters = Parameters.of(model)
    P = case.precision("full")
    with borrowed(model, parameters):
        engine = Engine(model, parameters, memory_budget=1000)
        f = linearized(engine, {"x": case.new_x / 2, "scale": torch.tensor(2.0)}, Dense(P))
    torch.testing.assert_close(f.covariance, case.function_covariance(P), rtol=1e-8, atol=1e-10)
