"""Predictions are differentiable in the inputs, and the posterior's own functions are those of its dense matrix."""

import pytest
import torch
from dense_laplace import problem, untouched
from torch import nn

from lapkit import Laplace
from lapkit.curvature import HeteroscedasticGaussian

STRUCTURES = ("diag", "kron", "ekfac", "blockdiag", "full", "lowrank")


def fitted(kind="regression", structure="full", subset="all", net="mlp", **options):
    case = problem(kind, net)
    options = {"prior_precision": 0.7} | options
    return case, Laplace(case.fresh, kind, subset, structure, **options).fit(case.data)


def seeded():
    return torch.Generator().manual_seed(4)


PREDICTIONS = {
    "mean": lambda la, x: la(x)[0],
    "covariance": lambda la, x: la(x)[1],
    "variance": lambda la, x: la(x, diagonal_output=True)[1],
    "joint": lambda la, x: la(x, joint=True)[1],
    "functional variance": lambda la, x: la.functional_variance(x),
    "functional covariance": lambda la, x: la.functional_covariance(x),
    "samples": lambda la, x: la.functional_samples(x, 3, seeded()),
    "functions": lambda la, x: la.functional_samples(x, 3, seeded(), joint=True),
    "by weights": lambda la, x: torch.stack(la(x, "nn", n_samples=4, generator=seeded())),
    "log density": lambda la, x: la.predictive_distribution(x).log_prob(torch.zeros(2)),
}


CASES = [("kron", name) for name in PREDICTIONS]
CASES += [(structure, name) for structure in STRUCTURES for name in ("covariance", "joint", "functions")]


def test_a_second_derivative_in_the_inputs_is_refused():
    case, la = fitted()
    x = case.new_x[:2].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no second one"):
        torch.autograd.grad(la(x)[1].sum(), x, create_graph=True)


@pytest.mark.parametrize(("structure", "name"), dict.fromkeys(CASES))
def test_gradients_in_the_inputs_are_finite_differences(structure, name):
    predict = PREDICTIONS[name]
    case, la = fitted(structure=structure)
    x = case.new_x[:2].clone().requires_grad_()
    with untouched(la.model):
        assert torch.autograd.gradcheck(lambda x: predict(la, x), x, eps=1e-5, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(predict(la, x).detach(), predict(la, x.detach()))


@pytest.mark.parametrize("link", ["probit", "mean_field", "bridge", "mc"])
def test_of_probabilities(link):
    case, la = fitted("classification", "kron")
    x = case.new_x[:2].clone().requires_grad_()
    predict = lambda x: la(x, link_approx=link, n_samples=5, generator=seeded())  # noqa: E731
    assert torch.autograd.gradcheck(predict, x, eps=1e-5, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"subset": "last_layer"},
        {"subset": ["0"], "structure": "kron"},
        {"subset": "subnetwork", "subnetwork": torch.tensor([0, 5, 40, 46]), "structure": "full"},
        {"net": "cnn", "structure": "diag"},
    ],
)
def test_of_some_weights_and_other_networks(options):
    case, la = fitted(**options)
    x = case.new_x[:2].clone().requires_grad_()
    for name in ("covariance", "joint", "functions", "by weights"):
        predict = PREDICTIONS[name]
        assert torch.autograd.gradcheck(lambda x, p=predict: p(la, x), x, eps=1e-5, atol=1e-7, rtol=1e-5)
        torch.testing.assert_close(predict(la, x).detach(), predict(la, x.detach()))


def test_of_positions():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(2, 4, 3)
    la = Laplace(model, "regression", "all", "full").fit([(x, torch.randn(2, 4, 2))])
    leaf = x.clone().requires_grad_()
    assert la.functional_variance(leaf).shape == (2, 4, 2, 2)
    torch.testing.assert_close(la.functional_variance(leaf).detach(), la.functional_variance(x))
    torch.testing.assert_close(la(leaf, joint=True)[1].detach(), la(x, joint=True)[1])
    assert torch.autograd.gradcheck(la.functional_variance, leaf, eps=1e-5, atol=1e-7, rtol=1e-5)


def test_without_a_gradient_nothing_is_kept():
    case, la = fitted()
    x = case.new_x.clone().requires_grad_()
    with torch.no_grad():
        assert not any(t.requires_grad for t in la(x))
        assert not any(t.requires_grad for t in la(x, "nn", n_samples=3))
    assert not any(t.requires_grad for t in la(x.detach()))
    assert not la.functional_samples(x.detach(), 2, joint=True).requires_grad


def test_the_network_receives_no_gradient():
    case, la = fitted("classification", "kron")
    x = case.new_x.clone().requires_grad_()
    la(x)[:, 0].sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in la.model.parameters())


def test_too_large_a_jacobian_is_refused():
    case, la = fitted(memory_budget=2000)
    with pytest.raises(ValueError, match="fewer inputs at a time"):
        la(case.new_x.clone().requires_grad_())


def test_gradients_in_hyper_parameters_too_are_refused():
    case, la = fitted(prior_precision=torch.tensor(0.7, requires_grad=True))
    assert la.functional_variance(case.new_x).requires_grad
    with pytest.raises(ValueError, match="one or the other"):
        la(case.new_x.clone().requires_grad_())


# -- functions of inputs and of weights


@pytest.mark.parametrize("structure", STRUCTURES)
def test_functions_of_the_posterior(structure):
    la = fitted(structure=structure)[1]
    P, w = la.posterior_precision.to_dense(), la.mean + torch.randn(5, la.n_params) / 10
    dense = torch.distributions.MultivariateNormal(la.mean, precision_matrix=P)
    torch.testing.assert_close(la.log_prob(w), dense.log_prob(w))
    torch.testing.assert_close(la.log_prob(w[0]), dense.log_prob(w[0]))
    square = torch.einsum("sp,pq,sq->s", w - la.mean, P, w - la.mean)
    torch.testing.assert_close(la.square_norm(w), square)
    torch.testing.assert_close(la.log_prob(w, normalized=False), -square / 2)
    torch.testing.assert_close(la.posterior_covariance, P.inverse())
    torch.testing.assert_close(la.posterior_variance, P.inverse().diagonal())
    S = la.posterior_scale
    assert S.ndim == (1 if structure == "diag" else 2)
    torch.testing.assert_close(S.diag() ** 2 if structure == "diag" else S @ S.T, P.inverse())
    with pytest.raises(ValueError, match=r"Expected weights \(54,\) or \(S, 54\), got \(5, 3\)"):
        la.log_prob(w[:, :3])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_covariances_of_functions(structure):
    case, la = fitted(structure=structure)
    J, P = case.new_jacobian, la.posterior_precision.to_dense()
    rows = J.flatten(0, 1)
    torch.testing.assert_close(la.functional_covariance(case.new_x), rows @ torch.linalg.solve(P, rows.T))
    torch.testing.assert_close(la.functional_variance(case.new_x), J @ torch.linalg.solve(P, J.mT))


def test_covariances_are_of_all_outputs():
    case = problem("regression")
    la = Laplace(case.model, HeteroscedasticGaussian(), "all", "full").fit([(case.x, case.y[:, :1])])
    assert la.functional_covariance(case.new_x).shape == (8, 8)
    assert la(case.new_x, joint=True)[1].shape == (4, 4)


@pytest.mark.peer("laplace")
def test_laplace_torch_agrees():
    from laplace import Laplace as Peer

    case, la = fitted("classification", "full")
    peer = Peer(case.fresh, "classification", "all", "full", prior_precision=0.7, enable_backprop=True)
    peer.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(case.x, case.y), batch_size=5))
    w = la.sample(3, seeded())
    for row in w:
        torch.testing.assert_close(la.log_prob(row), peer.log_prob(row).detach())
        torch.testing.assert_close(la.square_norm(row), peer.square_norm(row).detach().reshape(()))
    torch.testing.assert_close(la.posterior_covariance, peer.posterior_covariance.detach())
    torch.testing.assert_close(la.functional_variance(case.new_x), peer.functional_variance(case.new_jacobian).detach())
    wanted = peer.functional_covariance(case.new_jacobian).detach()
    torch.testing.assert_close(la.functional_covariance(case.new_x), wanted)
    ours, theirs = (case.new_x.clone().requires_grad_() for _ in range(2))
    la(ours)[:, 0].sum().backward()
    peer(theirs)[:, 0].sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
