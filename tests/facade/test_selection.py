"""Hyper-parameters by evidence: stationary points, closed forms, the edges of the search, and what is refused."""

import math
import warnings

import numpy as np
import pytest
import torch
from dense_laplace import KINDS, STRUCTURES, problem, untouched
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from torch import nn

from lapkit import Laplace


def fitted(kind, structure, **options):
    case = problem(kind)
    return Laplace(case.model, kind, "all", structure, **options).fit(case.data)


def oracle_gradient(case, structure, delta, noise=1.0, temperature=1.0):
    """Of the dense log evidence in the log prior precisions."""
    logs = delta.double().log().requires_grad_()
    (gradient,) = torch.autograd.grad(case.log_evidence(structure, logs.exp(), noise, temperature), logs)
    return gradient


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    ("kind", "prior_structure"),
    [*((kind, shape) for kind in KINDS for shape in ("scalar", "layerwise")), ("classification", "diag")],
)
def test_the_best_precisions_are_stationary_and_more_of_them_are_better(kind, structure, prior_structure):
    """The dense evidence has no slope there; an optimiser that compares values to 1e-14 knows slopes to some 1e-6."""
    case = problem(kind)
    la = fitted(kind, structure)
    with untouched(case.model):
        found = la.optimize_prior_precision("marglik", prior_structure, n_steps=1000)
    length = {"scalar": 1, "layerwise": len(case.all), "diag": len(case.mean())}[prior_structure]
    assert found.converged
    assert la.prior_precision.numel() == length
    assert torch.equal(la.prior_precision, found.prior.precision)
    best = case.log_evidence(structure, la.prior_precision)
    assert found.log_evidence == pytest.approx(float(best), rel=1e-10)
    torch.testing.assert_close(la.log_marginal_likelihood(), best, rtol=1e-8, atol=0)
    scalar = fitted(kind, structure).optimize_prior_precision()
    assert found.log_evidence >= scalar.log_evidence - 1e-9
    assert found.log_evidence > float(case.log_evidence(structure, 1.0)) + 0.1  # where the search began
    assert oracle_gradient(case, structure, la.prior_precision).abs().max() < 1e-5


def test_one_precision_a_weight_of_a_diagonal_posterior_is_the_closed_form_fixed_point():
    """`delta = 1 / (w^2 + 1 / (h + delta))`, whose positive solution is `(sqrt(h^2 + 4 h / w^2) - h) / 2`.

    The evidence is flat there, so that its maximiser is known to less than half of its sixteen digits.
    """
    case = problem("regression")
    la = fitted("regression", "diag", sigma_noise=0.3)
    la.optimize_prior_precision(prior_structure="diag", n_steps=1000)
    delta, w, h = la.prior_precision, case.mean(), case.curvature("diag").diagonal() / 0.3**2
    assert delta.max() > 100 * delta.min()  # weights differ: one number for all would be far off
    torch.testing.assert_close(delta, 1 / (w**2 + 1 / (h + delta)), rtol=1e-4, atol=0)
    torch.testing.assert_close(delta, ((h**2 + 4 * h / w**2).sqrt() - h) / 2, rtol=1e-3, atol=0)


class Ridge:
    """Linear regression with the evidence in closed form, `y ~ N(0, noise^2 I + X X^T / delta)`."""

    def __init__(self, examples=40, features=5):
        self.x = torch.randn(examples, features)
        self.y = self.x @ torch.randn(features, 1) + 0.5 * torch.randn(examples, 1)

    def log_evidence(self, noise, delta):
        covariance = noise**2 * np.eye(len(self.x)) + (self.x @ self.x.T).numpy() / delta
        return multivariate_normal(np.zeros(len(self.x)), covariance).logpdf(self.y[:, 0].numpy())

    def laplace(self, noise, delta):
        """At the MAP estimate for these hyper-parameters."""
        eye = torch.eye(self.x.shape[1])
        w = torch.linalg.solve(self.x.T @ self.x + noise**2 * delta * eye, self.x.T @ self.y)
        model = nn.Linear(len(w), 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(w.T)
        la = Laplace(model, "regression", "all", "full", sigma_noise=noise, prior_precision=delta)
        return la.fit([(self.x, self.y)])


def test_noise_and_prior_of_a_linear_regression_maximise_the_closed_form_evidence():
    """Laplace is exact here: tuning and refitting in turn climbs the evidence itself, to the top that scipy finds."""
    ridge = Ridge()
    noise, delta = 1.0, 1.0
    for _ in range(30):
        la = ridge.laplace(noise, delta)
        found = la.optimize_prior_precision(tune_noise=True)
        noise, delta = float(la.sigma_noise), float(la.prior_precision)
    precise = {"xatol": 1e-9, "fatol": 1e-13}
    top = minimize(lambda z: -ridge.log_evidence(*np.exp(z)), [0.0, 0.0], method="Nelder-Mead", options=precise)
    # The place of a maximum is known to half the digits of its value.
    assert [noise, delta] == pytest.approx(np.exp(top.x).tolist(), rel=1e-5)
    assert found.log_evidence == pytest.approx(-top.fun, rel=1e-10)
    assert found.log_evidence == pytest.approx(ridge.log_evidence(noise, delta), rel=1e-10)


def test_at_a_fixed_mode_noise_and_prior_maximise_the_dense_evidence():
    case = problem("regression")
    la = fitted("regression", "full", sigma_noise=2.0)
    found = la.optimize_prior_precision(tune_noise=True)

    def negative(z):
        return -float(case.log_evidence("full", math.exp(z[1]), math.exp(z[0])))

    top = minimize(negative, [0.5, 0.5], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13})
    assert [float(la.sigma_noise), float(la.prior_precision)] == pytest.approx(np.exp(top.x).tolist(), rel=1e-5)
    assert found.log_evidence == pytest.approx(-top.fun, rel=1e-10)
    assert found.likelihood is la.likelihood


def test_noise_that_is_not_tuned_stays():
    noise = torch.tensor(0.3, requires_grad=True)
    la = fitted("regression", "diag", sigma_noise=noise)
    likelihood = la.likelihood
    found = la.optimize_prior_precision()
    assert found.likelihood is likelihood is la.likelihood
    assert la.likelihood.noise is noise


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_temperature_counts(temperature):
    case = problem("classification")
    la = fitted("classification", "full", temperature=temperature)
    la.optimize_prior_precision()
    gradient = oracle_gradient(case, "full", la.prior_precision, temperature=temperature)
    assert abs(float(gradient)) < 1e-6
    assert abs(float(oracle_gradient(case, "full", la.prior_precision))) > 0.01


def test_the_prior_mean_is_kept():
    """And counts: what is stationary around it is not so around zero."""
    case = problem("classification")
    la = fitted("classification", "full", prior_mean=0.3)
    la.optimize_prior_precision()
    assert la.prior.mean == 0.3
    logs = la.prior_precision.log().requires_grad_()
    around = [case.log_evidence("full", logs.exp(), prior_mean=mean) for mean in (0.3, 0.0)]
    gradients = [abs(float(torch.autograd.grad(value, logs)[0])) for value in around]
    assert gradients[0] < 1e-6
    assert gradients[1] > 0.01


def test_the_search_of_a_float32_fit_is_made_in_float64():
    """The evidence of the fit's own matrix is found, and its slope vanishes, to more digits than float32 has."""
    case = problem("classification")
    data = [(x.float(), y) for x, y in case.data]
    la = Laplace(case.fresh.float(), "classification", "all", "full").fit(data)
    found = la.optimize_prior_precision()
    eigenvalues = torch.linalg.eigvalsh(la.fitted.curvature.to_dense().double()).clamp_min(0)
    eigenvalues[: -2 * len(case.x)] = 0  # three logits have two columns for each example; the others are round-off
    delta, squares = found.prior.precision.double(), la.mean.double().square().sum()
    log_det_ratio = torch.log1p(eigenvalues / delta).sum()
    evidence = -la.fitted.loss.double() - (delta * squares + log_det_ratio) / 2
    slope = -(delta * squares - (eigenvalues / (eigenvalues + delta)).sum()) / 2
    # Of the matrix without what its own rounding makes of it, which is 1e-9 of it here.
    assert found.log_evidence == pytest.approx(float(evidence), rel=1e-8)
    assert abs(float(slope)) < 1e-6  # the precision that was found is then rounded to float32
    assert found.prior.precision.dtype == torch.float32


@pytest.mark.parametrize("start", [1e-4, 1.0, 1e5])
def test_where_the_search_begins_does_not_matter(start):
    la = fitted("classification", "kron", prior_precision=start)
    la.optimize_prior_precision()
    other = fitted("classification", "kron")
    other.optimize_prior_precision()
    torch.testing.assert_close(la.prior_precision, other.prior_precision, rtol=1e-6, atol=0)


def test_a_search_starts_from_a_prior_of_another_structure():
    case = problem("classification")
    la = fitted("classification", "kron", prior_precision=torch.linspace(0.5, 2.0, len(case.mean())))
    layerwise = la.optimize_prior_precision(prior_structure="layerwise")
    assert la.prior_precision.shape == (len(case.all),)
    again = fitted("classification", "kron").optimize_prior_precision(prior_structure="layerwise")
    assert layerwise.log_evidence == pytest.approx(again.log_evidence, rel=1e-9)
    assert la.optimize_prior_precision().prior.precision.ndim == 0


# -- the edges


def perfect():
    """Weights at zero, and targets that they reproduce."""
    model = nn.Linear(3, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    x = torch.randn(20, 3)
    return model, x


def test_a_prior_at_the_edge_is_told():
    """Weights exactly at the prior mean: the more precise the prior, the better."""
    model, x = perfect()
    la = Laplace(model, "regression", "all", "full").fit([(x, torch.randn(20, 1))])
    with pytest.warns(UserWarning, match=r"prior precision 1e\+08: .* all weights at the prior mean") as caught:
        la.optimize_prior_precision()
    assert float(la.prior_precision) == pytest.approx(1e8, rel=1e-9)
    assert caught[0].filename == __file__  # the warning points at the user's line


def test_no_prior_at_all_is_told():
    """Enormous weights that the data determine: the weaker the prior, the better."""
    model, x = perfect()
    with torch.no_grad():
        model.weight.fill_(1e4)
    la = Laplace(model, "regression", "all", "full").fit([(x, model(x).detach() + torch.randn(20, 1))])
    with pytest.warns(UserWarning, match=r"prior precision 1e-06: .* no prior at all"):
        la.optimize_prior_precision()


def test_noise_at_the_edge_is_told():
    model, x = perfect()
    with torch.no_grad():
        model.weight.fill_(1.0)
    la = Laplace(model, "regression", "all", "full").fit([(x, model(x).detach())])
    with pytest.warns(UserWarning, match="noise 1e-06: .* no noise at all"):
        la.optimize_prior_precision(tune_noise=True)
    assert float(la.sigma_noise) == pytest.approx(1e-6, rel=1e-9)


def test_an_ordinary_search_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted("regression", "full").optimize_prior_precision(tune_noise=True)


# -- what is refused


@pytest.mark.parametrize("kind", ["classification", "binary"])
def test_there_is_no_noise_to_tune(kind):
    with pytest.raises(ValueError, match="no observation noise; only regression has"):
        fitted(kind, "diag").optimize_prior_precision(tune_noise=True)


def test_a_refused_search_changes_nothing():
    la = fitted("classification", "diag")
    prior = la.prior
    with pytest.raises(ValueError, match="no observation noise"):
        la.optimize_prior_precision(tune_noise=True)
    with pytest.raises(ValueError, match="Unknown method"):
        la.optimize_prior_precision("crossval")
    assert la.prior is prior


def test_a_curvature_that_is_not_finite_is_refused():
    model, x = perfect()
    with torch.no_grad():
        model.weight.fill_(1e200)  # finite outputs, squares beyond float64
    la = Laplace(model, "regression", "all", "full").fit([(x, torch.randn(20, 1))])
    with pytest.raises(ValueError, match="evidence is not finite"):
        la.optimize_prior_precision()


# -- progress


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize(
    ("kind", "options", "word"),
    [
        ("classification", {"prior_structure": "layerwise"}, "prior precision"),
        ("classification", {"refit_loader": True}, "prior precision"),
        ("regression", {"method": "gridsearch", "val_loader": True}, "grid search"),
        ("regression", {"tune_noise": True, "optimizer": "mackay"}, "prior precision"),
    ],
)
@pytest.mark.filterwarnings("ignore:The smallest prior precision of the grid:UserWarning")  # of a few random numbers
def test_progress_is_shown_where_it_is_asked_for(kind, options, word, wanted, capsys):
    case = problem(kind)
    la = Laplace(case.model, kind, "all", "full").fit(case.data)
    options = {name: list(case.data) if name.endswith("_loader") else value for name, value in options.items()}
    la.optimize_prior_precision(**options, progress_bar=wanted)
    shown = capsys.readouterr().err
    assert (word in shown) == wanted
    assert wanted or not shown
