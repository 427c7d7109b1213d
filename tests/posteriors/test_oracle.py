"""The committed oracle: evidence and predictives of small linear models, each value to the tolerance it states."""

import math

import pytest
import torch
from committed_oracle import ORACLE, check, data, linear, value

from lapkit import Laplace
from lapkit.curvature import Bernoulli, Categorical
from lapkit.posteriors import (
    LINKS,
    FunctionDistribution,
    closed_form,
    expected_normal_cdf,
    monte_carlo,
    quasi_monte_carlo,
)


@pytest.fixture
def softmax():
    x, y, w = data("softmax_linear", "X", "y", "W")
    delta = ORACLE["inputs"]["softmax_linear"]["prior_precision"]
    la = Laplace(linear(w), "classification", "all", "full", prior_precision=delta)
    return la.fit([(x[:11], y[:11]), (x[11:], y[11:])])


@pytest.fixture
def new_x():
    return data("softmax_linear", "Xstar")[0]


@pytest.fixture
def logits():
    mean, variance = data("binary_gauss_logit", "mean", "var")
    return FunctionDistribution(mean[:, None], variance[:, None, None])


def test_log_determinants(softmax):
    check(softmax.log_det_posterior_precision, "GLM posterior precision (full GGN) logdet")
    check(softmax.log_det_ratio, "log det ratio via NTK: logdet(I+ L^{1/2} K L^{1/2}')")


def test_log_evidence(softmax):
    check(softmax.log_marginal_likelihood(), "log marglik classification full GGN")


def test_effective_dimension(softmax):
    """`tr(H P^-1) = P - delta tr(P^-1)`."""
    ours = softmax.n_params - softmax.prior_precision * softmax.posterior.variance.sum()
    check(ours, "effective dimension tr(G P^-1) = E[|L^{1/2} J theta_s|^2]")


def test_probit_of_classes(softmax, new_x):
    check(softmax(new_x, link_approx="probit"), "multiclass probit")


def test_bridge_norm_of_classes(softmax, new_x):
    ours = LINKS["bridge_norm"](Categorical(), softmax.function_distribution(new_x))
    check(ours, "Laplace bridge_norm mean")


def test_joint_covariance(softmax, new_x):
    """The facade gives a joint covariance for regression only; J P^-1 J^T of all inputs is the same for any kind."""
    J = torch.kron(new_x, torch.eye(3)).unflatten(1, (3, 3)).mT.flatten(1)  # (6 C, P), the weight row by row
    ours = J @ softmax.posterior_precision.solve(J.T)
    check(ours, "joint GLM covariance over the 6 test points, parameter vs kernel form")


def test_expectation_of_a_sigmoid(logits):
    """MacKay's formula to its error of 0.0033; samples to five standard errors (a sigmoid deviates by at most 1/2)."""
    exact, _ = value("E[sigmoid(f)] exact")
    assert (closed_form(Bernoulli(), logits).mean[:, 0] - exact).abs().max() < 0.0034
    ours = monte_carlo(Bernoulli(), logits, 100_000, torch.Generator().manual_seed(0))[:, 0]
    assert (ours - exact).abs().max() < 5 * 0.5 / 100_000**0.5
    evenly = quasi_monte_carlo(Bernoulli(), logits, 2**14, torch.Generator().manual_seed(0))[:, 0]
    assert (evenly - exact).abs().max() < 1e-4
    check(LINKS["gauss_hermite"](Bernoulli(), logits)[:, 0], "E[sigmoid(f)] exact")


def test_expectation_of_a_normal_cdf(logits):
    check(expected_normal_cdf(logits.mean, logits.variance)[:, 0], "E[Phi(f)] exact (probit link)")


# -- linear regression


def ridge(noise, delta):
    """A network at the MAP estimate for these hyper-parameters, and the Laplace approximation of it."""
    x, y = data("linreg", "X", "y")
    w = torch.linalg.solve(x.T @ x + delta * noise**2 * torch.eye(x.shape[1]), x.T @ y)
    la = Laplace(linear(w[None]), "regression", "all", "full", sigma_noise=noise, prior_precision=delta)
    return la.fit([(x, y)])


def test_gradient_at_the_mode():
    """With respect to log noise and log prior precision."""
    case = ORACLE["inputs"]["linreg"]
    la = ridge(case["sigma_noise"], case["prior_precision"])
    logs = torch.tensor([math.log(case["sigma_noise"]), math.log(case["prior_precision"])], requires_grad=True)
    evidence = la.log_marginal_likelihood(sigma_noise=logs[0].exp(), prior_precision=logs[1].exp())
    (gradient,) = torch.autograd.grad(evidence, logs)
    check(gradient, "same gradient at fixed mode (what laplace-torch backprops)")


def test_argmax_of_the_evidence():
    """Choosing hyper-parameters and refitting in turn climbs the exact evidence, since Laplace is exact here."""
    noise, delta = 0.4, 1.3
    for _ in range(40):
        la = ridge(noise, delta)
        la.optimize_prior_precision(tune_noise=True)
        noise, delta = float(la.sigma_noise), float(la.prior_precision)
    check([noise, delta], "argmax evidence [sigma_noise, prior_precision]")
    assert float(ridge(noise, delta).log_marginal_likelihood()) == pytest.approx(-12.46612042, abs=1e-7)
