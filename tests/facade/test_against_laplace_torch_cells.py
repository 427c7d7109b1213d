"""Every combination that laplace-torch 0.3 has, side by side: each number that both give is the same number.

What only one of them gives is in `ONLY_OURS`; where the numbers differ, test_against_laplace_torch.py and
test_compat_differences.py say why.
"""

import copy
from itertools import product

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lapkit.compat import laplace as compat
from lapkit.compat.laplace import utils as compat_utils
from lapkit.posteriors import GaussianPosterior

pytestmark = [
    pytest.mark.peer("laplace"),
    pytest.mark.filterwarnings("ignore:By default .link_approx. is .probit.:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]

KINDS = ("classification", "regression")
PLACES = torch.tensor([1, 4, 17, 20, 30, 44])
WEIGHTS = {("all", 3): 59, ("all", 2): 54, ("last_layer", 3): 15, ("last_layer", 2): 10}
DRAWS = 20_000  # of links by sampling, whose error is 0.5 / sqrt(DRAWS) at most
# What laplace-torch raises an error for: the body's weights, or all weights, where those of a part are wanted
ONLY_OURS = {
    "last_layer": {"samples of f"},
    "subnetwork": {"density", "unnormalised", "square"},
    "last_layer and layerwise": {"prior", "scatter", "ratio", "log det prior", "evidence"},
}


class Case:
    def __init__(self, kind, outputs=None, depth=3):
        self.kind, self.outputs = kind, outputs or {"classification": 3, "regression": 2}[kind]
        layers = [nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, self.outputs)]
        self.net = nn.Sequential(*(layers if depth == 3 else [*layers[:2], nn.Linear(5, self.outputs)]))
        self.new = torch.randn(4, 3)
        y = torch.arange(13) % self.outputs if kind == "classification" else torch.randn(13, self.outputs)
        self.loader = DataLoader(TensorDataset(torch.randn(13, 3), y), batch_size=5)
        self.noise = {"sigma_noise": 0.6} if kind == "regression" else {}

    def fitted(self, library, *args, **options):
        la = library.Laplace(copy.deepcopy(self.net), self.kind, *args, **self.noise | options)
        la.fit(self.loader)
        return la

    def both(self, *args, **options):
        import laplace

        return self.fitted(compat, *args, **options), self.fitted(laplace, *args, **options)


def dense(precision):
    if isinstance(precision, torch.Tensor):
        return precision.diag() if precision.ndim == 1 else precision
    return precision.to_matrix()


def numbers(la, case, samples):
    """Functions of what both libraries give, by name; in the order of the reference's documentation."""
    value = getattr(la, "mean_subnet", la.mean) + 0.1
    J = torch.linspace(-1, 1, 8 * len(value)).sin().reshape(4, 2, -1)
    found = {
        "precision": lambda: dense(la.posterior_precision),
        "prior": lambda: la.prior_precision_diag,
        "mean": lambda: la.mean,
        "likelihood": lambda: la.log_likelihood,
        "scatter": lambda: la.scatter,
        "ratio": lambda: la.log_det_ratio,
        "log det": lambda: la.log_det_posterior_precision,
        "log det prior": lambda: la.log_det_prior_precision,
        "evidence": la.log_marginal_likelihood,
        "density": lambda: la.log_prob(value),
        "unnormalised": lambda: la.log_prob(value, normalized=False),
        "square": lambda: la.square_norm(value),
        "variance": lambda: la.functional_variance(J),
        "covariance": lambda: la.functional_covariance(J),
        "f": lambda: la._glm_predictive_distribution(case.new)[0],
        "var f": lambda: la._glm_predictive_distribution(case.new)[1],
        "samples of f": lambda: la.functional_samples(case.new, pred_type="nn", n_samples=len(samples)),
        "samples of y": lambda: la.predictive_samples(case.new, pred_type="nn", n_samples=len(samples)),
    }
    return found | (classes(la, case, samples) if case.kind == "classification" else reals(la, case, samples))


def classes(la, case, samples):
    links = {name: lambda name=name: la(case.new, link_approx=name) for name in ("probit", "bridge", "bridge_norm")}
    drawn = {
        f"mc, diagonal {diagonal}": lambda diagonal=diagonal: la(
            case.new, link_approx="mc", n_samples=DRAWS, diagonal_output=diagonal
        )
        for diagonal in (False, True)
    }
    nn_ = {"nn": lambda: la(case.new, pred_type="nn", link_approx="mc", n_samples=len(samples))}
    return links | drawn | nn_


def reals(la, case, samples):
    return {
        "glm": lambda: la(case.new)[1],
        "diagonal": lambda: la(case.new, diagonal_output=True)[1],
        "joint f": lambda: la(case.new, joint=True)[0],
        "joint": lambda: la(case.new, joint=True)[1],
        "nn": lambda: la(case.new, pred_type="nn", link_approx="mc", n_samples=len(samples))[0],
        "nn var": lambda: la(case.new, pred_type="nn", link_approx="mc", n_samples=len(samples))[1],
    }


def same(case, ours, theirs, left_out, monkeypatch):
    """All numbers of both, with the same draws of weights; to 1e-9 of the largest entry, sampled links to 0.02."""
    subnetwork = isinstance(ours, compat.SubnetLaplace)
    mean = ours.mean_subnet if subnetwork else ours.mean
    samples = mean + 0.3 * torch.randn(6, len(mean))
    monkeypatch.setattr(GaussianPosterior, "sample", lambda self, n=1, generator=None: samples)
    whole = theirs.assemble_full_samples(samples) if subnetwork else samples
    monkeypatch.setattr(theirs, "sample", lambda n=1, generator=None: whole)
    mine, other = (numbers(la, case, samples) for la in (ours, theirs))
    for name in mine.keys() - left_out:
        found, expected = (torch.as_tensor(n[name]()).detach().squeeze() for n in (mine, other))
        limit = 0.02 if name.startswith("mc") else 1e-9 * max(1e-300, float(expected.abs().max()))
        torch.testing.assert_close(found, expected, rtol=0, atol=limit, msg=lambda text, name=name: f"{name}: {text}")
    for name in left_out & mine.keys():
        with pytest.raises((ValueError, RuntimeError)):
            other[name]()
        assert torch.isfinite(mine[name]()).all(), name


def priors(subset, outputs, structure):
    """Of every structure that the reference has for these weights."""
    weights = WEIGHTS[subset, outputs]
    found = {"scalar": 0.7}
    if structure != "kron":
        found["diag"] = torch.linspace(0.5, 2.0, weights)
    if subset == "all":
        found["layerwise"] = torch.linspace(0.3, 3.0, 6)
    return found


STRUCTURES = list(product(KINDS, ("all", "last_layer"), ("full", "kron", "diag")))
CELLS = [
    (kind, subset, structure, prior)
    for kind, subset, structure in STRUCTURES
    for prior in priors(subset, 3 if kind == "classification" else 2, structure)
]


@pytest.mark.parametrize(("kind", "subset", "structure", "prior"), CELLS)
def test_tensors_of_weights(kind, subset, structure, prior, monkeypatch):
    case = Case(kind)
    delta = priors(subset, case.outputs, structure)[prior]
    ours, theirs = case.both(subset, structure, prior_precision=delta)
    same(case, ours, theirs, ONLY_OURS.get(subset, set()), monkeypatch)


@pytest.mark.parametrize(("kind", "subset", "structure"), STRUCTURES)
def test_prior_mean_and_temperature(kind, subset, structure, monkeypatch):
    """The temperature of classes alone: that of a regression differs on purpose."""
    case = Case(kind)
    mean = torch.linspace(-1, 1, WEIGHTS[subset, case.outputs])
    options = {"prior_mean": mean, "temperature": 0.6 if kind == "classification" else 1.0}
    ours, theirs = case.both(subset, structure, prior_precision=0.7, **options)
    same(case, ours, theirs, ONLY_OURS.get(subset, set()), monkeypatch)


@pytest.mark.filterwarnings("ignore:The normalised Laplace bridge makes some logits")  # of a few weights, so little
@pytest.mark.parametrize(("kind", "structure"), list(product(KINDS, ("full", "diag"))))
def test_single_weights(kind, structure, monkeypatch):
    case = Case(kind)
    ours, theirs = case.both("subnetwork", structure, subnetwork_indices=PLACES, prior_precision=0.7)
    same(case, ours, theirs, ONLY_OURS["subnetwork"], monkeypatch)
    assert ours.n_params == theirs.n_params
    assert ours.n_params_subnet == theirs.n_params_subnet == 6


@pytest.mark.parametrize("kind", KINDS)
def test_layerwise_priors_of_the_last_layer(kind, monkeypatch):
    """The reference shifts the Kronecker factors by them, and has no evidence for it."""
    case = Case(kind)
    ours, theirs = case.both("last_layer", "kron", prior_precision=torch.tensor([0.5, 2.0]))
    left_out = ONLY_OURS["last_layer and layerwise"] | ONLY_OURS["last_layer"]
    same(case, ours, theirs, left_out, monkeypatch)


# -- masks


def masks(utils, diagonal, model):
    return {
        "magnitude": utils.LargestMagnitudeSubnetMask(model, 9),
        "variance": utils.LargestVarianceDiagLaplaceSubnetMask(model, 9, diagonal),
        "swag": utils.LargestVarianceSWAGSubnetMask(model, 9, "classification", swag_n_snapshots=5, swag_lr=0.05),
        "parameters": utils.ParamNameSubnetMask(model, ["0.bias", "4.weight"]),
        "modules": utils.ModuleNameSubnetMask(model, ["2", "4"]),
        "last layer": utils.LastLayerSubnetMask(model),
        "random": utils.RandomSubnetMask(model, 9),
    }


@pytest.mark.parametrize("name", ["magnitude", "variance", "swag", "parameters", "modules", "last layer", "random"])
def test_masks(name):
    import laplace
    import laplace.utils as their_utils

    case = Case("classification")
    mine = masks(compat_utils, compat.DiagLaplace(case.net, "classification"), case.net)[name]
    model = copy.deepcopy(case.net)
    other = masks(their_utils, laplace.DiagLaplace(model, "classification"), model)[name]
    found, expected = mine.select(case.loader), other.select(case.loader)
    assert mine.n_params_subnet == other.n_params_subnet
    if name != "random":  # other draws
        assert found.tolist() == expected.tolist()


# -- functions, and low rank


@pytest.mark.parametrize(("subset", "outputs", "depth"), [("all", 1, 3), ("all", 2, 2), ("last_layer", 2, 3)])
def test_functions_of_a_regression(subset, outputs, depth):
    """Where the reference does not mix the outputs' axes: one output, or Jacobians that are symmetric in them."""
    case = Case("regression", outputs, depth)
    ours, theirs = case.both(subset, "gp", n_subset=13, prior_precision=0.7)
    for joint in (False, True):
        moments = (la.predictive_moments(case.new, joint=joint) for la in (ours, theirs))
        for found, expected in zip(*moments, strict=True):
            torch.testing.assert_close(found, expected.reshape(found.shape), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(ours.log_likelihood, theirs.log_likelihood)


def spectrum(kind, case, monkeypatch):
    """A backend of the reference's `LowRankLaplace` that is on the index: all eigenvectors of the exact GGN."""
    import laplace
    from laplace import baselaplace
    from laplace.curvature import CurvlinopsGGN

    class Exact(CurvlinopsGGN):
        def eig_lowrank(self, loader):
            full = laplace.FullLaplace(copy.deepcopy(case.net), kind, **case.noise)
            full.fit(loader)
            values, vectors = torch.linalg.eigh(full.H)
            kept = values > 1e-9 * values.max()
            return vectors[:, kept], values[kept], full.loss

    monkeypatch.setattr(baselaplace, "find_spec", lambda name: object())  # it asks for the library it is not given
    return Exact


@pytest.mark.parametrize("kind", KINDS)
def test_low_rank(kind, monkeypatch):
    import laplace

    case = Case(kind)
    ours = case.fitted(compat, "all", "lowrank", prior_precision=0.7)
    options = {"backend": spectrum(kind, case, monkeypatch), "prior_precision": 0.7, **case.noise}
    theirs = laplace.LowRankLaplace(copy.deepcopy(case.net), kind, **options)
    theirs.fit(case.loader)
    (U, values), offset = theirs.posterior_precision
    J = torch.randn(4, 2, len(ours.mean))
    pairs = [
        (ours.posterior_precision.to_dense(), (U * values) @ U.T + offset.diag()),
        (ours.log_marginal_likelihood(), theirs.log_marginal_likelihood().squeeze()),
        (ours.functional_variance(J), theirs.functional_variance(J)),
        (ours.functional_covariance(J), theirs.functional_covariance(J)),
        (ours._glm_predictive_distribution(case.new)[1], theirs._glm_predictive_distribution(case.new)[1]),
    ]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected.detach(), rtol=1e-8, atol=1e-8)
