"""Likelihoods with noise of their own through the facade: evidence, tuning, and what is predicted of targets."""

import pytest
import torch
from dense_laplace import problem
from torch import nn
from torch.distributions import MultivariateNormal, Normal

from lapkit import Laplace
from lapkit.curvature import HeteroscedasticGaussian, PerOutputGaussian, Poisson

NOISE = torch.tensor([0.3, 2.0])


def fitted(scale=1.5, structure="full", **options):
    case = problem("regression")
    la = Laplace(case.model, PerOutputGaussian(NOISE, scale), "all", structure, prior_precision=0.7, **options)
    return case, la.fit(case.data)


@pytest.mark.parametrize("structure", ["diag", "kron", "blockdiag", "full", "lowrank"])
def test_equal_noises_are_one_noise(structure):
    case = problem("regression")
    one = Laplace(case.model, "regression", "all", structure, sigma_noise=0.6).fit(case.data)
    likelihood = PerOutputGaussian(torch.full((2,), 0.3), 2.0)
    each = Laplace(case.model, likelihood, "all", structure).fit(case.data)
    torch.testing.assert_close(each.posterior_precision.to_dense(), one.posterior_precision.to_dense())
    torch.testing.assert_close(each.log_marginal_likelihood(), one.log_marginal_likelihood())
    torch.testing.assert_close(each(case.new_x), one(case.new_x))
    y, wanted = (la.predictive_distribution(case.new_x).covariance_matrix for la in (each, one))
    torch.testing.assert_close(y, wanted)


def test_evidence_against_dense_algebra():
    case, la = fitted()
    rows = case.jacobian.transpose(0, 1).flatten(0, 1) if case.jacobian.shape[0] != 13 else case.jacobian.flatten(0, 1)
    weights = (1.5 * NOISE).square().reciprocal().repeat(13)
    P = rows.T @ (weights[:, None] * rows) + 0.7 * torch.eye(rows.shape[1])
    torch.testing.assert_close(la.posterior_precision.to_dense(), P)
    log_likelihood = Normal(case.f, 1.5 * NOISE).log_prob(case.y).sum()
    torch.testing.assert_close(la.log_likelihood, log_likelihood)
    w = case.mean()
    prior = len(w) * torch.tensor(0.7).log() - 0.7 * w @ w
    torch.testing.assert_close(la.log_marginal_likelihood(), log_likelihood + (prior - torch.logdet(P)) / 2)


@pytest.mark.filterwarnings("ignore:The tuned noise")
def test_the_scale_is_tuned_like_the_noise_of_rescaled_targets():
    """Targets in units of their noises make the outputs' noises equal: a linear model, so that the network follows."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 3), torch.randn(40, 2) * NOISE
    model, rescaled = nn.Linear(3, 2), nn.Linear(3, 2)
    with torch.no_grad():
        rescaled.weight.copy_(model.weight / NOISE[:, None])
        rescaled.bias.copy_(model.bias / NOISE)
    la = Laplace(model, PerOutputGaussian(NOISE), "all", "full").fit([(x, y)])
    found = la.optimize_prior_precision(tune_noise=True)
    assert found.converged
    assert isinstance(la.likelihood, PerOutputGaussian)
    assert torch.equal(la.likelihood.noise, NOISE)
    best = float(la.log_marginal_likelihood())
    for scale in (0.99, 1.01):
        assert float(la.log_marginal_likelihood(sigma_noise=scale * la.sigma_noise)) < best
    delta, scale = la.prior_precision, la.sigma_noise
    other = Laplace(rescaled, "regression", "all", "full", sigma_noise=scale).fit([(x, y / NOISE)])
    shared = 40 * NOISE.log().sum()  # the change of units of 40 targets
    torch.testing.assert_close(la.log_likelihood, other.log_likelihood - shared)
    assert delta > 0


def test_the_scale_can_be_set():
    case, la = fitted()
    la.sigma_noise = 0.5
    again = fitted(scale=0.5)[1]
    torch.testing.assert_close(la.posterior_precision.to_dense(), again.posterior_precision.to_dense())
    torch.testing.assert_close(la.log_marginal_likelihood(), again.log_marginal_likelihood())
    y = la.predictive_distribution(case.new_x)
    torch.testing.assert_close(y.covariance_matrix, la(case.new_x)[1] + torch.diag((0.5 * NOISE) ** 2))


def test_predicted_noise():
    case = problem("regression")
    la = Laplace(case.model, HeteroscedasticGaussian(), "all", "full").fit([(case.x, case.y[:, :1])])
    f = la.function_distribution(case.new_x)
    y = la.predictive_distribution(case.new_x)
    assert isinstance(y, MultivariateNormal)
    draws = f.sample(200_000, torch.Generator().manual_seed(0))
    targets = draws[..., 0] + (draws[..., 1] / 2).exp() * torch.randn(draws.shape[:2])
    torch.testing.assert_close(y.mean[:, 0], targets.mean(0), atol=0.1, rtol=0.05)
    torch.testing.assert_close(y.variance[:, 0], targets.var(0), atol=0, rtol=0.2)


@pytest.mark.parametrize("likelihood", [HeteroscedasticGaussian(), Poisson()])
def test_likelihoods_without_a_dispersion_refuse(likelihood):
    la = Laplace(nn.Linear(3, 2), likelihood, "all", "diag").fit(
        [(torch.randn(5, 3), torch.ones(5, 1).expand(5, 1))]
        if isinstance(likelihood, HeteroscedasticGaussian)
        else [(torch.randn(5, 3), torch.ones(5, 2))]
    )
    with pytest.raises(ValueError, match="no observation noise"):
        la.sigma_noise = 0.3
    with pytest.raises(ValueError, match="no observation noise"):
        la.log_marginal_likelihood(sigma_noise=0.3)
    with pytest.raises(ValueError, match="no observation noise"):
        la.optimize_prior_precision(tune_noise=True)
