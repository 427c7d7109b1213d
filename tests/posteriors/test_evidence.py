"""The log marginal likelihood: dense oracle, gradients, and the linear-Gaussian model, where Laplace is exact."""

import math

import numpy as np
import pytest
import torch
from dense_laplace import STRUCTURES, problem
from scipy.stats import multivariate_normal
from sklearn.linear_model import BayesianRidge
from torch import nn

from lapkit.curvature import GGN, Categorical, Engine, Gaussian, GGNDense, Parameters, accumulate, borrowed
from lapkit.posteriors import (
    Fit,
    GaussianPrior,
    closed_form,
    laplace_posterior,
    linearized,
    log_det_posterior,
    log_evidence,
)


def likelihood_of(kind, noise):
    return Gaussian(noise) if kind == "regression" else Categorical()


def precisions(case):
    return {
        "scalar": torch.tensor(0.7),
        "layerwise": torch.linspace(0.3, 3.0, len(case.all)),
        "per weight": torch.linspace(0.3, 3.0, len(case.mean())),
    }


def close(ours, theirs, rtol=1e-8):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)


@pytest.mark.parametrize(
    ("kind", "noise"), [("classification", 1.0), ("binary", 1.0), ("regression", 1.0), ("regression", 0.4)]
)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_against_the_dense_oracle(fitted, kind, noise, structure, temperature):
    case, fit = problem(kind), fitted(kind, structure)
    likelihood = likelihood_of(kind, noise)
    for delta in precisions(case).values():
        for mean in (0.0, torch.linspace(-1, 1, len(case.mean()))):
            ours = log_evidence(fit, likelihood, GaussianPrior(delta, mean), temperature)
            close(ours, case.log_evidence(structure, delta, noise, temperature, prior_mean=mean))
        dense = case.precision(structure, delta, noise, temperature)
        close(log_det_posterior(fit, likelihood, GaussianPrior(delta), temperature), torch.logdet(dense))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_convolutions(fitted, structure):
    case, fit = problem("classification", "cnn"), fitted("classification", structure, "cnn")
    for delta in precisions(case).values():
        close(log_evidence(fit, Categorical(), GaussianPrior(delta)), case.log_evidence(structure, delta))


def test_dropping_entries_lowers_the_evidence(fitted):
    """Fischer's and Hadamard's inequalities for the determinant."""
    evidence = {s: log_evidence(fitted("classification", s), Categorical(), GaussianPrior(0.7)) for s in STRUCTURES}
    assert evidence["full"] > evidence["blockdiag"] > evidence["diag"]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shape", ["scalar", "layerwise", "per weight"])
def test_gradients_are_those_of_the_oracle(fitted, structure, shape):
    """Central differences of the dense oracle, with an error of h^2 and of rounding over h: 1e-6, not 1e-8."""
    case, fit = problem("regression"), fitted("regression", structure)
    start = {"delta": precisions(case)[shape], "noise": torch.tensor(0.4), "temperature": torch.tensor(1.3)}
    leaves = {k: v.clone().requires_grad_() for k, v in start.items()}
    value = log_evidence(fit, Gaussian(leaves["noise"]), GaussianPrior(leaves["delta"]), leaves["temperature"])
    gradients = torch.autograd.grad(value, list(leaves.values()))
    for name, gradient in zip(leaves, gradients, strict=True):
        for index in range(0, start[name].numel(), 11):
            step = torch.zeros_like(start[name]).flatten()
            step[index] = 1e-5
            step = step.reshape(start[name].shape)
            up, down = (case.log_evidence(structure, **start | {name: start[name] + s * step}) for s in (1, -1))
            torch.testing.assert_close(gradient.flatten()[index], (up - down) / 2e-5, rtol=1e-6, atol=1e-6)


def test_numbers_are_not_rounded_to_the_default_type(fitted):
    """A float64 model under torch's float32 default: a noise of 0.3 taken in float32 moved the evidence by 2e-6."""
    case, fit = problem("regression"), fitted("regression", "full")
    wanted = case.log_evidence("full", 0.7, 0.3, 1.3)
    torch.set_default_dtype(torch.float32)
    ours = log_evidence(fit, Gaussian(0.3), GaussianPrior(0.7), 1.3)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=0)


class Linear:
    """`y = W x + b + noise`, C outputs, at the MAP estimate, and everything about it in closed form."""

    def __init__(self, outputs, noise=0.4, delta=1.3, examples=25):
        self.noise, self.delta, self.outputs = noise, delta, outputs
        self.x, self.new_x = torch.randn(examples, 3), torch.randn(4, 3)
        self.y = self.x @ torch.randn(3, outputs) + noise * torch.randn(examples, outputs)
        self.Phi, self.new_Phi = (self.features(x) for x in (self.x, self.new_x))
        self.precision = self.Phi.T @ self.Phi / noise**2 + delta * torch.eye(self.Phi.shape[1])
        self.w = torch.linalg.solve(self.precision, self.Phi.T @ self.y.flatten() / noise**2)
        self.model = nn.Linear(3, outputs)
        torch.nn.utils.vector_to_parameters(self.w, self.model.parameters())

    def features(self, x):
        """(N C, P) with P counted as in the layer: the weight row by row, then the bias."""
        eye = torch.eye(self.outputs)
        return torch.cat([torch.kron(x, eye).unflatten(1, (3, -1)).mT.flatten(1), eye.repeat(len(x), 1)], dim=1)

    def fit(self):
        parameters = Parameters.of(self.model)
        quantity = GGNDense(parameters)
        totals = accumulate(self.model, parameters, Gaussian(), GGN(), [(self.x, self.y)], [quantity])
        return Fit(
            parameters, parameters.vector(), quantity.result().operator(), totals.loss, totals.count, totals.outputs
        )


@pytest.mark.parametrize("outputs", [1, 2])
def test_linear_gaussian_evidence_is_the_marginal(outputs):
    """`y ~ N(0, noise^2 I + Phi Phi^T / delta)`: the weights integrated out exactly."""
    m = Linear(outputs)
    covariance = m.noise**2 * torch.eye(len(m.Phi)) + m.Phi @ m.Phi.T / m.delta
    exact = multivariate_normal(np.zeros(len(m.Phi)), covariance.numpy()).logpdf(m.y.flatten().numpy())
    assert float(log_evidence(m.fit(), Gaussian(m.noise), GaussianPrior(m.delta))) == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize("outputs", [1, 2])
def test_linear_gaussian_posterior_and_predictive(outputs):
    m = Linear(outputs)
    fit = m.fit()
    posterior = laplace_posterior(fit, Gaussian(m.noise), GaussianPrior(m.delta))
    close(posterior.mean, m.w)
    torch.testing.assert_close(posterior.precision.to_dense(), m.precision, rtol=1e-8, atol=1e-10)
    engine = Engine(m.model, fit.parameters)
    with borrowed(m.model, fit.parameters):
        f = linearized(engine, m.new_x, posterior.precision)
    predicted = closed_form(Gaussian(m.noise), f)
    joint = m.new_Phi @ torch.linalg.inv(m.precision) @ m.new_Phi.T
    close(predicted.mean.flatten(), m.new_Phi @ m.w)
    for n in range(len(m.new_x)):
        block = joint[n * outputs : (n + 1) * outputs, n * outputs : (n + 1) * outputs]
        torch.testing.assert_close(f.covariance[n], block, rtol=1e-8, atol=1e-12)
        noisy = block + m.noise**2 * torch.eye(outputs)
        torch.testing.assert_close(predicted.covariance_matrix[n], noisy, rtol=1e-8, atol=1e-12)


def test_bayesian_ridge_of_scikit_learn():
    """Its posterior, evidence and predictive deviation, at the precisions that it has chosen itself."""
    m = Linear(1)
    x, y = m.x.numpy(), m.y[:, 0].numpy()
    flat = {"alpha_1": 0, "alpha_2": 0, "lambda_1": 0, "lambda_2": 0}  # no hyper-priors
    ridge = BayesianRidge(fit_intercept=False, compute_score=True, tol=1e-12, max_iter=1000, **flat).fit(x, y)
    noise, delta = ridge.alpha_**-0.5, ridge.lambda_
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.as_tensor(ridge.coef_)[None])
    parameters = Parameters.of(model)
    quantity = GGNDense(parameters)
    totals = accumulate(model, parameters, Gaussian(), GGN(), [(m.x, m.y)], [quantity])
    fit = Fit(parameters, parameters.vector(), quantity.result().operator(), totals.loss, totals.count, totals.outputs)
    # Their score has all the constants of the evidence, so it is compared as it is.
    evidence = float(log_evidence(fit, Gaussian(noise), GaussianPrior(delta)))
    assert evidence == pytest.approx(ridge.scores_[-1], rel=1e-8)
    posterior = laplace_posterior(fit, Gaussian(noise), GaussianPrior(delta))
    torch.testing.assert_close(
        torch.linalg.inv(posterior.precision.to_dense()), torch.as_tensor(ridge.sigma_), rtol=1e-8, atol=1e-12
    )
    with borrowed(model, parameters):
        predicted = closed_form(Gaussian(noise), linearized(Engine(model, parameters), m.new_x, posterior.precision))
    mean, deviation = ridge.predict(m.new_x.numpy(), return_std=True)
    close(predicted.mean[:, 0], torch.as_tensor(mean))
    close(predicted.variance[:, 0].sqrt(), torch.as_tensor(deviation))


def test_temperature_tempers_the_normaliser(fitted):
    """`p(y|f)^(1/T)` raises the whole density to a power, its normaliser too.

    So the evidence at temperature T of N examples is that at temperature 1 of every example counted 1/T times: here
    T = 1/2 and the data twice.
    """
    case, fit = problem("regression"), fitted("regression", "full")
    noise, delta = 0.4, 0.7
    twice = 2 * case.log_likelihood(noise)
    prior = torch.full((len(case.mean()),), delta)
    P = 2 * case.curvature("full") / noise**2 + prior.diag()
    evidence = twice - (delta * case.mean().square().sum() + torch.logdet(P) - prior.log().sum()) / 2
    close(log_evidence(fit, Gaussian(noise), GaussianPrior(delta), temperature=0.5), evidence)
    assert float(fit.log_likelihood(Gaussian(noise), 0.5)) == pytest.approx(float(twice), rel=1e-12)
    normaliser = -2 * len(case.y) * 2 * math.log(noise * math.sqrt(2 * math.pi))
    residual = -2 * (case.f - case.y).square().sum() / (2 * noise**2)
    assert float(twice) == pytest.approx(float(normaliser + residual), rel=1e-12)
