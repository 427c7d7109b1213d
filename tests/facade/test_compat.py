"""Scripts written for laplace-torch run on lapkit.compat.laplace, with the same numbers or a reason why not."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lapkit.compat import laplace as compat
from lapkit.compat.laplace import curvature, utils

peer = pytest.mark.peer("laplace")
OURS, THEIRS = "lapkit.compat.laplace", "laplace"


def data(kind):
    x = torch.randn(24, 3)
    return x, (torch.arange(24) % 3 if kind == "classification" else x[:, :2].sin() + 0.3 * torch.randn(24, 2))


def mlp(outputs):
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, outputs))


def trained(kind):
    x, y = data(kind)
    net = mlp(3 if kind == "classification" else 2)
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=15)
    loss = nn.CrossEntropyLoss() if kind == "classification" else nn.MSELoss()

    def closure():
        optimizer.zero_grad()
        value = loss(net(x), y) + 1e-2 * sum(p.square().sum() for p in net.parameters())
        value.backward()
        return value

    optimizer.step(closure)
    optimizer.zero_grad()
    return net, DataLoader(TensorDataset(x, y), batch_size=7)


# A script, of which only the import line is changed
SCRIPT = """
from {library} import Laplace, HessianStructure, marglik_training
from {library}.curvature import CurvlinopsGGN

la = Laplace(model, kind, subset_of_weights=subset, hessian_structure=HessianStructure(structure), prior_precision=0.7,
             backend=CurvlinopsGGN, **noise)
la.fit(loader, progress_bar=False)
P = la.posterior_precision
P = P.to_matrix() if structure == "kron" else P
found = {{"precision": P, "evidence": la.log_marginal_likelihood(), "mean": la.mean, "loss": la.loss,
         "likelihood": la.log_likelihood, "scatter": la.scatter, "ratio": la.log_det_ratio,
         "posterior": la.log_det_posterior_precision, "prior": la.log_det_prior_precision,
         "density": la.log_prob(la.mean + 0.1), "square": la.square_norm(la.mean + 0.1),
         "kernel": la.functional_variance(J[:, :, : la.n_params]), "diagonal": la.prior_precision_diag,
         "joint kernel": la.functional_covariance(J[:, :, : la.n_params]),
         "sizes": torch.tensor([la.n_params, la.n_layers, la.n_outputs, la.n_data])}}
la.optimize_prior_precision(method="marglik", n_steps=250, lr=0.1, pred_type="glm")
found["tuned"], found["best"] = la.prior_precision, la.log_marginal_likelihood()
if kind == "classification":
    found["probit"] = la(new, pred_type="glm", link_approx="probit")
    found["bridge"] = la(new, link_approx="bridge")
else:
    found["f"], found["var"] = la(new)
    found["joint f"], found["joint"] = la(new, joint=True)
la.prior_precision = torch.tensor(3.0)
found["set"] = la.prior_precision
found["last"] = la.log_marginal_likelihood(torch.tensor(2.0))
found["kept"] = la.prior_precision
"""


def run(library, script, **names):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(script.format(library=library), names)
    return names["found"]


def agree(ours, theirs, rtol=1e-4):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        value = torch.as_tensor(value).detach()
        mine = torch.as_tensor(ours[key]).detach()
        assert mine.numel() == value.numel(), key
        scale = float(value.abs().max())
        assert torch.allclose(mine.reshape(-1), value.reshape(-1).to(mine), rtol=rtol, atol=rtol * scale), key


@peer
@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_one_script_for_both(kind, subset, structure):
    net, loader = trained(kind)
    noise = {"sigma_noise": 0.4} if kind == "regression" else {}
    given = {"model": net, "loader": loader, "kind": kind, "subset": subset, "structure": structure, "noise": noise}
    given |= {"new": torch.randn(4, 3), "J": torch.randn(4, 2, 100), "torch": torch}
    agree(run(OURS, SCRIPT, **given), run(THEIRS, SCRIPT, **given))


# The loop of the reference's regression example: what was set last is what predicts
LOOP = """
from {library} import KronLaplace

la = KronLaplace(model, "regression", 0.5)
la.fit(loader)
log_prior, log_sigma = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
optimizer = torch.optim.Adam([log_prior, log_sigma], lr=0.1)
for _ in range(5):
    optimizer.zero_grad()
    loss = -la.log_marginal_likelihood(log_prior.exp(), log_sigma.exp())
    loss.backward()
    log_sigma.grad.zero_()  # that of the reference is wrong for Kronecker factors
    optimizer.step()
found = {{"precision": la.prior_precision, "noise": la.sigma_noise, "var": la(new)[1], "loss": loss}}
"""

EMPIRICAL = """
from {library} import DiagLaplace, FullLLLaplace, Laplace
from {library}.curvature import BackPackEF, CurvlinopsEF

one = Laplace(model, "classification", "all", "diag", 1.0, 0.7, backend=BackPackEF)
two = FullLLLaplace(model, "classification", 1.0, 0.7, 0.1, 1.0, backend=CurvlinopsEF, last_layer_name="4")
one.fit(loader), two.fit(loader)
found = {{"one": one.posterior_precision, "two": two.posterior_precision, "mean": two.prior_mean,
         "scale": one.posterior_scale, "covariance": two.posterior_covariance, "scatter": two.scatter}}
"""

SUBNETWORK = """
from {library} import DiagLaplace, Laplace
from {library}.utils import LargestMagnitudeSubnetMask, LargestVarianceDiagLaplaceSubnetMask, ModuleNameSubnetMask

largest = LargestMagnitudeSubnetMask(model, n_params_subnet=12).select()
named = ModuleNameSubnetMask(model, module_names=["2", "4"]).select()
diagonal = DiagLaplace(model, "classification")
widest = LargestVarianceDiagLaplaceSubnetMask(model, 9, diagonal)
widest.select(loader)
found = {{"largest": largest, "named": named, "widest": widest.indices, "count": torch.tensor(widest.n_params_subnet)}}
for structure in ("full", "diag"):
    la = Laplace(model, "classification", "subnetwork", structure, subnetwork_indices=largest, prior_precision=0.7)
    la.fit(loader)
    found[structure], found[structure + "/p"] = la.posterior_precision, la(new)
    found[structure + "/evidence"] = la.log_marginal_likelihood()
    found[structure + "/all"] = la.assemble_full_samples(torch.ones(2, 12))
"""

BACKPROP = """
from {library} import Laplace

la = Laplace(model, "classification", "all", structure, enable_backprop=True)
la.fit(loader)
x = new.clone().requires_grad_()
f, variance = la._glm_predictive_distribution(x)
(by_variance,) = torch.autograd.grad(variance.sum(), x)
(by_class,) = torch.autograd.grad(la(x)[:, 0].sum(), x)
found = {{"variance": by_variance, "class": by_class}}
"""


class OfMapping(nn.Module):
    """The reference hands a mapping to the model whole, with the targets in it."""

    def __init__(self):
        super().__init__()
        self.net = mlp(3)

    def forward(self, features, target=None):
        return self.net(features["features"])


MAPPING = """
from {library} import Laplace

la = Laplace(model, "classification", subset, structure, dict_key_x="features", dict_key_y="target")
la.fit(loader)
found = {{"evidence": la.log_marginal_likelihood(), "p": la(new), "joint": la._glm_predictive_distribution(new)[1]}}
"""


GRID = """
from {library} import Laplace

la = Laplace(model, kind, "all", structure)
la.fit(loader)
la.optimize_prior_precision(method="gridsearch", val_loader=held_out, link_approx=link, grid_size=25, loss=loss,
                            log_prior_prec_min=-2, log_prior_prec_max=3)
found = {{"best": la.prior_precision}}
"""


@peer
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_grid_search_finds_the_same(kind):
    net, loader = trained(kind)
    x, y = data(kind)
    held_out = DataLoader(TensorDataset(x + 0.5 * torch.randn_like(x), y), batch_size=6)

    def brier(p, y):
        return (p - nn.functional.one_hot(y, 3)).square().mean()

    def likely(mean, variance, y):
        return -torch.distributions.MultivariateNormal(mean, variance + 0.01 * torch.eye(2)).log_prob(y).mean()

    for link in ("probit", "bridge") if kind == "classification" else ("probit",):
        given = {"model": net, "loader": loader, "kind": kind, "structure": "kron", "held_out": held_out, "link": link}
        given["loss"] = brier if kind == "classification" else likely
        ours = run(OURS, GRID, **given)
        assert link == "bridge" or 0.015 < float(ours["best"]) < 900  # not the edge
        agree(ours, run(THEIRS, GRID, **given), rtol=1e-8)


@peer
def test_what_an_evidence_is_asked_at_stays_set():
    net, loader = trained("regression")
    given = {"model": net, "loader": loader, "new": torch.randn(4, 3), "torch": torch}
    ours = run(OURS, LOOP, **given)
    assert not ours["precision"].requires_grad
    agree(ours, run(THEIRS, LOOP, **given))


@peer
@pytest.mark.parametrize("script", [EMPIRICAL, SUBNETWORK])
def test_backends_and_subnetworks(script):
    net, loader = trained("classification")
    given = {"model": net, "loader": loader, "new": torch.randn(4, 3), "torch": torch}
    agree(run(OURS, script, **given), run(THEIRS, script, **given), rtol=1e-8)


@peer
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_gradients_in_the_inputs(structure):
    net, loader = trained("classification")
    given = {"model": net, "loader": loader, "new": torch.randn(4, 3), "torch": torch, "structure": structure}
    agree(run(OURS, BACKPROP, **given), run(THEIRS, BACKPROP, **given), rtol=1e-8)


@peer
def test_mappings_reach_the_model_whole():
    x, y = data("classification")
    batches = [{"features": x[i : i + 8], "target": y[i : i + 8]} for i in (0, 8, 16)]
    loader = DataLoader([{"features": a, "target": b} for a, b in zip(x, y, strict=True)], batch_size=8)
    given = {"model": OfMapping(), "new": {"features": torch.randn(4, 3)}, "structure": "kron", "subset": "all"}
    theirs = run(THEIRS, MAPPING, loader=loader, **given)
    agree(run(OURS, MAPPING, loader=loader, **given), theirs, rtol=1e-8)
    agree(run(OURS, MAPPING, loader=batches, **given), theirs, rtol=1e-8)


@peer
def test_every_public_name_is_there():
    import laplace
    import laplace.curvature
    import laplace.utils.subnetmask

    assert set(laplace.__all__) == set(compat.__all__)
    assert set(laplace.curvature.__all__) <= set(curvature.__all__)
    masks = {name for name in laplace.utils.__all__ if name.endswith("SubnetMask")}
    assert masks <= set(utils.__all__)
    for name in ("HessianStructure", "SubsetOfWeights", "PriorStructure", "Likelihood", "PredType", "LinkApprox"):
        assert [m.value for m in getattr(compat, name)] == [m.value for m in getattr(laplace, name)]
    for name in compat.__all__:
        mine, other = getattr(compat, name), getattr(laplace, name)
        assert isinstance(mine, type) == isinstance(other, type), name
    assert issubclass(compat.KronLLLaplace, compat.LLLaplace | compat.KronLaplace)


@peer
def test_arguments_have_the_reference_s_order():
    import inspect

    import laplace

    extra = {"KronLaplace": 13, "LowRankLaplace": 11, "KronLLLaplace": 15}
    for name in ("FullLaplace", "DiagLaplace", "FullLLLaplace", "DiagSubnetLaplace", "FunctionalLaplace", *extra):
        theirs = [p for p in inspect.signature(getattr(laplace, name)).parameters if p not in ("model", "likelihood")]
        ours = list(getattr(compat, name).order)
        assert ours[: len(theirs)] == theirs, name
    theirs = inspect.signature(laplace.marglik_training).parameters
    assert list(inspect.signature(compat.marglik_training).parameters) == list(theirs)
    for method in ("__call__", "functional_samples", "predictive_samples", "optimize_prior_precision", "fit"):
        theirs = inspect.signature(getattr(laplace.ParametricLaplace, method)).parameters
        assert list(inspect.signature(getattr(compat.ParametricLaplace, method)).parameters) == list(theirs)
