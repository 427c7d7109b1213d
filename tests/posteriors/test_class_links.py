"""Class probabilities of Gaussian logits: every link of the table against the truth, its limits and its neighbours."""

import math

import pytest
import torch
from gaussian_outputs import on_grid, random
from scipy.integrate import dblquad
from scipy.stats import multivariate_normal
from torch.autograd import gradcheck

from lapkit.curvature import Bernoulli, Categorical, Gaussian
from lapkit.posteriors import LINKS, FunctionDistribution, expected_sigmoid, monte_carlo, quasi_monte_carlo
from lapkit.posteriors.bridge import bridge, bridge_norm
from lapkit.posteriors.quadrature import gauss_hermite
from lapkit.posteriors.sampling import covariance_root, sobol_normal
from lapkit.posteriors.softmax import mean_field, probit, probit_centered

CLOSED = {
    "probit": probit,
    "probit_centered": probit_centered,
    "mean_field": mean_field,
    "bridge": bridge,
    "bridge_norm": bridge_norm,
}
PAIRWISE = ("probit_centered", "mean_field", "gauss_hermite")  # exact, or MacKay's formula, for a difference
SEES_DIFFERENCES_ONLY = ("probit_centered", "mean_field")


def softmax(z):
    return z.softmax(-1)


def ask(link, f, likelihood=None, n_samples=64):
    return LINKS[link](likelihood or Categorical(), f, n_samples, torch.Generator().manual_seed(3))


def classes_of(link):
    return 2 if link == "gauss_hermite" else 3


# -- against the truth


@pytest.mark.parametrize(
    ("kind", "classes", "expected"),
    [  # the table at the top of posteriors/softmax.py: probit, probit_centered, mean_field, bridge, bridge_norm
        ("independent", 2, (0.017, 0.003, 0.003, 0.040, 0.083)),
        ("independent", 10, (0.015, 0.015, 0.048, 0.149, 0.191)),
        ("full", 3, (0.033, 0.024, 0.015, 0.305, 0.285)),
        ("common", 3, (0.152, 0.010, 0.006, 0.196, 0.181)),
        ("common", 10, (0.267, 0.024, 0.021, 0.234, 0.327)),
    ],
)
def test_closed_forms_err_as_documented(kind, classes, expected):
    f = random(200, classes=classes)
    covariance = {"independent": torch.eye(classes).expand(200, -1, -1), "full": f.covariance}.get(kind)
    f = FunctionDistribution(f.mean, 10 + 0.3 * f.covariance if covariance is None else covariance)
    truth = ask("qmc", f, n_samples=4096)
    for function, value in zip(CLOSED.values(), expected, strict=True):
        error = (function(f.mean, f.covariance) - truth).abs().sum(-1).mean() / 2
        assert float(error) == pytest.approx(value, rel=0.2, abs=0.001), function.__name__


def test_quasi_monte_carlo_agrees_with_a_dense_grid_and_beats_independent_draws():
    """At 128 samples its root mean squared error is a fifth of theirs: it is worth 25 times as many."""
    f = random(10)
    truth = on_grid(softmax, f)
    errors = {
        link: torch.stack([link(Categorical(), f, 128, torch.Generator().manual_seed(s)) - truth for s in range(12)])
        for link in (monte_carlo, quasi_monte_carlo)
    }
    mean_squares = {link: float(e.square().mean()) for link, e in errors.items()}
    assert mean_squares[quasi_monte_carlo] * 25 < mean_squares[monte_carlo]
    assert (quasi_monte_carlo(Categorical(), f, 2**13) - truth).abs().max() < 2e-4


def test_quasi_monte_carlo_is_right_on_average():
    """Over scramblings there is no bias: a mean of 64 lies within five standard errors of the truth."""
    f = random(4)
    truth = on_grid(softmax, f)
    answers = torch.stack([quasi_monte_carlo(Categorical(), f, 8, torch.Generator().manual_seed(s)) for s in range(64)])
    error = answers.std(0) / 64**0.5
    assert ((answers.mean(0) - truth).abs() < 5 * error).all()


def test_the_dense_grid_agrees_with_adaptive_integration():
    """Three classes over the two differences of their logits, by scipy."""
    f = random(1)
    D = torch.tensor([[-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]])
    differences = multivariate_normal(D @ f.mean[0], D @ f.covariance[0] @ D.T)
    reach = 9 * float(differences.cov.diagonal().max()) ** 0.5
    (a, b) = differences.mean

    def first(v, u):  # the first class's probability, times the density
        return differences.pdf((u, v)) / (1 + math.exp(u) + math.exp(v))

    value, _ = dblquad(first, a - reach, a + reach, b - reach, b + reach, epsabs=1e-6)
    assert float(on_grid(softmax, f)[0, 0]) == pytest.approx(value, abs=2e-6)


def test_gauss_hermite_is_exact():
    f = random(6, classes=2)
    torch.testing.assert_close(gauss_hermite(f.mean, f.covariance), on_grid(softmax, f, 100), rtol=0, atol=1e-6)
    yes = ask("gauss_hermite", f, Bernoulli())
    torch.testing.assert_close(yes, expected_sigmoid(f.mean, f.variance), rtol=1e-12, atol=0)


# -- limits


@pytest.mark.parametrize("link", LINKS)
def test_without_variance_every_link_is_the_softmax(link):
    C = classes_of(link)
    mean = 3 * torch.randn(5, C)
    certain = FunctionDistribution(mean, torch.zeros(5, C, C))
    torch.testing.assert_close(ask(link, certain), mean.softmax(-1), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(ask(link, certain, Bernoulli()), mean.sigmoid(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_logits_overflow_nowhere(link, dtype):
    C = classes_of(link)
    mean = torch.zeros(3, C, dtype=dtype)
    mean[0, 1], mean[1, 0], mean[2, 1] = 1e4, -1e4, 80.0
    f = FunctionDistribution(mean, torch.eye(C, dtype=dtype).expand(3, C, C))
    p = ask(link, f)
    assert p.dtype == dtype
    assert torch.isfinite(p).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(3, dtype=dtype))
    assert float(p[0, 1]) == 1
    assert float(p[1, 0]) < 0.2 and p[1, 0] < p[1, 1]  # noqa: PT018


@pytest.mark.parametrize("link", LINKS)
def test_a_singular_covariance_is_welcome(link):
    """Of rank one, as of a single random weight; and as certain as the sum of its logits lets it be."""
    C = classes_of(link)
    v = torch.tensor([2.0, -1.5, 0.5])[:C]
    v = v - v.mean()  # the sum is certain: else the bridge would not exist
    f = FunctionDistribution(torch.randn(1, C), torch.outer(v, v)[None])
    p = ask(link, f, n_samples=4096)
    assert torch.isfinite(p).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(1))
    if link in ("qmc", "gauss_hermite"):
        x = torch.arange(-9, 9, 1e-3)[:, None]
        truth = ((f.mean + x * v).softmax(-1) * torch.exp(-x.square() / 2)).sum(0) * 1e-3 / math.sqrt(2 * math.pi)
        torch.testing.assert_close(p[0], truth, rtol=0, atol=2e-4)


def test_the_root_of_one_covariance_does_not_depend_on_the_others():
    """A dead unit in one input changes nothing for the rest."""
    f = random(3)
    alone = covariance_root(f.covariance)
    together = covariance_root(torch.cat([f.covariance, torch.zeros(1, 3, 3)]))
    assert torch.equal(together[:3], alone)
    assert not together[3].any()
    low = torch.diag(torch.tensor([1.0, 0.0, 2.0]))
    torch.testing.assert_close(covariance_root(low) @ covariance_root(low).mT, low)


# -- what links have in common


@pytest.mark.parametrize("link", LINKS)
def test_probabilities_sum_to_one_and_positions_are_inputs(link):
    f = random(2, 4, classes=classes_of(link))
    flat = FunctionDistribution(f.mean.flatten(0, 1), f.covariance.flatten(0, 1))
    p = ask(link, f, n_samples=4)
    assert p.shape == f.mean.shape
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 4))
    if link != "mc":  # whose draws are independent between inputs, in another order
        torch.testing.assert_close(p.flatten(0, 1), ask(link, flat, n_samples=4), rtol=1e-12, atol=0)
    assert ask(link, f, Bernoulli(), n_samples=4).shape == f.mean.shape


@pytest.mark.parametrize("link", SEES_DIFFERENCES_ONLY)
def test_what_all_logits_have_in_common_changes_nothing(link):
    f = random(5, classes=4)
    u, level = torch.randn(5, 4, 1), torch.randn(5, 1)
    shifted = FunctionDistribution(f.mean + level, f.covariance + u + u.mT + 10)
    torch.testing.assert_close(
        CLOSED[link](shifted.mean, shifted.covariance + 20 * torch.eye(4)),
        CLOSED[link](f.mean, f.covariance + 20 * torch.eye(4)),
        rtol=1e-10,
        atol=0,
    )


@pytest.mark.parametrize("link", PAIRWISE)
def test_two_classes_are_yes_or_no_of_the_difference(link):
    f = random(6, classes=2)
    gap = torch.tensor([-1.0, 1.0])
    binary = FunctionDistribution(
        (f.mean @ gap)[:, None], torch.einsum("c,ncd,d->n", gap, f.covariance, gap)[:, None, None]
    )
    yes = ask(link, binary, Bernoulli())
    torch.testing.assert_close(ask(link, f)[:, 1:], yes, rtol=1e-12, atol=0)
    if link != "gauss_hermite":
        torch.testing.assert_close(yes, ask("probit", binary, Bernoulli()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("link", CLOSED)
def test_classes_may_be_numbered_in_any_order(link):
    f, order = random(5, classes=4), torch.tensor([2, 0, 3, 1])
    other = CLOSED[link](f.mean[:, order], f.covariance[:, order][:, :, order])
    torch.testing.assert_close(other, CLOSED[link](f.mean, f.covariance)[:, order], rtol=1e-10, atol=0)


@pytest.mark.parametrize("link", LINKS)
def test_float32_agrees_with_float64(link):
    f = random(20, classes=classes_of(link))
    f = FunctionDistribution(f.mean, f.covariance + torch.eye(f.mean.shape[-1]))
    single = FunctionDistribution(f.mean.float(), f.covariance.float())
    if link == "mc":  # draws of another type are other draws
        assert ask(link, single).dtype == torch.float32
    else:
        torch.testing.assert_close(ask(link, single).double(), ask(link, f), rtol=0, atol=2e-5)


@pytest.mark.parametrize("link", LINKS)
def test_derivatives(link):
    f = random(2, classes=classes_of(link))
    root = torch.linalg.cholesky(f.covariance).requires_grad_()
    mean = f.mean.clone().requires_grad_()

    def probabilities(mean, root):
        return ask(link, FunctionDistribution(mean, root @ root.mT), n_samples=8)

    assert gradcheck(probabilities, (mean, root), fast_mode=True)


@pytest.mark.parametrize("link", ["probit", "probit_centered", "mean_field", "gauss_hermite"])
def test_derivatives_exist_without_variance(link):
    C = classes_of(link)
    mean, covariance = torch.randn(2, C, requires_grad=True), torch.zeros(2, C, C, requires_grad=True)
    p = ask(link, FunctionDistribution(mean, covariance))
    for gradient in torch.autograd.grad(p[:, 0].sum(), (mean, covariance)):
        assert torch.isfinite(gradient).all()


def test_the_generator_is_the_only_randomness_of_the_scrambling():
    f = random(3)
    first = ask("qmc", f)
    torch.manual_seed(99)
    assert torch.equal(first, ask("qmc", f))
    assert not torch.equal(first, quasi_monte_carlo(Categorical(), f, 64, torch.Generator().manual_seed(4)))
    torch.manual_seed(1)
    without = quasi_monte_carlo(Categorical(), f, 64)
    torch.manual_seed(1)
    assert torch.equal(without, quasi_monte_carlo(Categorical(), f, 64))


def test_many_inputs_are_taken_in_pieces(monkeypatch):
    f = random(7)
    whole = ask("qmc", f)
    monkeypatch.setattr("lapkit.posteriors.links.PIECE", 3 * 64 * 2)
    torch.testing.assert_close(ask("qmc", f), whole, rtol=1e-14, atol=0)
    empty = FunctionDistribution(torch.zeros(0, 3), torch.zeros(0, 3, 3))
    assert ask("qmc", empty).shape == (0, 3)


def test_sobol_points_are_normal():
    z = sobol_normal(4096, 5, torch.Generator().manual_seed(0))
    assert torch.isfinite(z).all()
    torch.testing.assert_close(z.mean(0), torch.zeros(5), rtol=0, atol=2e-3)
    torch.testing.assert_close(z.T @ z / 4096, torch.eye(5), rtol=0, atol=1e-2)


def test_the_outermost_sobol_points_have_quantiles(monkeypatch):
    """Zero, and the largest number below one that the sequence has."""

    class Outermost:
        MAXDIM = 1

        def __init__(self, dimension, scramble, seed):
            pass

        def draw(self, n, dtype):
            return torch.tensor([[0.0], [1 - 2.0**-30]], dtype=dtype)

    monkeypatch.setattr("lapkit.posteriors.sampling.SobolEngine", Outermost)
    low, high = sobol_normal(2, 1)[:, 0].tolist()
    assert low == pytest.approx(-high)
    assert 6 < high < 7


# -- what is refused


@pytest.mark.parametrize("function", [*CLOSED.values(), gauss_hermite], ids=lambda function: function.__name__)
def test_bad_gaussians(function):
    mean, eye = torch.zeros(1, 2), torch.eye(2)[None]
    with pytest.raises(ValueError, match=r"got \(1, 2\) and \(1, 3, 3\)"):
        function(mean, torch.eye(3)[None])
    with pytest.raises(ValueError, match=r"by torch.diag_embed"):
        function(mean, torch.ones(1, 2))
    with pytest.raises(ValueError, match="The mean of the outputs holds NaN"):
        function(mean * float("nan"), eye)
    with pytest.raises(ValueError, match="The covariance of the outputs holds NaN"):
        function(mean, eye * float("nan"))
    with pytest.raises(ValueError, match=r"not symmetric: entries differ from their mirror images by up to 0\.5"):
        function(mean, eye + torch.tensor([[0.0, 0.5], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="A variance is negative, -1"):
        function(mean, -eye)
    with pytest.raises(ValueError, match="needs at least two classes"):
        function(torch.zeros(1, 1), torch.ones(1, 1, 1))
    with pytest.raises(TypeError, match=r"one floating type, got torch\.int64"):
        function(mean.long(), eye)


def test_an_indefinite_covariance_has_no_root():
    f = FunctionDistribution(torch.zeros(1, 2), torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]))
    with pytest.raises(ValueError, match="indefinite: it has an eigenvalue -1"):
        ask("qmc", f)


def test_quadrature_is_for_two_classes():
    with pytest.raises(ValueError, match="Quadrature over 3 logits"):
        ask("gauss_hermite", random(2))


@pytest.mark.parametrize("link", sorted(set(LINKS) - {"probit", "mc", "qmc"}))
def test_links_of_classes_refuse_other_targets(link):
    with pytest.raises(TypeError, match=r"for class probabilities; Gaussian has none\. Use 'probit'"):
        ask(link, random(2, classes=2), Gaussian())


def test_every_link_that_takes_samples_needs_one():
    for link in ("mc", "qmc"):
        with pytest.raises(ValueError, match="at least one sample, got n_samples=0"):
            ask(link, random(2), n_samples=0)


def test_too_many_outputs_for_sobol():
    with pytest.raises(ValueError, match="1 to 21201 outputs, got 30000"):
        sobol_normal(2, 30_000)
