"""Settings that are assigned: what may change after a fit, and what is refused."""

import math

import pytest
import torch
from dense_laplace import problem
from torch import nn

from lapkit import Laplace
from lapkit.curvature import Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian, PerOutputGaussian
from lapkit.facade.posterior import same_but_noise


def regression(**options):
    torch.manual_seed(0)
    data = [(torch.randn(20, 3), torch.randn(20, 2))]
    return Laplace(nn.Linear(3, 2), "regression", "all", "full", **options).fit(data)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "a", "1", True])
def test_a_temperature_is_a_positive_number(value):
    la = regression()
    with pytest.raises(ValueError, match="temperature must be positive and finite, got"):
        la.temperature = value
    assert la.temperature == 1.0


def test_what_is_no_number_is_no_temperature():
    with pytest.raises(TypeError):
        regression().temperature = None


def test_a_temperature_after_the_fit_counts():
    la = regression()
    la.log_marginal_likelihood(), la.posterior_variance
    la.temperature = 0.5
    other = regression(temperature=0.5)
    torch.testing.assert_close(la.log_marginal_likelihood(), other.log_marginal_likelihood())
    torch.testing.assert_close(la.posterior_variance, other.posterior_variance)


def test_another_size_of_the_noise_is_no_other_fit():
    la, other = regression(), regression(sigma_noise=0.3)
    la.likelihood = Gaussian(0.3)
    torch.testing.assert_close(la.log_marginal_likelihood(), other.log_marginal_likelihood())
    torch.testing.assert_close(la.posterior_variance, other.posterior_variance)


@pytest.mark.parametrize("value", [Categorical(), HeteroscedasticGaussian(), PerOutputGaussian(torch.ones(2))])
def test_another_likelihood_needs_another_fit(value):
    la = regression()
    with pytest.raises(ValueError, match="curvature is that of Gaussian"):
        la.likelihood = value
    assert isinstance(la.likelihood, Gaussian)


@pytest.mark.parametrize("value", ["regression", None, 1.0, Gaussian])
def test_what_is_no_likelihood_is_refused(value):
    la = Laplace(nn.Linear(3, 2), "regression", "all")
    with pytest.raises(TypeError, match="Expected a Likelihood object"):
        la.likelihood = value


def test_before_the_fit_any_likelihood_can_be_set():
    la = Laplace(nn.Linear(3, 2), "regression", "all")
    la.likelihood = Categorical()
    la.fit([(torch.randn(5, 3), torch.arange(5) % 2)])
    assert math.isfinite(la.log_marginal_likelihood())


class Own(Gaussian):
    """Whose noise makes it one of another class."""


def test_a_likelihood_of_ones_own_has_its_noise_set_and_tuned():
    torch.manual_seed(0)
    data = [(torch.randn(40, 3), torch.randn(40, 2))]
    own, built_in = (Laplace(nn.Linear(3, 2), likelihood, "all", "full") for likelihood in (Own(), "regression"))
    built_in.model.load_state_dict(own.model.state_dict())
    for la in (own, built_in):
        la.fit(data)
        la.sigma_noise = 0.3
    torch.testing.assert_close(own.log_marginal_likelihood(), built_in.log_marginal_likelihood())
    for la in (own, built_in):
        la.optimize_prior_precision(tune_noise=True)
    torch.testing.assert_close(own.log_marginal_likelihood(), built_in.log_marginal_likelihood())
    with pytest.raises(ValueError, match="curvature is that of"):
        own.likelihood = Gaussian()


def test_which_likelihoods_have_one_loss():
    noise = torch.tensor([1.0, 2.0])
    assert same_but_noise(PerOutputGaussian(noise, 3.0), PerOutputGaussian(noise.clone()))
    assert not same_but_noise(PerOutputGaussian(noise), PerOutputGaussian(2 * noise))
    assert same_but_noise(Categorical(), Categorical())
    assert not same_but_noise(Categorical(label_smoothing=0.1), Categorical())
    assert not same_but_noise(Categorical(), Bernoulli())


def test_a_fit_is_loaded_over_one_of_another_likelihood():
    state = regression(sigma_noise=0.3).state_dict()
    torch.manual_seed(0)
    torch.randn(20, 3), torch.randn(20, 2)
    model = nn.Linear(3, 2)
    la = Laplace(model, "classification", "all").fit([(torch.randn(5, 3), torch.arange(5) % 2)])
    la.load_state_dict(state)
    assert isinstance(la.likelihood, Gaussian)
    torch.testing.assert_close(la.log_marginal_likelihood(), regression(sigma_noise=0.3).log_marginal_likelihood())


STRUCTURES = ("kron", "diag", "full", "blockdiag", "ekfac", "lowrank", "gp")


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_precision_changed_in_place_is_not_assigned(structure):
    case = problem("classification")
    la = Laplace(case.model, "classification", "all", structure).fit(case.data)
    precision = torch.tensor(1.0)
    la.prior_precision = precision
    before = la(case.new_x), la.log_marginal_likelihood()
    precision.mul_(100)
    assert float(la.prior_precision) == 1
    torch.testing.assert_close((la(case.new_x), la.log_marginal_likelihood()), before)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_precision_with_a_gradient_is_always_the_present_one(structure):
    """As an optimiser of the user's own moves it."""
    case = problem("classification")
    la = Laplace(case.model, "classification", "all", structure).fit(case.data)
    precision = torch.tensor(1.0, requires_grad=True)
    la.prior_precision = precision
    with torch.no_grad():
        found = [la(case.new_x)]
        precision.mul_(100)
        found.append(la(case.new_x))
    for _ in range(2):  # each graph is its own
        la(case.new_x).square().sum().backward()
    assert float(precision.grad) != 0
    for value, here in zip((1.0, 100.0), found, strict=True):
        la.prior_precision = value
        torch.testing.assert_close(la(case.new_x), here)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_inference_mode_left_behind_has_gradients(structure):
    case = problem("classification")
    la = Laplace(case.model, "classification", "all", structure).fit(case.data)
    with torch.inference_mode():
        la(case.new_x)
        la.log_marginal_likelihood()
    logs = torch.zeros(len(list(case.model.parameters())), requires_grad=True)
    la.log_marginal_likelihood(prior_precision=logs.exp()).backward()
    assert logs.grad.abs().min() > 0
    la.optimize_prior_precision(prior_structure="layerwise")


def test_a_temperature_is_one_number():
    la = Laplace(problem("classification").model, "classification", "all", "diag")
    with pytest.raises(ValueError, match="temperature must be positive"):
        la.temperature = torch.ones(7)
