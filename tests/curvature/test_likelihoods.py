"""Every likelihood against autograd's Hessian and torch.distributions; targets as users have them."""

import math

import oracles
import pytest
import torch
from torch import distributions

from lapkit.curvature import Bernoulli, Categorical, Gaussian

EXAMPLES = 5


def close(actual, expected, rtol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-12)


def independent(distribution):
    return distributions.Independent(distribution, 1)


# name: (likelihood, number of outputs C, the distribution of torch that it stands for)
LIKELIHOODS = {
    "categorical": (Categorical(), 4, lambda f: distributions.Categorical(logits=f)),
    "two classes": (Categorical(), 2, lambda f: distributions.Categorical(logits=f)),
    "bernoulli": (Bernoulli(), 3, lambda f: independent(distributions.Bernoulli(logits=f))),
    "one bernoulli": (Bernoulli(), 1, lambda f: independent(distributions.Bernoulli(logits=f))),
    "gaussian": (Gaussian(), 3, lambda f: independent(distributions.Normal(f, 1.0))),
    "gaussian with noise": (Gaussian(noise=0.3), 2, lambda f: independent(distributions.Normal(f, 0.3))),
    "gaussian with a tensor of noise": (
        Gaussian(noise=torch.tensor(2.0, dtype=torch.float64)),
        1,
        lambda f: independent(distributions.Normal(f, 2.0)),
    ),
}


@pytest.fixture(params=LIKELIHOODS)
def case(request):
    likelihood, outputs, distribution = LIKELIHOODS[request.param]
    f = 2 * torch.randn(EXAMPLES, outputs)
    return likelihood, f, distribution


def outer(columns):
    """S S^T of each example, (N, C, C)."""
    return torch.einsum("knc,knd->ncd", columns, columns)


def test_root_is_that_of_the_hessian(case):
    likelihood, f, distribution = case
    y = distribution(f).sample()
    of_one = lambda f_n, y_n: likelihood.loss(f_n[None], y_n[None])[0]  # noqa: E731
    close(outer(likelihood.hessian_root(f)), oracles.output_hessian(of_one, f, y))


def test_root_times_precision_is_the_curvature_of_log_prob(case):
    """With torch's own density, so that neither the loss nor its scale can be off."""
    likelihood, f, distribution = case
    y = distribution(f).sample()
    minus = lambda f_n, y_n: -distribution(f_n[None]).log_prob(y_n[None])[0]  # noqa: E731
    close(likelihood.precision * outer(likelihood.hessian_root(f)), oracles.output_hessian(minus, f, y))


def test_number_of_columns(case):
    likelihood, f, _ = case
    columns = f.shape[1] - 1 if isinstance(likelihood, Categorical) else f.shape[1]
    assert likelihood.hessian_root(f).shape == (columns, *f.shape)


def test_log_prob(case):
    likelihood, f, distribution = case
    y = distribution(f).sample()
    close(likelihood.log_prob(f, y), distribution(f).log_prob(y))
    total = likelihood.log_likelihood(likelihood.loss(f, y).sum(), len(f), f.shape[1])
    close(total, distribution(f).log_prob(y).sum())


def test_mean_and_samples(case):
    likelihood, f, distribution = case
    draws = 20_000
    many = f[:1].expand(draws, -1)
    samples = likelihood.sample(many, torch.Generator().manual_seed(1))
    if isinstance(likelihood, Categorical):
        samples = torch.nn.functional.one_hot(samples, f.shape[1]).to(f)
        mean = distribution(f[0]).probs
        variance = mean * (1 - mean)
    else:
        mean, variance = distribution(f[0]).mean, distribution(f[0]).variance
    close(likelihood.inverse_link(f)[0], mean)
    # Five standard errors; the variance of a sample variance is below 2 v^2 / n + v / n for these distributions.
    assert ((samples.mean(0) - mean).abs() <= 5 * (variance / draws).sqrt() + 1e-12).all()
    error = (samples.var(0) - variance).abs()
    assert (error <= 5 * ((2 * variance**2 + variance) / draws).sqrt() + 1e-12).all()


def test_samples_follow_the_generator(case):
    likelihood, f, _ = case
    draw = lambda seed: likelihood.sample(f.repeat(20, 1), torch.Generator().manual_seed(seed))  # noqa: E731
    before = torch.get_rng_state()
    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    assert torch.equal(before, torch.get_rng_state())


def test_predictive_without_uncertainty_is_the_likelihood(case):
    likelihood, f, distribution = case
    none = torch.zeros(len(f), f.shape[1], f.shape[1])
    y = distribution(f).sample()
    close(likelihood.predictive(f, none).log_prob(y), distribution(f).log_prob(y))
    close(likelihood.expectation(f, none), likelihood.inverse_link(f))


@pytest.mark.parametrize("variance", [0.1, 1.0, 10.0, 1000.0])
def test_bernoulli_expectation_by_quadrature(variance):
    """The probit approximation is not exact; 0.018 is the largest distance of a sigmoid from a scaled probit."""
    m = torch.linspace(-3, 3, 25)[:, None] * math.sqrt(1 + variance)
    z = torch.linspace(-9, 9, 20_001)
    weights = torch.exp(-z.square() / 2) / torch.exp(-z.square() / 2).sum()
    exact = ((m + math.sqrt(variance) * z).sigmoid() * weights).sum(1, keepdim=True)
    approximate = Bernoulli().expectation(m, torch.full((25, 1, 1), variance))
    assert (approximate - exact).abs().max() < 0.018
    assert (approximate - exact).abs().max() > 1e-6  # it would be the same function


def test_gaussian_predictive_is_exact():
    mean, root = torch.randn(4, 2), torch.randn(4, 2, 2)
    predictive = Gaussian(noise=0.5).predictive(mean, root @ root.mT)
    close(predictive.mean, mean)
    close(predictive.covariance_matrix, root @ root.mT + 0.25 * torch.eye(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli()], ids=["categorical", "bernoulli"])
def test_confident_outputs(likelihood, dtype):
    f = torch.tensor([[60.0, -60, 0], [-60, 60, 60], [200, 0, -200], [-1e4, 1e4, 0]], dtype=dtype)
    root = likelihood.hessian_root(f)
    assert torch.isfinite(root).all()
    y = torch.tensor([0, 1, 0, 1]) if isinstance(likelihood, Categorical) else torch.ones_like(f)
    of_one = lambda f_n, y_n: likelihood.loss(f_n[None], y_n[None])[0]  # noqa: E731
    exact = oracles.output_hessian(of_one, f.double(), y.double() if y.is_floating_point() else y)
    torch.testing.assert_close(outer(root).double(), exact, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [5.0, 30.0, 60.0])
def test_confident_roots_keep_their_digits(gap, dtype):
    """p (1 - p) = e^-gap / (1 + e^-gap)^2, which 1 - p in floating point loses; the root adds half of its rounding."""
    f = torch.tensor([[gap, 0.0], [0.0, gap]], dtype=dtype)
    exact = math.exp(-gap) / (1 + math.exp(-gap)) ** 2
    expected = exact * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    # A logit of 60 is known to 60 eps, and so is its exponential.
    rtol = 200 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        outer(Categorical().hessian_root(f)).double(), expected.expand(2, 2, 2), rtol=rtol, atol=0
    )
    bernoulli = outer(Bernoulli().hessian_root(f[:, :1] - f[:, 1:])).double()
    torch.testing.assert_close(bernoulli, torch.full((2, 1, 1), exact), rtol=rtol, atol=0)


F3, F1 = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)
NAN = torch.tensor([0.0, 1.0, float("nan"), 0.0], dtype=torch.float64)
BAD = {
    "float labels": (Categorical(), F3, torch.zeros(4), TypeError, r"integer type, got torch.float32.*\.long\(\)"),
    "boolean labels": (Categorical(), F3, torch.zeros(4).bool(), TypeError, "integer type"),
    "label too high": (Categorical(), F3, torch.tensor([0, 1, 2, 3]), ValueError, "between 0 and 3.*3 outputs"),
    "negative label": (Categorical(), F3, torch.tensor([0, 1, -100, 2]), ValueError, "between -100 and 2"),
    "one-hot labels": (Categorical(), F3, torch.eye(4, 3).long(), ValueError, r"shape \(4,\).*argmax"),
    "too few labels": (Categorical(), F3, torch.zeros(3).long(), ValueError, r"\(3,\) targets for outputs \(4, 3\)"),
    "a single label": (Categorical(), F3, torch.tensor(1), ValueError, "one target an example"),
    "one logit": (Categorical(), F1, torch.zeros(4).long(), ValueError, "Bernoulli"),
    "bernoulli shape": (Bernoulli(), F3, torch.zeros(4), ValueError, r"shape \(4, 3\)"),
    "bernoulli too few": (Bernoulli(), F1, torch.zeros(5), ValueError, r"\(5,\) targets"),
    "bernoulli values": (Bernoulli(), F1, torch.tensor([0.0, 1, 2, 1]), ValueError, "0 or 1.*between 0 and 2"),
    "bernoulli minus one": (Bernoulli(), F1, torch.tensor([-1, 1, 1, 1]), ValueError, "between -1 and 1"),
    "bernoulli NaN": (Bernoulli(), F1, NAN, ValueError, "NaN"),
    "gaussian shape": (Gaussian(), F3, torch.zeros(4, 2), ValueError, r"shape \(4, 3\).*got \(4, 2\)"),
    "gaussian vector for three": (Gaussian(), F3, torch.zeros(4), ValueError, r"shape \(4, 3\)"),
    "gaussian transposed": (Gaussian(), F1, torch.zeros(1, 4), ValueError, r"\(1, 4\) targets"),
    "gaussian NaN": (Gaussian(), F1, NAN, ValueError, "NaN"),
    "gaussian infinite": (Gaussian(), F1, NAN.nan_to_num(float("inf")), ValueError, "infinite"),
}


@pytest.mark.parametrize("case", BAD)
def test_targets_that_do_not_fit(case):
    likelihood, f, y, error, words = BAD[case]
    with pytest.raises(error, match=words):
        likelihood.check(f, y)


INTEGERS = torch.tensor([0, 2, 1, 0])
GOOD = {
    "indices": (Categorical(), F3, INTEGERS, INTEGERS),
    "a column of indices": (Categorical(), F3, INTEGERS[:, None], INTEGERS),
    "short indices": (Categorical(), F3, INTEGERS.to(torch.uint8), INTEGERS),
    "boolean answers": (Bernoulli(), F1, torch.tensor([True, False, True, True]), torch.tensor([[1.0], [0], [1], [1]])),
    "integer answers": (Bernoulli(), F3, torch.eye(4, 3).long(), torch.eye(4, 3)),
    "integer numbers": (Gaussian(), F1, INTEGERS, torch.tensor([[0.0], [2], [1], [0]])),
    "single precision": (Gaussian(), F3, torch.eye(4, 3), torch.eye(4, 3)),
}


@pytest.mark.parametrize("case", GOOD)
def test_targets_are_converted(case):
    likelihood, f, y, expected = GOOD[case]
    checked = likelihood.check(f, y)
    assert checked.dtype == (torch.long if isinstance(likelihood, Categorical) else f.dtype)
    assert torch.equal(checked.double(), expected.double())
    assert likelihood.loss(f, checked).shape == f.shape[:1]


@pytest.mark.parametrize("noise", [0.0, -1.0, float("nan"), float("inf"), torch.tensor([1.0, 2.0])])
def test_noise_must_be_a_positive_number(noise):
    with pytest.raises(ValueError, match="must be one positive number"):
        Gaussian(noise=noise)


def test_log_prob_is_differentiable_in_the_noise():
    f, y = torch.randn(4, 2), torch.randn(4, 2)
    noise = torch.tensor(0.7, requires_grad=True)
    (actual,) = torch.autograd.grad(Gaussian(noise=noise).log_prob(f, y).sum(), noise)
    other = torch.tensor(0.7, requires_grad=True)
    (expected,) = torch.autograd.grad(distributions.Normal(f, other).log_prob(y).sum(), other)
    close(actual, expected)
