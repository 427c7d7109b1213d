"""Expectations over one logit: against dense grids, series, and their limits."""

import math

import pytest
import torch
from gaussian_outputs import entropy, on_line
from scipy.special import log_expit
from torch.autograd import gradcheck

from lapkit.curvature import Bernoulli
from lapkit.posteriors import expected_entropy, expected_normal_cdf, expected_sigmoid
from lapkit.posteriors.quadrature import NARROW, entropy_of_logit, gauss_hermite

MEANS = (-30.0, -3.0, 0.0, 0.7, 5.0)
VARIANCES = (1e-9, 1e-7, 1e-3, 0.3, 0.999 * NARROW, NARROW, 1.5, 9.0, 25.0, 400.0)


def both(function, mean, variance):
    return function(torch.tensor([mean]), torch.tensor([variance]))[0]


def binary_entropy(f):
    return entropy(torch.stack([f.sigmoid(), (-f).sigmoid()], dim=-1))


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
def test_sigmoid_and_entropy_agree_with_a_dense_grid(mean, variance):
    sigmoid, expected = both(expected_sigmoid, mean, variance), on_line(torch.sigmoid, mean, variance)
    torch.testing.assert_close(sigmoid, expected, rtol=1e-11, atol=0)  # relative: its logarithm is wanted
    entropies = both(expected_entropy, mean, variance), on_line(binary_entropy, mean, variance)
    torch.testing.assert_close(*entropies, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mean", MEANS)
def test_a_very_wide_gaussian_asks_for_its_sign(mean):
    """A sigmoid is a step there: what it errs by is the Gaussian's density times `int (sigmoid - step) = 0`."""
    variance = 1e12
    step = (1 + math.erf(mean / math.sqrt(2 * variance))) / 2
    assert float(both(expected_sigmoid, mean, variance)) == pytest.approx(step, abs=1e-13)
    density = 1 / math.sqrt(2 * math.pi * variance)
    assert float(both(expected_entropy, mean, variance)) == pytest.approx(density * math.pi**2 / 3, rel=1e-9)


@pytest.mark.parametrize("variance", [1.0, 4.0, 25.0, 100.0, 225.0, 400.0])
def test_a_tail_keeps_its_digits(variance):
    """Where f is negative almost surely, `E[sigmoid(f)] = exp(m + v / 2) - exp(2 m + 2 v) + ...`: one term will do."""
    mean = -2 * variance - 45
    ours = both(expected_sigmoid, mean, variance)
    assert float(ours.log()) == pytest.approx(mean + variance / 2, abs=1e-11)


@pytest.mark.parametrize("mean", [-0.3, -0.49, -0.51, -0.8, -0.999, -1.0, -1.3, -2.0])  # in units of the variance
@pytest.mark.parametrize("variance", [1.0, 9.0, 100.0, 400.0])
def test_a_tail_agrees_with_a_dense_grid_around_its_own_mass(mean, variance):
    """The integrand's, `sigmoid(f) N(f)`, whose logarithm is concave."""
    start, width = mean * variance - 40 * variance**0.5, (1 - mean) * variance + 100 * variance**0.5 + 60
    f = start + width * torch.linspace(0, 1, 400_001)
    logs = torch.nn.functional.logsigmoid(f) - (f - mean * variance).square() / (2 * variance)
    expected = torch.logsumexp(logs, 0) + math.log(width / 400_000 / math.sqrt(2 * math.pi * variance))
    ours = both(expected_sigmoid, mean * variance, variance).log()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11)


def test_without_variance_they_are_the_functions_themselves():
    f = torch.linspace(-800, 800, 41)
    torch.testing.assert_close(expected_sigmoid(f, torch.zeros(41)), f.sigmoid(), rtol=1e-14, atol=0)
    torch.testing.assert_close(expected_entropy(f, torch.zeros(41)), entropy_of_logit(f), rtol=0, atol=0)


def test_entropy_of_a_logit():
    f = torch.tensor([-1e4, -3.0, 0.0, 0.2, 50.0])
    logs = torch.as_tensor(log_expit(torch.stack([f, -f]).numpy()))
    torch.testing.assert_close(entropy_of_logit(f), -(logs.exp() * logs).sum(0), rtol=1e-12, atol=0)


def test_yes_and_no_sum_to_one_and_mirror():
    mean, variance = 5 * torch.randn(100), 10 * torch.rand(100)
    torch.testing.assert_close(
        expected_sigmoid(mean, variance) + expected_sigmoid(-mean, variance), torch.ones(100), rtol=1e-14, atol=0
    )
    torch.testing.assert_close(
        expected_entropy(mean, variance), expected_entropy(-mean, variance), rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("function", [expected_sigmoid, expected_entropy, expected_normal_cdf])
def test_derivatives(function):
    mean = torch.tensor([-2.0, 0.3, 1.0, 4.0, 0.5], requires_grad=True)
    variance = torch.tensor([0.2, 0.9, 1.1, 30.0, 4.0], requires_grad=True)
    assert gradcheck(function, (mean, variance))


@pytest.mark.parametrize("variance", [0.0, 1e-9, 0.5, 1.0, 4.0, 400.0])
def test_derivatives_at_an_even_chance(variance):
    """At mean zero, where `p` turns into `1 - p`: `p' = E[s(1 - s)]`, `p'' = 0`, `E[h]' = 0`, `E[h]'' = -E[...]`."""
    mean, v = torch.zeros(1, requires_grad=True), torch.full((1,), variance)
    density = lambda f: f.sigmoid() * (-f).sigmoid()  # noqa: E731
    bent = lambda f: -density(f) * (1 + f * (1 - 2 * f.sigmoid()))  # noqa: E731
    slopes = {expected_sigmoid: (density, 0.0), expected_entropy: (0.0, bent)}
    for function, wanted in slopes.items():
        (first,) = torch.autograd.grad(function(mean, v).sum(), mean, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), mean)
        for found, expected in zip((first, second), wanted, strict=True):
            value = on_line(expected, 0.0, variance) if callable(expected) and variance else expected
            value = value(torch.zeros(())) if callable(value) else torch.as_tensor(value)
            torch.testing.assert_close(found[0].detach(), value, rtol=0, atol=1e-8)


def test_two_equal_logits_have_a_gradient():
    mean = torch.zeros(1, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(gauss_hermite(mean, torch.eye(2)[None])[0, 1], mean)
    slope = on_line(lambda f: f.sigmoid() * (-f).sigmoid(), 0.0, 2.0)
    torch.testing.assert_close(gradient[0], torch.stack([-slope, slope]), rtol=0, atol=1e-11)


@pytest.mark.parametrize("function", [expected_sigmoid, expected_entropy])
@pytest.mark.parametrize("variance", [0.0, 1e-9, 1e-7])
def test_derivative_in_a_vanishing_variance_is_half_the_second_one_in_the_mean(function, variance):
    mean = torch.tensor([-2.0, 0.3, 1e4], requires_grad=True)
    v = torch.full((3,), variance, requires_grad=True)
    (slope,) = torch.autograd.grad(function(mean, v).sum(), v)
    plain = {expected_sigmoid: torch.sigmoid, expected_entropy: entropy_of_logit}[function]
    (first,) = torch.autograd.grad(plain(mean).sum(), mean, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), mean)
    torch.testing.assert_close(slope, second / 2, rtol=1e-6, atol=1e-12)


def test_in_float32():
    mean, variance = 3 * torch.randn(200), 20 * torch.rand(200) ** 3
    for function in (expected_sigmoid, expected_entropy, expected_normal_cdf):
        single = function(mean.float(), variance.float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), function(mean, variance), rtol=0, atol=1e-6)


def test_normal_cdf_is_exact_far_in_the_tail():
    """`Phi(-20) = 2.7536e-89`."""
    assert float(both(expected_normal_cdf, -40.0, 3.0)) == pytest.approx(2.7536241186062337e-89, rel=1e-12)


def test_mackays_formula_errs_by_at_most_two_percent():
    mean, variance = torch.meshgrid(torch.linspace(-8, 8, 65), torch.logspace(-3, 4, 65), indexing="ij")
    mackay = Bernoulli().expectation(mean.reshape(-1, 1), variance.reshape(-1, 1, 1))[:, 0]
    error = (mackay - expected_sigmoid(mean.flatten(), variance.flatten())).abs().max()
    assert 0.015 < float(error) < 0.02


@pytest.mark.parametrize("function", [expected_sigmoid, expected_entropy, expected_normal_cdf])
def test_bad_input(function):
    one = torch.ones(2)
    with pytest.raises(ValueError, match=r"one variance for each mean, got \(2,\) and \(2, 1\)"):
        function(one, torch.ones(2, 1))
    with pytest.raises(ValueError, match="A variance is negative, -1"):
        function(one, -one)
    with pytest.raises(ValueError, match="The mean of the outputs holds NaN"):
        function(one * float("nan"), one)
    with pytest.raises(ValueError, match="The variance of the outputs holds NaN or infinite"):
        function(one, one * float("inf"))
    with pytest.raises(TypeError, match=r"one floating type, got torch.float64 and torch.int64"):
        function(one, torch.ones(2, dtype=torch.long))
