"""The calls that libraries make of laplace-torch, in their order: torch-uncertainty 0.13 and lightning-uq-box 0.2."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lapkit.compat.laplace import Laplace

X = torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(12, 3)


def trained(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3 if kind == "classification" else 1))
    y = torch.arange(12) % 3 if kind == "classification" else X[:, :1].sin()
    return net, DataLoader(TensorDataset(X, y), batch_size=5)


CELLS = [(w, h) for w in ("last_layer", "all") for h in ("kron", "diag", "full")]


@pytest.mark.parametrize(("pred_type", "link"), [("glm", "probit"), ("glm", "mc"), ("glm", "bridge"), ("nn", "mc")])
@pytest.mark.parametrize(("weights", "structure"), CELLS)
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_post_processing_of_torch_uncertainty(kind, weights, structure, pred_type, link):
    net, loader = trained(kind)
    la = Laplace(model=net, likelihood=kind, subset_of_weights=weights, hessian_structure=structure)
    la.fit(train_loader=loader)
    la.optimize_prior_precision(method="marglik", pred_type=pred_type, link_approx=link)
    out = la(X[:5], pred_type=pred_type, link_approx=link, n_samples=100)
    out = out[0] if isinstance(out, tuple) else out
    assert out.shape == (5, 3 if kind == "classification" else 1)
    assert torch.isfinite(out).all()


def remade(la, model):
    """A second object of the class, from those attributes that are named like variables of its constructor."""
    names = la.__init__.__code__.co_varnames
    given = {name: getattr(la, name) for name in names if hasattr(la, name) and name != "model"}
    return type(la)(**{**given, "model": model})


@pytest.mark.parametrize(("weights", "structure"), CELLS)
def test_a_second_object_has_the_hyper_parameters_of_the_first(weights, structure):
    net, loader = trained("regression")
    given = {"sigma_noise": 0.4, "prior_precision": 0.3, "prior_mean": 0.1, "temperature": 2.0}
    one = Laplace(net, "regression", weights, structure, **given)
    two = remade(one, copy.deepcopy(one.model))
    assert type(two) is type(one)
    for la in (one, two):
        la.fit(loader)
        assert float(la.sigma_noise) == pytest.approx(0.4)
        assert (float(la.prior_precision), float(la.prior_mean), la.temperature) == pytest.approx((0.3, 0.1, 2.0))
    torch.testing.assert_close(one.log_marginal_likelihood(), two.log_marginal_likelihood())


@pytest.mark.parametrize("weights", ["last_layer", "all"])
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_module_of_lightning_uq_box(kind, weights):
    """Its test loop runs under inference mode; fitting and tuning leave it, inputs are cloned with a gradient."""
    net, loader = trained(kind)
    la = remade(Laplace(net, kind, weights, "kron"), copy.deepcopy(net))
    assert la.likelihood == kind
    with torch.inference_mode():
        with torch.inference_mode(False):
            la.fit(loader)
            log_prior, log_sigma = (torch.ones(1, requires_grad=True) for _ in range(2))
            noise = [log_sigma.exp()] if kind == "regression" else []
            (-la.log_marginal_likelihood(log_prior.exp(), *noise)).backward()
            assert torch.isfinite(log_prior.grad).all()
            x = X[:5].clone().requires_grad_()
        samples = la.predictive_samples(x, pred_type="glm", n_samples=20)
        assert samples.shape == (20, 5, 3 if kind == "classification" else 1)
        out = la(x, pred_type="glm", link_approx="probit")
        mean, variance = out if kind == "regression" else (out, out.var())
        assert torch.isfinite(mean.squeeze().detach() + variance.squeeze().sqrt().sum()).all()
        assert isinstance(la.sigma_noise.item(), float)
    assert next(la.model.parameters()) is not next(net.parameters())
