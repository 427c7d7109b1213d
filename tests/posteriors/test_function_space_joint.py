"""Joint predictions as Bayesian optimisation asks for them: shapes, gradients in the inputs, draws and noise."""

import subprocess
import sys

import gpytorch
import pytest
import torch
from dense_laplace import NETS, problem, untouched
from torch import Size, nn

from lapkit.curvature import Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian, PerOutputGaussian
from lapkit.posteriors import GaussianPrior
from lapkit.posteriors.function_space import JointPosterior, laplace_gp, rows


def process(outputs=2, likelihood=None):
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, outputs))
    data = [(torch.randn(7, 3), torch.randn(7, outputs))]
    return laplace_gp(model, Gaussian(0.4) if likelihood is None else likelihood, data, GaussianPrior(0.9))


@pytest.mark.parametrize("outputs", [1, 2])
def test_shapes_and_values_over_a_batch(outputs):
    gp = process(outputs)
    X = torch.randn(2, 5, 4, 3)
    with untouched(gp.tangents.engine.model):
        posterior = gp.posterior(X)
    assert posterior.mean.shape == posterior.variance.shape == posterior.base_sample_shape == (2, 5, 4, outputs)
    assert (posterior.batch_shape, posterior.event_shape) == ((2, 5), (4, outputs))
    assert posterior.rsample(Size([6])).shape == posterior._extended_shape(Size([6])) == (6, 2, 5, 4, outputs)
    assert (gp.num_outputs, gp.batch_shape) == (outputs, ())
    for i in range(2):
        alone = gp.joint(X[i, 3])
        torch.testing.assert_close(posterior.mean[i, 3], alone.mean)
        torch.testing.assert_close(posterior.covariance[i, 3], alone.covariance)
    found = gp(X)
    torch.testing.assert_close(found.covariance_matrix, posterior.covariance)
    one = gp.posterior(X[:, :, :1])
    torch.testing.assert_close(one.variance, posterior.variance[:, :, :1])
    kind = gpytorch.distributions.MultitaskMultivariateNormal
    assert isinstance(posterior.distribution, kind) == isinstance(found, kind) == (outputs > 1)
    with gpytorch.settings.min_variance(double_value=1e-30):
        torch.testing.assert_close(
            posterior.distribution.variance.reshape((*X.shape[:-1], outputs)), posterior.variance
        )


@pytest.mark.parametrize(
    "likelihood", [Gaussian(0.4), Categorical(), Bernoulli()], ids=lambda found: type(found).__name__
)
def test_gradients_in_the_inputs(likelihood):
    kind = {"Gaussian": "regression", "Categorical": "classification", "Bernoulli": "binary"}[type(likelihood).__name__]
    case = problem(kind)
    gp = laplace_gp(case.model, likelihood, case.data, GaussianPrior(torch.rand(6) + 0.5))
    X = case.new_x.reshape(2, 2, 3).clone().requires_grad_()

    def moments(X):
        posterior = gp.posterior(X)
        return posterior.mean, posterior.variance, posterior.covariance

    with torch.no_grad():
        plain = moments(X)
    for one, two in zip(moments(X), plain, strict=True):
        torch.testing.assert_close(one.detach(), two, rtol=1e-9, atol=1e-11)
    assert torch.autograd.gradcheck(moments, X, atol=1e-6)


@pytest.mark.parametrize("net", NETS)
def test_gradients_where_the_observations_stay_factored(net, monkeypatch):
    monkeypatch.setattr(rows, "SMALL", 0)
    case = problem("classification", net)
    gp = laplace_gp(case.model, Categorical(), case.data, GaussianPrior(torch.rand(len(case.all)) + 0.5))
    X = case.new_x[:1].flatten(1).clone().requires_grad_()
    torch.testing.assert_close(gp.posterior(X).covariance.detach(), gp.posterior(X.detach()).covariance)
    assert torch.autograd.gradcheck(lambda X: gp.posterior(X).covariance, X, atol=1e-6)


def test_gradients_through_convolutions_and_priors_of_each_weight():
    case = problem("classification", "cnn")
    gp = laplace_gp(case.model, Categorical(), case.data, GaussianPrior(torch.rand(sum(case.sizes())) + 0.5))
    X = case.new_x[:1].flatten(1).clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda X: (gp.posterior(X).variance, gp.posterior(X).mean), X, atol=1e-6)
    assert all(p.grad is None for p in case.model.parameters())


def test_more_rows_than_weights_have_gradients_too():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    gp = laplace_gp(model, Gaussian(0.2), [(torch.randn(40, 2), torch.randn(40, 1))])
    assert len(gp.observations) == 13
    X = torch.randn(2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda X: gp.posterior(X).covariance, X, atol=1e-6)


def test_an_acquisition_function_climbs():
    """Expected improvement written out, by gradients in the inputs; the training data have none of it."""
    gp = process(1)
    X = torch.zeros(1, 1, 3, requires_grad=True)
    normal = torch.distributions.Normal(0.0, 1.0)

    def improvement():
        posterior = gp.posterior(X)
        sigma = posterior.variance.sqrt()
        z = (posterior.mean - 0.5) / sigma
        return (sigma * (normal.log_prob(z).exp() + z * normal.cdf(z))).sum()

    start = improvement().item()
    optimiser = torch.optim.Adam([X], lr=0.05)
    for _ in range(10):
        optimiser.zero_grad()
        (-improvement()).backward()
        optimiser.step()
    assert improvement().item() > start


def test_draws():
    gp = process(2)
    posterior = gp.posterior(torch.randn(3, 3))
    draws = posterior.rsample(Size([20000]), generator=torch.Generator().manual_seed(0)).flatten(1)
    torch.testing.assert_close(draws.mean(0), posterior.mean.flatten(), rtol=0, atol=0.1)
    scale = posterior.covariance.diagonal().max()
    torch.testing.assert_close(draws.T.cov() / scale, posterior.covariance / scale, rtol=0, atol=0.05)
    again = posterior.sample(Size([20000]), generator=torch.Generator().manual_seed(0)).flatten(1)
    torch.testing.assert_close(again, draws)
    base = torch.randn(5, 3, 2)
    found = posterior.rsample_from_base_samples(Size([5]), base)
    root = torch.linalg.cholesky(posterior.covariance)
    torch.testing.assert_close(found, posterior.mean + (base.flatten(1) @ root.T).reshape(5, 3, 2))
    with pytest.raises(ValueError, match="base samples"):
        posterior.rsample_from_base_samples(Size([5]), torch.randn(4, 3, 2))
    assert posterior.rsample().shape == (1, 3, 2)


def test_draws_have_gradients():
    gp = process(1)
    X, base = torch.randn(2, 3).requires_grad_(), torch.randn(4, 2, 1)
    assert torch.autograd.gradcheck(lambda X: gp.posterior(X).rsample_from_base_samples(Size([4]), base), X, atol=1e-6)


def test_observation_noise():
    X = torch.randn(2, 3, 3)
    gp = process(2)
    plain, noisy = gp.posterior(X), gp.posterior(X, observation_noise=True)
    torch.testing.assert_close(noisy.covariance - plain.covariance, 0.16 * torch.eye(6).expand(2, 6, 6))
    gp = process(2, PerOutputGaussian(torch.tensor([0.3, 0.6]), scale=2.0))
    found = gp.posterior(X, observation_noise=True).variance - gp.posterior(X).variance
    torch.testing.assert_close(found, torch.tensor([0.36, 1.44]).expand(2, 3, 2))
    tempered = laplace_gp(
        gp.tangents.engine.model, Gaussian(0.5), [(torch.randn(4, 3), torch.randn(4, 2))], temperature=0.3
    )
    found = tempered.posterior(X, observation_noise=True).variance - tempered.posterior(X).variance
    torch.testing.assert_close(found, torch.full((2, 3, 2), 0.25))
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    for likelihood, y in ((Categorical(), torch.arange(4) % 2), (HeteroscedasticGaussian(), torch.randn(4, 1))):
        with pytest.raises(ValueError, match="observation_noise"):
            laplace_gp(model, likelihood, [(x, y)]).posterior(X, observation_noise=True)


def test_some_outputs_and_a_transform():
    gp, X = process(3), torch.randn(4, 2, 3)
    whole, some = gp.posterior(X), gp.posterior(X, output_indices=[2, 0])
    torch.testing.assert_close(some.mean, whole.mean[..., [2, 0]])
    torch.testing.assert_close(some.variance, whole.variance[..., [2, 0]])
    torch.testing.assert_close(some.covariance[:, 0, 3], whole.covariance[:, 2, 3])
    assert gp.posterior(X, posterior_transform=lambda p: p.mean.sum()) == whole.mean.sum()
    with pytest.raises(IndexError, match="0 to 2"):
        gp.posterior(X, output_indices=[3])


def test_refusals():
    gp = process(1)
    for x in (torch.randn(3), "x"):
        with pytest.raises(ValueError, match="q, D"):
            gp.posterior(x)
    with pytest.raises(ValueError, match="covariance"):
        JointPosterior(torch.zeros(2, 1), torch.eye(3))


def test_without_gpytorch_the_matrix_remains_and_the_rest_says_what_to_install(tmp_path):
    program = """
import sys
import torch
import lapkit, lapkit.posteriors, lapkit.posteriors.function_space as space
assert "gpytorch" not in sys.modules
sys.modules["gpytorch"] = None
print(space.neural_tangent_kernel(torch.nn.Linear(2, 1), torch.zeros(1, 2)).item())
try:
    space.laplace_gp
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "1.0"
    assert "pip install 'lapkit[gp]'" in done.stdout
