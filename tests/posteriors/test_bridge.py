"""The Laplace bridge: its defining identities, the peer's numbers, and what the peer answers wrongly."""

import math

import pytest
import torch
from gaussian_outputs import random
from torch.distributions import Dirichlet

from lapkit.curvature import Bernoulli, Categorical, Gaussian, Poisson
from lapkit.posteriors import FunctionDistribution, class_distribution, dirichlet, laplace_bridge, predictive
from lapkit.posteriors.bridge import bridge, bridge_norm


def curvature_at_mode(concentration):
    """Mode, and inverse of the Hessian, of a Dirichlet's log density over logits that sum to zero, by autograd."""
    C = len(concentration)
    basis = torch.linalg.qr(torch.eye(C) - 1 / C)[0][:, : C - 1]  # of the plane of such logits

    def log_density(u):  # the Jacobian of the softmax turns exponents a - 1 into a
        return (concentration * (basis @ u).log_softmax(-1)).sum()

    logs = concentration.log()
    mode = logs - logs.mean()
    u = basis.T @ mode
    gradient = torch.autograd.functional.jacobian(log_density, u)
    assert gradient.abs().max() < 1e-10
    hessian = torch.autograd.functional.hessian(log_density, u)
    return mode, basis @ torch.linalg.inv(-hessian) @ basis.T


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_it_inverts_the_laplace_approximation_of_a_dirichlet(classes):
    concentration = 0.2 + 5 * torch.rand(classes)
    mode, covariance = curvature_at_mode(concentration)
    torch.testing.assert_close(laplace_bridge(mode, covariance).concentration, concentration, rtol=1e-8, atol=0)
    torch.testing.assert_close(bridge(mode, covariance), concentration / concentration.sum(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("normalise", [False, True])
def test_mean_and_distribution_agree(normalise):
    f = random(2, 5, classes=4)
    ours = laplace_bridge(f.mean, f.covariance, normalise=normalise)
    assert ours.batch_shape == (2, 5)
    mean = (bridge_norm if normalise else bridge)(f.mean, f.covariance)
    torch.testing.assert_close(ours.mean, mean, rtol=1e-12, atol=0)
    assert torch.equal(dirichlet(Categorical(), f, normalise=normalise).concentration, ours.concentration)


def test_moments_are_those_of_samples():
    f = random(2)
    ours, S = laplace_bridge(f.mean, f.covariance), 200_000
    torch.manual_seed(1)
    draws = ours.sample((S,))
    assert ((draws.mean(0) - ours.mean).abs() < 5 * (ours.variance / S).sqrt()).all()
    torch.testing.assert_close(draws.var(0), ours.variance, rtol=0.05, atol=0)


def test_yes_or_no_is_a_beta_with_the_logits_variance():
    """Its mean is the sigmoid itself: the bridge is blind there."""
    f = random(4, classes=2)
    ours = dirichlet(Bernoulli(), f)
    assert ours.batch_shape == (4, 2)
    torch.testing.assert_close(ours.mean[..., 1], f.mean.sigmoid(), rtol=1e-12, atol=0)
    no, yes = ours.concentration.unbind(-1)
    torch.testing.assert_close(1 / no + 1 / yes, f.variance, rtol=1e-12, atol=0)  # of a Beta's logit, at its mode


def test_normalisation_sharpens_narrow_gaussians():
    """The warning in the text, in numbers."""
    mean, eye = torch.tensor([1.0, 0.0, -1.0]), torch.eye(3)
    plain = float(mean.softmax(-1).max())
    assert float(bridge_norm(mean, 0.05 * eye).max()) > 0.99 > plain
    assert float(bridge_norm(mean, 10 * eye).max()) < plain


def test_far_too_sharp_probabilities_are_warned_of():
    """Logits times `1 / sqrt(c)`, c = V (1 - 1/C) / sqrt(C / 2); without variance it is the softmax, and fine."""
    mean, eye = torch.tensor([1.0, 0.0, -1.0]), torch.eye(3)
    edge = 0.01 * math.sqrt(1.5) * 3 / 2
    bridge_norm(mean, 1.01 * edge * eye)
    bridge(mean, 1e-9 * eye)
    torch.testing.assert_close(bridge_norm(mean, 0 * eye), mean.softmax(-1))
    for function in (bridge_norm, lambda m, V: laplace_bridge(m, V, normalise=True).mean):
        with pytest.warns(UserWarning, match="more than 10 times as large.*'qmc'") as record:
            found = function(mean.expand(2, 3), torch.stack([eye, 1e-6 * eye]))
        assert record[0].filename == __file__
        assert float(found[1].max()) == 1 > float(found[0].max())


# -- the peer


@pytest.fixture
def theirs():
    """Their prediction from given mean and covariance."""
    peer = pytest.importorskip("laplace")
    la = peer.Laplace(torch.nn.Linear(1, 1), "classification", "all", "diag")

    def predict(link, mean, covariance):
        la._glm_predictive_distribution = lambda x, **_: (mean.clone(), covariance.clone())
        return la._glm_forward_call(torch.zeros(1), "classification", link_approx=link)

    return predict


@pytest.mark.peer("laplace")
@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.filterwarnings("ignore:The normalised Laplace bridge")
@pytest.mark.parametrize("link", ["bridge", "bridge_norm"])
def test_the_peers_numbers(theirs, link, classes):
    f = random(50, classes=classes, scale=4)
    ours = {"bridge": bridge, "bridge_norm": bridge_norm}[link](f.mean, f.covariance)
    torch.testing.assert_close(ours, theirs(link, f.mean, f.covariance), rtol=1e-9, atol=1e-14)


WRONG_THERE = {  # mean and covariance; the answer is the softmax of the mean
    "no variance": ([1.0, 0.0, -1.0], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
    "huge logits": ([1e4, 0.0, 0.0], [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
    "a certain sum": ([1.0, 0.0], [[1.0, -1.0], [-1.0, 1.0]]),
}


@pytest.mark.parametrize("case", WRONG_THERE)
def test_right_where_the_peer_is_not(case):
    mean, covariance = (torch.tensor(v) for v in WRONG_THERE[case])
    torch.testing.assert_close(bridge(mean, covariance), mean.softmax(-1), rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(laplace_bridge(mean, covariance).mean, mean.softmax(-1), rtol=1e-12, atol=1e-200)


@pytest.mark.peer("laplace")
@pytest.mark.parametrize("case", WRONG_THERE)
def test_the_peer_is_still_wrong_there(theirs, case):
    """Ones for probabilities. Should this fail, the text of `laplace_bridge` has become unfair."""
    mean, covariance = (torch.tensor([v]) for v in WRONG_THERE[case])
    assert float(theirs("bridge", mean, covariance).sum()) != pytest.approx(1)


def test_a_certain_sum_is_the_limit_of_conditioning():
    f = random(1, classes=4)
    H = torch.eye(4) - 1 / 4
    blind = H @ f.covariance @ H
    near = blind + 1e-7
    torch.testing.assert_close(bridge(f.mean, blind), bridge(f.mean, near), rtol=1e-5, atol=0)
    torch.testing.assert_close(bridge_norm(f.mean, blind), bridge_norm(f.mean + 3, blind), rtol=1e-10, atol=0)


def test_where_it_does_not_exist():
    """One logit without variance, or one random weight only, which the sum of the logits determines."""
    dead = torch.diag(torch.tensor([1.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match="does not exist for input 1: given that the logits sum to zero, logit 2"):
        bridge(torch.zeros(2, 3), torch.stack([torch.eye(3), dead]))
    v = torch.tensor([1.0, 2.0, 4.0])
    with pytest.raises(ValueError, match="Use another link: 'probit_centered', 'mean_field' or 'qmc'"):
        laplace_bridge(torch.zeros(3), torch.outer(v, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_concentrations_are_still_a_distribution(dtype):
    mean = torch.tensor([[500.0, 0.0, -500.0], [0.0, 1.0, 2.0]], dtype=dtype)
    covariance = torch.stack([torch.eye(3, dtype=dtype), 1e-30 * torch.eye(3, dtype=dtype)])
    ours = laplace_bridge(mean, covariance)
    assert isinstance(ours, Dirichlet)
    assert torch.isfinite(ours.concentration).all()
    torch.testing.assert_close(ours.mean, bridge(mean, covariance))
    assert float(ours.variance.max()) < 1e-6


# -- distributions of targets


def test_classes_by_a_link_of_choice():
    f = random(2, 4)
    y = predictive(Categorical(), f, lambda likelihood, f, n_samples, generator: bridge(f.mean, f.covariance))
    assert isinstance(y, torch.distributions.Categorical)
    assert y.batch_shape == (2, 4)
    torch.testing.assert_close(y.probs, bridge(f.mean, f.covariance))
    torch.testing.assert_close(predictive(Categorical(), f).probs, Categorical().expectation(f.mean, f.covariance))


def test_one_logit_is_one_event():
    f = FunctionDistribution(torch.tensor([[0.3], [-2.0]]), torch.tensor([[[1.0]], [[4.0]]]))
    p = Bernoulli().expectation(f.mean, f.covariance)
    for y in (predictive(Bernoulli(), f), class_distribution(Bernoulli(), p)):
        assert (y.batch_shape, y.event_shape) == ((2,), (1,))
        torch.testing.assert_close(y.log_prob(torch.ones(2, 1)), p[:, 0].log())
    assert dirichlet(Bernoulli(), f).batch_shape == (2, 1)


def test_one_real_target():
    f = FunctionDistribution(torch.tensor([[0.3], [-2.0]]), torch.tensor([[[0.0]], [[4.0]]]))
    y = predictive(Gaussian(2.0), f)
    assert (y.batch_shape, y.event_shape) == ((2,), (1,))
    wanted = torch.distributions.Normal(f.mean[:, 0], torch.tensor([4.0, 8.0]).sqrt()).log_prob(torch.zeros(2))
    torch.testing.assert_close(y.log_prob(torch.zeros(2, 1)), wanted)


def test_a_mean_does_not_make_the_distribution_of_counts():
    f = random(2, classes=1)
    with pytest.raises(TypeError, match=r"under Poisson\. Use the link 'probit'"):
        class_distribution(Poisson(), f.mean.exp())
    with pytest.raises(TypeError, match="Poisson has none"):
        dirichlet(Poisson(), f)
    assert math.prod(predictive(Poisson(), f).batch_shape) == 2
