"""The two parts of uncertainty: against dense grids, samples and closed forms of distributions."""

import math

import pytest
import torch
from gaussian_outputs import entropy, on_grid, random
from torch.autograd import gradcheck
from torch.distributions import Dirichlet

from lapkit.curvature import (
    Bernoulli,
    Categorical,
    FromLogProb,
    Gaussian,
    HeteroscedasticGaussian,
    PerOutputGaussian,
    Poisson,
)
from lapkit.posteriors import (
    FunctionDistribution,
    dirichlet,
    uncertainty,
    uncertainty_of_dirichlet,
    uncertainty_of_logit,
    uncertainty_of_samples,
)


def close(ours, aleatoric, total, **tolerance):
    torch.testing.assert_close(ours.aleatoric, aleatoric, **tolerance)
    torch.testing.assert_close(ours.total, total, **tolerance)
    torch.testing.assert_close(ours.epistemic, total - aleatoric, **tolerance)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -- classes


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_classes_agree_with_a_dense_grid(scale):
    f = random(6, scale=scale)
    p = on_grid(lambda z: z.softmax(-1), f)
    aleatoric = on_grid(lambda z: entropy(z.softmax(-1)), f)
    close(uncertainty(Categorical(), f, 2**13, generator()), aleatoric, entropy(p), rtol=0, atol=2e-4 * (1 + scale))


def test_classes_agree_with_a_million_draws():
    """To five standard errors: of the mean entropy, and of the mean p, which moves the total by its gradient."""
    f = random(1, classes=5, scale=3)
    S = 1_000_000
    p = f.sample(S, generator())[:, 0].softmax(-1)
    H = entropy(p)
    ours = uncertainty(Categorical(), f, 2**14, generator(1))
    assert abs(float(ours.aleatoric[0] - H.mean())) < 5 * float(H.std()) / S**0.5
    surprise = p @ -p.mean(0).log()
    assert abs(float(ours.total[0] - entropy(p.mean(0)))) < 5 * float(surprise.std()) / S**0.5


def test_two_classes_are_yes_or_no_of_the_difference():
    f = random(2, 4, classes=2, scale=4)
    gap = torch.tensor([-1.0, 1.0])
    ours = uncertainty(Categorical(), f)
    assert ours.total.shape == (2, 4)
    yes = uncertainty_of_logit(f.mean @ gap, torch.einsum("c,ntcd,d->nt", gap, f.covariance, gap))
    torch.testing.assert_close(ours.epistemic, yes.epistemic, rtol=0, atol=1e-14)
    draws = f.sample(100_000, generator()).log_softmax(-1)
    by_samples = uncertainty_of_samples(draws)
    close(ours, by_samples.aleatoric, by_samples.total, rtol=0, atol=5 * 0.7 / 100_000**0.5)


def test_yes_or_no_for_each_logit():
    f = random(3, 2)
    ours = uncertainty(Bernoulli(), f)
    assert ours.total.shape == (3, 2, 3)
    one = FunctionDistribution(f.mean[:, :1, 2].contiguous(), f.covariance[:, :1, 2:, 2])
    torch.testing.assert_close(uncertainty(Bernoulli(), one).epistemic, ours.epistemic[:, :1, 2])


def test_a_wild_logit_is_a_coin_whose_side_the_weights_know():
    """Variance without end: the answer is certain given the weights, and says which with probability one half."""
    ours = uncertainty_of_logit(torch.zeros(1), torch.full((1,), 1e12))
    assert float(ours.epistemic) == pytest.approx(math.log(2), abs=1e-5)
    assert float(ours.aleatoric) < 1e-5


def test_small_variances_teach_the_fisher_information():
    """`MI = v p (1 - p) / 2` to first order: the Hessian of the loss times the variance."""
    mean, v = torch.tensor([-2.0, 0.0, 1.0]), 1e-4
    ours = uncertainty_of_logit(mean, torch.full((3,), v))
    p = mean.sigmoid()
    torch.testing.assert_close(ours.epistemic, v * p * (1 - p) / 2, rtol=1e-3, atol=0)
    f = FunctionDistribution(torch.tensor([[1.0, 0.0, -1.0]]), v * torch.eye(3)[None])
    q = f.mean[0].softmax(-1)
    trace = v * (q * (1 - q)).sum()
    torch.testing.assert_close(
        uncertainty(Categorical(), f, 4096, generator()).epistemic[0], trace / 2, rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli()], ids=["categorical", "bernoulli"])
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_are_never_negative_and_sum_exactly(likelihood, classes, dtype):
    f = random(50, classes=classes, scale=5)
    mean, covariance = f.mean.to(dtype), f.covariance.to(dtype)
    mean[:10] *= 1e3
    covariance[:5] = 0
    covariance[5:20] *= 1e-10
    ours = uncertainty(likelihood, FunctionDistribution(mean, covariance), 32, generator())
    for part in (ours.aleatoric, ours.epistemic):
        assert part.dtype == dtype
        assert (part >= 0).all()
    assert torch.equal(ours.total, ours.aleatoric + ours.epistemic)
    assert (ours.total <= math.log(classes if ours.total.ndim == 1 else 2) * (1 + 1e-6)).all()
    assert (ours.epistemic[:5] <= 10 * torch.finfo(dtype).eps).all()


def test_float32_agrees_with_float64():
    f = random(20, scale=5)
    single = FunctionDistribution(f.mean.float(), f.covariance.float())
    for likelihood in (Categorical(), Bernoulli()):
        ours, wanted = (uncertainty(likelihood, g, 64, generator()) for g in (single, f))
        close(ours, wanted.aleatoric.float(), wanted.total.float(), rtol=0, atol=2e-5)


def test_a_small_mutual_information_has_digits_in_float32():
    mean, variance = torch.tensor([-2.0, 0.0, 1.0, 6.0]), torch.tensor([1e-4, 1e-6, 1e-3, 1e-5])
    single = uncertainty_of_logit(mean.float(), variance.float())
    wanted = uncertainty_of_logit(mean, variance)
    assert single.epistemic.dtype == single.aleatoric.dtype == torch.float32
    torch.testing.assert_close(single.epistemic.double(), wanted.epistemic, rtol=1e-5, atol=0)


def test_total_is_curved_at_an_even_chance():
    """`-1/4` without a variance: the second derivative of the entropy of a coin in its logit."""
    mean = torch.zeros(1, requires_grad=True)
    total = uncertainty_of_logit(mean, torch.zeros(1)).total.sum()
    (slope,) = torch.autograd.grad(total, mean, create_graph=True)
    assert slope == 0
    assert torch.autograd.grad(slope, mean)[0] == -0.25


def test_derivatives():
    f = random(2)
    root = torch.linalg.cholesky(f.covariance).requires_grad_()
    mean = f.mean.clone().requires_grad_()
    for likelihood in (Categorical(), Bernoulli()):

        def parts(mean, root, likelihood=likelihood):
            split = uncertainty(likelihood, FunctionDistribution(mean, root @ root.mT), 8, generator())
            return split.aleatoric, split.epistemic

        assert gradcheck(parts, (mean, root), fast_mode=True)
    sure = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    split = uncertainty_of_logit(sure, torch.tensor([1.0, 0.0, 0.0]))
    (gradient,) = torch.autograd.grad(split.total.sum(), sure)
    assert torch.isfinite(gradient).all()


# -- samples


def test_samples_of_certain_classes():
    """Two members of an ensemble that contradict each other with certainty: log 2, all of it epistemic."""
    members = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]]).log()
    ours = uncertainty_of_samples(members)
    torch.testing.assert_close(ours.epistemic, torch.tensor([math.log(2)]))
    assert float(ours.aleatoric) == 0
    agreed = uncertainty_of_samples(torch.tensor([0.2, 0.3, 0.5]).log().expand(7, 4, 3))
    torch.testing.assert_close(agreed.aleatoric, entropy(torch.tensor([0.2, 0.3, 0.5])).expand(4))
    assert (agreed.epistemic < 1e-15).all()


def test_samples_that_are_none():
    with pytest.raises(ValueError, match=r"sum to one over the last axis. Logits become such by .log_softmax"):
        uncertainty_of_samples(torch.randn(5, 2, 3))
    with pytest.raises(ValueError, match="sum to one"):
        uncertainty_of_samples(torch.full((5, 2, 3), float("nan")))
    with pytest.raises(ValueError, match=r"Expected samples \(S, ..., C\), at least one, got \(0, 3\)"):
        uncertainty_of_samples(torch.zeros(0, 3))
    with pytest.raises(TypeError, match=r"floating type, got torch\.int64"):
        uncertainty_of_samples(torch.zeros(2, 3, dtype=torch.long))


# -- Dirichlet


def test_dirichlet_agrees_with_samples_of_it():
    over = Dirichlet(torch.tensor([[0.5, 2.0, 4.0], [30.0, 10.0, 25.0], [0.05, 0.02, 0.01]]))
    S = 200_000
    torch.manual_seed(0)
    H = entropy(over.sample((S,)))
    ours = uncertainty_of_dirichlet(over)
    assert ((ours.aleatoric - H.mean(0)).abs() < 5 * H.std(0) / S**0.5).all()
    torch.testing.assert_close(ours.total, entropy(over.mean), rtol=1e-13, atol=0)


def test_dirichlet_in_closed_form():
    """The textbook's form, where it has digits: `H = digamma(a0 + 1) - sum p digamma(a + 1)`."""
    a = torch.cat([torch.rand(20, 4), 40 * torch.rand(20, 4), 19.9 + 0.2 * torch.rand(20, 4)])
    ours = uncertainty_of_dirichlet(Dirichlet(a))
    a0 = a.sum(-1, keepdim=True)
    aleatoric = torch.digamma(a0[:, 0] + 1) - (a / a0 * torch.digamma(a + 1)).sum(-1)
    close(ours, aleatoric, entropy(a / a0), rtol=0, atol=1e-13)


def test_a_sharp_dirichlet_keeps_its_digits():
    """`MI = (C - 1) / (2 a_0)` for many counts, far below the rounding of the entropies."""
    ours = uncertainty_of_dirichlet(Dirichlet(1e14 * torch.tensor([1.0, 2.0, 3.0])))
    assert float(ours.epistemic) == pytest.approx(2 / (2 * 6e14), rel=1e-8)
    certain = FunctionDistribution(torch.randn(2, 3), torch.zeros(2, 3, 3))
    split = uncertainty_of_dirichlet(dirichlet(Categorical(), certain))
    torch.testing.assert_close(split.aleatoric, entropy(certain.mean.softmax(-1)))
    assert (split.epistemic < 1e-30).all()


# -- variances


LIKELIHOODS = {
    "gaussian": (Gaussian(0.7), 3),
    "per output": (PerOutputGaussian(torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64), 1.5), 3),
    "heteroscedastic": (HeteroscedasticGaussian(), 2),
    "poisson": (Poisson(), 2),
}


def variances_of_samples(likelihood, f, S):
    """`E[Var[y|f]]` and `Var[E[y|f]]` by draws of f, from each likelihood's definition."""
    z = f.sample(S, generator())
    if isinstance(likelihood, Poisson):
        return z.exp().mean(0), z.exp().var(0)
    if isinstance(likelihood, HeteroscedasticGaussian):
        return z[..., 1:].exp().mean(0), z[..., :1].var(0)
    noise = likelihood.noise if isinstance(likelihood, Gaussian) else likelihood.noise * likelihood.scale
    return torch.as_tensor(noise**2).expand_as(f.mean), z.var(0)


@pytest.mark.parametrize("case", LIKELIHOODS)
def test_variances_are_split_by_the_law_of_total_variance(case):
    likelihood, outputs = LIKELIHOODS[case]
    f = random(4, classes=outputs, scale=0.3)
    f = FunctionDistribution(f.mean / 4, f.covariance)
    ours = uncertainty(likelihood, f)
    aleatoric, epistemic = variances_of_samples(likelihood, f, 400_000)
    torch.testing.assert_close(ours.aleatoric, aleatoric, rtol=0.01, atol=0)
    torch.testing.assert_close(ours.epistemic, epistemic, rtol=0.05, atol=0)
    predicted = likelihood.predictive(f.mean, f.covariance)
    variance = predicted.variance
    torch.testing.assert_close(ours.total, variance, rtol=1e-10, atol=0)


def test_what_is_not_split():
    with pytest.raises(TypeError, match="FromLogProb is not split in closed form"):
        uncertainty(FromLogProb(lambda f, y: -f.square().sum(-1)), random(2))
    with pytest.raises(ValueError, match="at least one sample"):
        uncertainty(Categorical(), random(2), 0)
    with pytest.raises(ValueError, match="A variance is negative"):
        uncertainty_of_logit(torch.zeros(1), -torch.ones(1))
