"""The neural tangent kernel, as a matrix and as a kernel of gpytorch, from Jacobians of autograd."""

import gpytorch
import oracles
import pytest
import torch
from dense_laplace import NETS, problem, untouched
from torch import nn

from lapkit.posteriors import GaussianPrior
from lapkit.posteriors.function_space import TangentKernel, neural_tangent_kernel


def theta(case, delta=1.0, names=None):
    columns = case.columns(names or case.all)
    J, new = case.jacobian[:, :, columns], case.new_jacobian[:, :, columns]
    prior = case.prior_diagonal(delta, names)
    return torch.einsum("ncp,mdp->ncmd", J / prior, new), torch.einsum("ncp,mdp->ncmd", J / prior, J)


def precisions(case):
    return [torch.tensor(2.0), 0.5 + torch.rand(len(case.all)), 0.5 + torch.rand(sum(case.sizes()))]


def matrix(four):
    return four.flatten(2).flatten(0, 1)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("net", NETS)
def test_the_matrix(net, which):
    case = problem("classification", net)
    delta = precisions(case)[which]
    cross, own = theta(case, delta)
    with untouched(case.model):
        found = neural_tangent_kernel(case.model, case.x, case.new_x, prior=GaussianPrior(delta))
        itself = neural_tangent_kernel(case.model, case.x, prior=GaussianPrior(delta))
    torch.testing.assert_close(found, cross, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(itself, own, rtol=1e-10, atol=1e-11)


def test_the_matrix_of_some_weights_and_in_pieces():
    case = problem("regression", "cnn")
    cross, own = theta(case, 1.0, case.head)
    torch.testing.assert_close(neural_tangent_kernel(case.model, case.x, case.new_x, parameters=["5"]), cross)
    small = neural_tangent_kernel(case.model, case.x, parameters=["5"], memory_budget=2000)
    torch.testing.assert_close(small, own)


@pytest.mark.parametrize("which", range(3))
def test_gradient_of_the_matrix_in_the_precision(which):
    case = problem("regression")
    delta = precisions(case)[which].requires_grad_()
    weights = torch.randn(4, 2, 4, 2)
    found = neural_tangent_kernel(case.model, case.new_x, prior=GaussianPrior(delta))
    (gradient,) = torch.autograd.grad((found * weights).sum(), delta)
    J, sizes = case.new_jacobian, torch.tensor(case.sizes())
    prior = delta.repeat_interleave(sizes) if delta.numel() == len(sizes) else delta.expand(int(sizes.sum()))
    (wanted,) = torch.autograd.grad((torch.einsum("ncp,mdp->ncmd", J / prior, J) * weights).sum(), delta)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-11)


def test_a_float32_network_has_a_float32_matrix():
    model = nn.Linear(2, 3).float()
    found = neural_tangent_kernel(model, torch.randn(4, 2, dtype=torch.float32))
    assert found.dtype == torch.float32
    assert found.shape == (4, 3, 4, 3)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("net", NETS)
def test_the_kernel(net, which):
    case = problem("classification", net)
    delta = precisions(case)[which]
    kernel = TangentKernel(case.model, delta, input_shape=case.x.shape[1:])
    cross, own = theta(case, delta)
    x, new = case.x.flatten(1), case.new_x.flatten(1)
    with untouched(case.model):
        lazy, itself = kernel(x, new), kernel(x)
        assert lazy.shape == (39, 12)
        torch.testing.assert_close(lazy.to_dense().detach(), matrix(cross), rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(itself.to_dense().detach(), matrix(own), rtol=1e-10, atol=1e-11)
        diagonal = kernel(x, diag=True).detach()
    torch.testing.assert_close(diagonal, matrix(own).diagonal(), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(kernel(x).diagonal().detach(), diagonal)
    torch.testing.assert_close(kernel(x)[3:9, 3:9].to_dense().detach(), matrix(own)[3:9, 3:9], rtol=1e-10, atol=1e-11)
    paired = kernel(x[:4], new, diag=True).detach()
    torch.testing.assert_close(paired, matrix(cross[:4]).diagonal(), rtol=1e-10, atol=1e-11)


def test_batches_of_inputs():
    case = problem("regression")
    kernel = TangentKernel(case.model, 0.5)
    cross, own = (matrix(m) for m in theta(case, 0.5))
    x = case.x[:12].reshape(2, 3, 2, 3)
    found = kernel(x).to_dense()
    assert found.shape == (2, 3, 4, 4)
    wanted = torch.stack([own[4 * i : 4 * i + 4, 4 * i : 4 * i + 4] for i in range(6)]).unflatten(0, (2, 3))
    torch.testing.assert_close(found.detach(), wanted)
    found = kernel(x, case.new_x).to_dense()
    torch.testing.assert_close(found.detach(), cross[:24].reshape(2, 3, 4, 8))
    torch.testing.assert_close(kernel(x, diag=True).detach(), wanted.diagonal(dim1=-2, dim2=-1))
    single = kernel(case.x[:, None]).to_dense()
    torch.testing.assert_close(
        single.detach(), torch.stack([own[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] for i in range(13)])
    )


def test_gradients_in_the_inputs_and_the_precision():
    case = problem("regression")
    kernel = TangentKernel(case.model, 0.8)
    weights = torch.randn(8, 8)

    def value(x, y):
        return (kernel(x, y).to_dense() * weights).sum()

    x, y = case.new_x.clone().requires_grad_(), case.x[:4].clone().requires_grad_()
    assert torch.autograd.gradcheck(value, (x, y), atol=1e-6)
    # Equal inputs of which one is a constant: half the gradient of a symmetric use.
    same, constant = case.new_x.clone().requires_grad_(), case.new_x.clone()
    half = torch.autograd.grad(value(same, constant), same)[0]
    whole = torch.autograd.grad(value(same, same), same)[0]
    other = torch.autograd.grad(value(constant, same), same)[0]
    torch.testing.assert_close(whole, half + other)
    kernel.raw_prior_precision.grad = None
    value(case.new_x, case.new_x).backward()
    torch.testing.assert_close(kernel.raw_prior_precision.grad, -value(case.new_x, case.new_x).detach().reshape(1))


def test_a_process_of_gpytorch_with_data_of_its_own():
    """The kernel is a kernel like any other: a regression that conditions on targets."""
    case = problem("regression")

    class Process(gpytorch.models.ExactGP):
        def __init__(self, x, y, likelihood):
            super().__init__(x, y, likelihood)
            self.mean_module = gpytorch.means.MultitaskMean(gpytorch.means.ZeroMean(), num_tasks=2)
            self.covar_module = TangentKernel(case.model, 0.7)

        def forward(self, x):
            return gpytorch.distributions.MultitaskMultivariateNormal(self.mean_module(x), self.covar_module(x))

    likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(num_tasks=2, has_task_noise=False)
    likelihood.noise = 0.3
    process = Process(case.x, case.y, likelihood).train()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, process)
    mll(process(case.x), case.y).backward()
    assert set(dict(process.named_parameters())) == {"covar_module.raw_prior_precision", "likelihood.raw_noise"}
    assert process.covar_module.raw_prior_precision.grad.abs() > 1e-3
    process.eval()
    found = process(case.new_x)
    cross, own = (matrix(m) for m in theta(case, 0.7))
    solved = torch.linalg.solve(own + 0.3 * torch.eye(26), cross)
    torch.testing.assert_close(found.mean.flatten().detach(), solved.T @ case.y.flatten(), rtol=1e-7, atol=1e-8)
    before = torch.einsum("ncp,mdp->ncmd", case.new_jacobian, case.new_jacobian) / 0.7
    wanted = matrix(before) - cross.T @ solved
    torch.testing.assert_close(found.covariance_matrix.detach(), wanted, rtol=1e-7, atol=1e-8)


def test_recurrence_and_attention_have_gradients_in_their_inputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRU(2, 4, batch_first=True)
            self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 1)

        def forward(self, x):
            h = self.cell(x)[0]
            return self.head(self.attend(h, h, h, need_weights=False)[0].mean(1))

    model, x = Net(), torch.randn(2, 6)
    kernel = TangentKernel(model, input_shape=(3, 2))
    J = oracles.jacobian(model, x.unflatten(1, (3, 2)))[:, 0]
    torch.testing.assert_close(kernel(x).to_dense().detach(), J @ J.T)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(kernel(leaf).to_dense().detach(), J @ J.T)
    assert torch.autograd.gradcheck(lambda x: kernel(x).to_dense().sum(), leaf, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_the_networks_weights_receive_no_gradient():
    case = problem("regression")
    model = case.fresh
    x = case.new_x.clone().requires_grad_()
    with untouched(model):
        kernel = TangentKernel(model)
        kernel(x).to_dense().sum().backward()
    assert x.grad.abs().max() > 0


def test_setting_the_precision():
    case = problem("regression")
    kernel = TangentKernel(case.model, torch.ones(len(case.all)))
    kernel.prior_precision = 2.0
    torch.testing.assert_close(kernel.prior_precision.detach(), torch.full((6,), 2.0))
    kernel.initialize(prior_precision=torch.arange(1.0, 7.0))
    torch.testing.assert_close(kernel.prior_precision.detach(), torch.arange(1.0, 7.0))
    kernel.register_prior("p", gpytorch.priors.GammaPrior(1.0, 1.0), "prior_precision")
    for value, words in ((-1.0, "positive"), (torch.ones(3), "6 prior precisions")):
        with pytest.raises(ValueError, match=words):
            kernel.prior_precision = value


def test_refusals():
    case = problem("regression", "cnn")
    kernel = TangentKernel(case.model, input_shape=(1, 4, 4))
    with pytest.raises(ValueError, match="flatten"):
        kernel(torch.randn(3, 15)).to_dense()
    with (
        pytest.warns(DeprecationWarning, match="last_dim_is_batch"),
        pytest.raises(ValueError, match="last_dim_is_batch"),
    ):
        kernel(torch.randn(3, 16), last_dim_is_batch=True).to_dense()
    with pytest.raises(TypeError, match="Module"):
        TangentKernel("model")
    with pytest.raises(ValueError, match="prior precision"):
        TangentKernel(case.model, torch.ones(3))
    with pytest.raises(ValueError, match="positive"):
        TangentKernel(case.model, 0.0)
    small = TangentKernel(case.model, input_shape=(1, 4, 4), memory_budget=2000)
    with pytest.raises(ValueError, match="expanded Jacobian"):
        small(torch.randn(3, 16, requires_grad=True)).to_dense()
