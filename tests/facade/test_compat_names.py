"""Modules, names and small differences of lapkit.compat.laplace: docs/coming-from-laplace-torch.md, row by row."""

import copy
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lapkit.compat.laplace import DiagLaplace, FullLaplace, FunctionalLaplace, KronLaplace, Laplace
from lapkit.compat.laplace.utils import RunningNLLMetric, block_diag, kron
from lapkit.compat.laplace.utils.utils import get_nll, parameters_per_layer

X = torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(12, 3).sin()
PAGE = (Path(__file__).parents[2] / "docs" / "coming-from-laplace-torch.md").read_text()


def net(outputs=3):
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, outputs))


def fitted(cls, model, kind, y, **options):
    la = cls(model, kind, **options)
    la.fit(DataLoader(TensorDataset(X[: len(y)], y), batch_size=5))
    return la


@pytest.mark.peer("laplace")
def test_every_module_has_the_reference_s_names_or_the_page_lists_them():
    import laplace

    modules = ["laplace", *(m.name for m in pkgutil.walk_packages(laplace.__path__, "laplace."))]
    missing = set()
    for name in modules:
        if name == "laplace.utils.functional_utils":  # of ELLA and VaLLA
            continue
        theirs = importlib.import_module(name)
        own = {n for n, o in vars(theirs).items() if not n.startswith("_") and getattr(o, "__module__", "") == name}
        try:
            ours = set(vars(importlib.import_module(f"lapkit.compat.{name}")))
        except ModuleNotFoundError:
            ours = set()
        missing |= own - ours
    assert not [name for name in missing if f"`{name}`" not in PAGE]
    assert len(missing) < 12


@pytest.mark.peer("laplace")
def test_every_class_has_the_reference_s_methods_or_the_page_lists_them():
    import laplace

    import lapkit.compat.laplace as compat

    for name in compat.__all__:
        theirs, ours = getattr(laplace, name), getattr(compat, name)
        if not inspect.isclass(theirs) or inspect.isabstract(ours) or name in ("ELLA", "VaLLA", "BaseLaplace"):
            continue
        missing = {n for n in dir(theirs) if not n.startswith("_")} - set(dir(ours))
        assert not [n for n in missing if f"`{n}`" not in PAGE and f"`la.{n}`" not in PAGE], name


def test_helpers_of_scripts():
    metric, p, y = RunningNLLMetric(), torch.rand(7, 3).softmax(-1), torch.arange(7) % 3
    expected = -p[torch.arange(7), y].log()
    torch.testing.assert_close(metric(p[:4], y[:4]), expected[:4].mean())
    metric.update(p[4:].clone(), torch.tensor([y[4], -100, y[6]]))
    torch.testing.assert_close(metric.compute(), expected[[0, 1, 2, 3, 4, 6]].mean())
    torch.testing.assert_close(get_nll(p, y), expected.mean())
    assert parameters_per_layer(nn.Linear(3, 2)) == [6, 2]
    A, B = torch.eye(2), torch.ones(3, 3)
    assert torch.equal(kron(A, B), block_diag([B, B]))


@pytest.mark.filterwarnings("ignore:The (smallest|largest) prior precision of the grid:UserWarning")
def test_a_grid_search_takes_a_metric():
    model, y = net(), torch.arange(12) % 3
    la, other = (fitted(DiagLaplace, model, "classification", y) for _ in range(2))
    held_out = [(X.flip(0) * 2, y)]
    la.optimize_prior_precision(method="gridsearch", val_loader=held_out, loss=RunningNLLMetric(), grid_size=9)
    other.optimize_prior_precision(method="gridsearch", val_loader=held_out, grid_size=9)
    assert la.prior_precision == other.prior_precision


def test_a_kronecker_matrix_and_its_inverse():
    la = fitted(KronLaplace, net(), "classification", torch.arange(12) % 3)
    P = la.posterior_precision
    torch.testing.assert_close(P.to_matrix(exponent=-1) @ P.to_matrix(), torch.eye(la.n_params))


@pytest.mark.parametrize("noise", [2, torch.tensor(2), torch.tensor([2])])
def test_noise_may_be_an_integer(noise):
    y = X[:, :2]
    la = fitted(FullLaplace, net(2), "regression", y, sigma_noise=noise)
    expected = fitted(FullLaplace, la.model, "regression", y, sigma_noise=2.0).log_marginal_likelihood()
    torch.testing.assert_close(la.log_marginal_likelihood(), expected)
    la.sigma_noise = 3
    la.sigma_noise = noise
    torch.testing.assert_close(la.log_marginal_likelihood(), expected)


def test_targets_without_an_axis_of_outputs():
    model = net(1)
    one, two = (fitted(KronLaplace, model, "regression", y) for y in (X[:, :1], X[:, 0]))
    assert torch.equal(one.log_marginal_likelihood(), two.log_marginal_likelihood())


@pytest.mark.parametrize("cls", [DiagLaplace, FullLaplace])
def test_missing_labels_do_not_count(cls):
    model, y = net(), torch.arange(12) % 3
    found = fitted(cls, model, "classification", torch.cat([y[:8], torch.full((4,), -100)]))
    expected = fitted(cls, model, "classification", y[:8])
    torch.testing.assert_close(found.posterior_precision, expected.posterior_precision)
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood)


def test_a_bridge_of_logits_without_variance_is_their_softmax():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3, bias=False))
    model[0].bias.data.fill_(-100.0)  # dead
    found = fitted(FullLaplace, model, "classification", torch.arange(12) % 3)(X, link_approx="bridge")
    torch.testing.assert_close(found, model(X).softmax(-1).detach())


def test_functions_follow_the_noise():
    model, y = net(2), X[:, :2].cos()
    la = fitted(FunctionalLaplace, model, "regression", y, n_subset=12)
    la.sigma_noise = 0.3
    expected = fitted(FullLaplace, model, "regression", y, sigma_noise=0.3)
    torch.testing.assert_close(la(X)[1], expected(X)[1])
    before = la.log_marginal_likelihood()
    la.fit(DataLoader(TensorDataset(X, y), batch_size=5))
    torch.testing.assert_close(la.log_marginal_likelihood(), before)


@pytest.mark.peer("laplace")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_functions_of_classes_see_the_whole_curvature():
    """Theirs keeps the diagonal of `diag(p) - p p^T`; ours are the predictions of the full matrix, theirs as well."""
    import laplace

    model, y = net(), torch.arange(12) % 3
    ours = fitted(FunctionalLaplace, model, "classification", y, n_subset=12)
    full = fitted(laplace.FullLaplace, copy.deepcopy(model), "classification", y)
    theirs = fitted(laplace.FunctionalLaplace, copy.deepcopy(model), "classification", y, n_subset=12)
    exact = full._glm_predictive_distribution(X)[1].detach()
    torch.testing.assert_close(ours.predictive_moments(X)[1], exact)
    error = (theirs.predictive_moments(X)[1] - exact).norm() / exact.norm()
    assert error > 0.1, "laplace-torch has changed"


def test_before_the_fit_there_is_no_posterior():
    with pytest.raises(RuntimeError, match="has not been fitted"):
        Laplace(net(), "classification", "all", "full").log_prob(torch.zeros(43))
