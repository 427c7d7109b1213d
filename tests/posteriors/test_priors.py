"""The prior: one precision, one a tensor, one a weight, and what is refused."""

import copy

import numpy as np
import pytest
import torch
from dense_laplace import problem
from torch.distributions import MultivariateNormal

from lapkit.curvature import Parameters
from lapkit.posteriors import GaussianPrior

CASE = problem("regression")
TENSORS, WEIGHTS = len(CASE.all), len(CASE.mean())
PRECISIONS = {
    "float": 0.7,
    "integer": 2,
    "0-d tensor": torch.tensor(0.7, dtype=torch.float64),
    "one entry": torch.tensor([0.7], dtype=torch.float64),
    "per tensor": torch.linspace(0.5, 2.0, TENSORS, dtype=torch.float64),
    "per weight": torch.linspace(0.5, 2.0, WEIGHTS, dtype=torch.float64),
    "list per tensor": [0.5, 1.0, 1.5, 2.0, 2.5, 3.0],
    "numpy per weight": np.linspace(0.5, 2.0, WEIGHTS),
}


@pytest.fixture
def parameters():
    return Parameters.of(CASE.model)


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS.keys())
@pytest.mark.parametrize(
    "mean", [0.0, 0.3, torch.linspace(-1, 1, WEIGHTS, dtype=torch.float64)], ids=["0", ".3", "vec"]
)
def test_density_is_that_of_the_normal_written_out(parameters, precision, mean):
    prior = GaussianPrior(precision, mean)
    diagonal = CASE.prior_diagonal(precision)
    torch.testing.assert_close(prior.diagonal(parameters), diagonal, rtol=1e-15, atol=0)
    weights = torch.randn(WEIGHTS)
    normal = MultivariateNormal(torch.as_tensor(mean).expand(WEIGHTS), precision_matrix=diagonal.diag())
    constant = WEIGHTS * np.log(2 * np.pi)
    ours = (prior.logdet(parameters) - constant - prior.scatter(parameters, weights)) / 2
    torch.testing.assert_close(ours, normal.log_prob(weights), rtol=1e-10, atol=0)


def test_a_number_a_tensor_stays_with_its_tensor(parameters):
    diagonal = GaussianPrior(torch.arange(1.0, TENSORS + 1)).diagonal(parameters)
    for k, part in enumerate(parameters.split(diagonal).values(), start=1):
        assert (part == k).all()


@pytest.mark.parametrize("length", [1, TENSORS, WEIGHTS])
def test_differentiable_in_the_precision(parameters, length):
    """d log det / d delta_j = n_j / delta_j; d scatter / d delta_j = |w_j - m|^2."""
    delta = torch.linspace(0.5, 2.0, length).requires_grad_()
    weights = torch.randn(WEIGHTS)
    prior = GaussianPrior(delta, mean=0.3)
    sizes = {1: [WEIGHTS], TENSORS: CASE.sizes(), WEIGHTS: [1] * WEIGHTS}[length]
    (of_logdet,) = torch.autograd.grad(prior.logdet(parameters), delta)
    torch.testing.assert_close(of_logdet, torch.tensor(sizes) / delta.detach(), rtol=1e-12, atol=0)
    (of_scatter,) = torch.autograd.grad(prior.scatter(parameters, weights), delta)
    squares = torch.stack([part.sum() for part in (weights - 0.3).square().split(sizes)])
    torch.testing.assert_close(of_scatter, squares, rtol=1e-12, atol=0)


def test_a_python_number_is_not_rounded_to_the_default_type(parameters):
    torch.set_default_dtype(torch.float32)  # the weights are float64 all the same
    prior = GaussianPrior(0.7, 0.3)
    assert float(prior.shift(parameters)) == 0.7
    assert float(prior.centre(parameters)) == 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_take_the_weights_type_and_at_least_float32(dtype):
    parameters = Parameters.of(copy.deepcopy(CASE.model).to(dtype))
    assert GaussianPrior(0.7).diagonal(parameters).dtype == torch.float32


@pytest.mark.parametrize(
    "precision", [0.0, -1.0, float("nan"), float("inf"), torch.tensor([1.0, 0.0]), [1.0, -2.0]], ids=str
)
def test_precisions_that_are_not_positive_are_refused(precision):
    with pytest.raises(ValueError, match="positive and finite"):
        GaussianPrior(precision)


@pytest.mark.parametrize("value", ["1", None, ["a"], {}], ids=str)
def test_what_is_no_number_is_refused_by_its_type(value):
    for name in ("precision", "mean"):
        with pytest.raises(TypeError, match=rf"A prior {name} is a number, .* got {type(value).__name__}"):
            GaussianPrior(**{name: value})


@pytest.mark.parametrize("precision", [torch.ones(2, 2), torch.ones(0)], ids=["matrix", "empty"])
def test_precisions_of_a_wrong_shape_are_refused(precision):
    with pytest.raises(ValueError, match="a number or a vector"):
        GaussianPrior(precision)


@pytest.mark.parametrize("mean", [float("nan"), torch.tensor([0.0, float("inf")]), torch.zeros(WEIGHTS, 1)], ids=str)
def test_means_that_are_no_vector_of_numbers_are_refused(mean):
    """A column (P, 1) would silently be broadcast against the weights to (P, P)."""
    with pytest.raises(ValueError, match="finite number or vector"):
        GaussianPrior(1.0, mean)


def test_a_wrong_number_of_precisions_is_refused_with_the_right_ones(parameters):
    with pytest.raises(ValueError, match=rf"Expected 1 prior precision, {TENSORS} .* or {WEIGHTS} .*, got 3"):
        GaussianPrior(torch.ones(3)).shift(parameters)


def test_a_wrong_number_of_means_is_refused_with_the_right_one(parameters):
    prior = GaussianPrior(1.0, torch.zeros(3))
    with pytest.raises(ValueError, match=rf"Expected 1 prior mean, or {WEIGHTS} .*, got 3"):
        prior.scatter(parameters, torch.zeros(WEIGHTS))
