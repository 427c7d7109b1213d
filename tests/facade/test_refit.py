"""The linearised network's own mode: of linear-Gaussian models in closed form, of a small network by dense algebra."""

import math
import warnings
from functools import partial

import pytest
import torch
from dense_laplace import problem, untouched
from scipy.stats import multivariate_normal
from torch import nn

from lapkit import Laplace
from lapkit.curvature import Engine, Gaussian
from lapkit.posteriors import GaussianPrior
from lapkit.refit import LinearizedNetwork, refit
from lapkit.selection import maximize_evidence


def parts(la):
    return Engine(la.model, la.fitted.parameters), la.fitted, la.likelihood


def dense_gradient(case, weights, delta, noise=1.0):
    """Of the linearised network's negative log posterior, by autograd through the dense Jacobian."""
    w = weights.clone().requires_grad_()
    f = case.f + (case.jacobian @ (w - case.mean()))
    if case.kind == "regression":
        misfit = (f - case.y).square().sum() / (2 * noise**2)
    elif case.kind == "binary":
        misfit = nn.functional.binary_cross_entropy_with_logits(f, case.y, reduction="sum")
    else:
        misfit = nn.functional.cross_entropy(f, case.y, reduction="sum")
    return torch.autograd.grad(misfit + (delta * w.square()).sum() / 2, w)[0]


@pytest.mark.parametrize("structure", ["diag", "kron", "full", "lowrank"])
@pytest.mark.parametrize("kind", ["classification", "regression", "binary"])
def test_the_mode_is_stationary_whatever_the_preconditioner(kind, structure):
    case = problem(kind)
    la = Laplace(case.model, kind, "all", structure).fit(case.data)
    engine, fit, likelihood = parts(la)
    network = LinearizedNetwork.of(engine, fit, likelihood, case.data)
    weights, reached = network.mode(likelihood, GaussianPrior(0.5), 1.0, fit.mean)
    assert reached
    assert dense_gradient(case, fit.mean, 0.5).abs().max() > 0.1  # the network's own weights are none
    assert dense_gradient(case, weights, 0.5).abs().max() < 1e-6


def test_a_linear_gaussian_model_reaches_the_top_of_its_exact_evidence():
    """From weights that are no mode at all: the network is linear, so that they do not matter."""
    x = torch.randn(30, 4)
    y = x @ torch.randn(4, 1) + 0.5 * torch.randn(30, 1)
    model = nn.Linear(4, 1, bias=False)
    nn.init.normal_(model.weight, std=5)
    la = Laplace(model, "regression", "all", "full").fit([(x, y)])
    tune = partial(maximize_evidence, tune_noise=True)
    found = refit(*parts(la), GaussianPrior(1.0), [(x, y)], tune, tolerance=1e-13)
    assert found.converged
    noise, delta = float(found.selection.likelihood.noise), float(found.selection.prior.precision)

    def exact(log_noise, log_delta):
        covariance = math.exp(2 * log_noise) * torch.eye(30) + x @ x.T / math.exp(log_delta)
        return multivariate_normal(torch.zeros(30).numpy(), covariance.numpy()).logpdf(y[:, 0].numpy())

    here = math.log(noise), math.log(delta)
    assert found.selection.log_evidence == pytest.approx(exact(*here), rel=1e-9)
    step = 1e-4
    slopes = [
        (exact(here[0] + a, here[1] + b) - exact(here[0] - a, here[1] - b)) / (2 * step)
        for a, b in ((step, 0), (0, step))
    ]
    assert max(map(abs, slopes)) < 1e-4
    ridge = torch.linalg.solve(x.T @ x + noise**2 * delta * torch.eye(4), x.T @ y)[:, 0]
    torch.testing.assert_close(found.weights, ridge, rtol=1e-5, atol=1e-6)


def test_the_evidence_of_a_small_network_is_that_of_the_dense_linear_model():
    """For Gaussian targets that of `y - f + J w* ~ N(0, noise^2 I + J J^T / delta)`, which knows no mode."""
    case = problem("regression")
    la = Laplace(case.model, "regression", "all", "full", sigma_noise=0.6).fit(case.data)
    before = la.fitted.mean.clone()
    found = refit(*parts(la), GaussianPrior(1.0), case.data, maximize_evidence)
    J = case.jacobian.flatten(0, 1)
    target = (case.y - case.f).flatten() + J @ case.mean()
    delta = float(found.selection.prior.precision)
    covariance = 0.36 * torch.eye(len(J)) + J @ J.T / delta
    exact = torch.distributions.MultivariateNormal(torch.zeros(len(J)), covariance).log_prob(target)
    assert found.converged
    assert found.selection.log_evidence == pytest.approx(float(exact), rel=1e-7)
    assert float(found.selection.log_evidence) > float(case.log_evidence("full", delta, 0.6)) + 1
    assert torch.equal(la.fitted.mean, before)
    assert isinstance(found.selection.likelihood, Gaussian)


def test_the_facade_sets_what_the_refit_finds():
    case = problem("classification")
    la = Laplace(case.model, "classification", "all", "full").fit(case.data)
    found = refit(*parts(la), la.prior, case.data, maximize_evidence)
    with untouched(case.model):
        ours = la.optimize_prior_precision(optimizer="mackay", refit_loader=case.data)
    assert ours.log_evidence == pytest.approx(found.selection.log_evidence, rel=1e-7)
    assert la.prior is ours.prior
    plain = Laplace(case.model, "classification", "all", "full").fit(case.data).optimize_prior_precision()
    assert ours.log_evidence > plain.log_evidence


def test_warnings_of_the_last_round_alone_are_heard():
    """Also where warnings are errors, as they are here: those of earlier rounds raise none."""
    case, rounds = problem("regression"), []

    def tune(*given):
        rounds.append(len(rounds) + 1)
        if len(rounds) < 4:
            warnings.warn(f"round {rounds[-1]}", UserWarning, stacklevel=2)
        return maximize_evidence(*given)

    la = Laplace(case.model, "regression", "all", "full", sigma_noise=0.6).fit(case.data)
    with pytest.warns(UserWarning, match="round 3") as heard:
        refit(*parts(la), la.prior, case.data, tune, rounds=3, tolerance=0.0)
    assert len(heard) == 1
    rounds.clear()
    assert refit(*parts(la), la.prior, case.data, tune).rounds > 3  # and the last has nothing to say


def test_an_edge_is_told_once_and_to_the_caller():
    case = problem("classification")
    la = Laplace(case.model, "classification", "all", "full").fit(case.data)
    with pytest.warns(UserWarning, match="at the edge of the search, prior precision 1e-05") as heard:
        la.optimize_prior_precision(refit_loader=case.data, bounds=(1e-6, 1e-5))
    assert [each.filename for each in heard] == [__file__]


def test_other_data_and_no_rounds_are_refused():
    case = problem("regression")
    la = Laplace(case.model, "regression", "all", "diag").fit(case.data)
    with pytest.raises(ValueError, match="those that were fitted"):
        refit(*parts(la), GaussianPrior(1.0), case.data[:1], maximize_evidence)
    with pytest.raises(ValueError, match="At least one round"):
        refit(*parts(la), GaussianPrior(1.0), case.data, maximize_evidence, rounds=0)


def test_the_mode_is_reached_in_single_precision():
    """Where no decrement below the round-off of the objective can be seen."""
    case = problem("classification")
    la = Laplace(case.fresh.float(), "classification", "all", "diag")
    data = [(x.float(), y) for x, y in case.data]
    la.fit(data)
    network = LinearizedNetwork.of(*parts(la)[:2], la.likelihood, data)
    weights, reached = network.mode(la.likelihood, GaussianPrior(0.5), 1.0, la.fitted.mean)
    assert reached
    assert weights.dtype == torch.float32
    assert dense_gradient(case, weights.double(), 0.5).abs().max() < 1e-2
