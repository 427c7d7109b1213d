"""The searches for hyper-parameters agree with each other, dense grids and closed forms; what they warn of."""

import math
import warnings

import pytest
import torch
from committed_oracle import ORACLE, check, data, linear
from dense_laplace import problem
from torch import nn
from torch.distributions import Gamma

from lapkit import Laplace
from lapkit.evidence_search import OPTIMIZERS, group_sizes

STRUCTURES = ("diag", "kron", "blockdiag", "full", "lowrank")
SEVERAL = ("lbfgs", "mackay")


def fitted(kind, structure, **options):
    case = problem(kind)
    return Laplace(case.model, kind, "all", structure, **options).fit(case.data)


def zoomed(function, low, high, points=17, rounds=9):
    """Where a function of one logarithm is largest on a grid, and on finer ones around that place."""
    for _ in range(rounds):
        grid = torch.linspace(low, high, points).tolist()
        best = max(grid, key=function)
        width = (high - low) / (points - 1)
        low, high = best - width, best + width
    return best


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["classification", "binary", "regression"])
def test_all_searches_find_what_a_dense_grid_finds(kind, structure):
    """The value to 1e-6; the place, which a flat top hides, to what that difference leaves."""
    case = problem(kind)
    best = zoomed(lambda log: float(case.log_evidence(structure, math.exp(log))), math.log(1e-6), math.log(1e8))
    top = float(case.log_evidence(structure, math.exp(best)))
    for optimizer in OPTIMIZERS:
        found = fitted(kind, structure).optimize_prior_precision(optimizer=optimizer)
        assert found.converged, optimizer
        assert found.log_evidence == pytest.approx(top, abs=1e-6), optimizer
        assert float(found.prior.precision) == pytest.approx(math.exp(best), rel=1e-5), optimizer
        assert found.slope < 1e-5


@pytest.mark.parametrize(
    ("structure", "prior_structure"),
    [
        *((structure, "layerwise") for structure in STRUCTURES),
        *((structure, shape) for structure in ("diag", "blockdiag", "full") for shape in ("unit", "diag")),
    ],
)
def test_both_searches_over_several_precisions_agree(structure, prior_structure):
    one, two = (fitted("classification", structure) for _ in SEVERAL)
    lbfgs = one.optimize_prior_precision(prior_structure=prior_structure, optimizer="lbfgs", n_steps=500)
    mackay = two.optimize_prior_precision(prior_structure=prior_structure, optimizer="mackay", n_steps=500)
    assert mackay.converged
    assert mackay.slope < 1e-7
    assert lbfgs.log_evidence == pytest.approx(mackay.log_evidence, abs=1e-6)
    # A place is known to the root of what its value is known to.
    torch.testing.assert_close(one.prior_precision.log(), two.prior_precision.log(), rtol=0, atol=1e-3)


def test_an_approximate_log_determinant_leads_to_the_same_top():
    """Kronecker blocks under a prior that differs inside them, where effective numbers may be negative."""
    values = [
        fitted("classification", "kron").optimize_prior_precision(
            prior_structure="unit", optimizer=optimizer, n_steps=100
        )
        for optimizer in SEVERAL
    ]
    assert values[0].log_evidence == pytest.approx(values[1].log_evidence, abs=1e-6)
    assert min(values[0].effective) < 0.5


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("start", [(1e-3, 0.1), (1.0, 1.0), (1e4, 30.0)])
def test_all_searches_agree_on_prior_and_noise_together(structure, start):
    found = [
        fitted("regression", structure, prior_precision=start[0], sigma_noise=start[1]).optimize_prior_precision(
            optimizer=optimizer, tune_noise=True, n_steps=1000
        )
        for optimizer in OPTIMIZERS
    ]
    assert all(f.converged for f in found)
    for f in found[1:]:
        assert f.log_evidence == pytest.approx(found[0].log_evidence, abs=1e-6)
        assert float(f.likelihood.noise) == pytest.approx(float(found[0].likelihood.noise), rel=1e-5)
        assert float(f.prior.precision) == pytest.approx(float(found[0].prior.precision), rel=1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_noise_at_the_top_is_that_of_mackay(optimizer):
    """`noise^2 = |r|^2 / (N C - gamma)` and `delta = gamma / |w|^2` with gamma from the dense matrices."""
    case, la = problem("regression"), fitted("regression", "full")
    found = la.optimize_prior_precision(optimizer=optimizer, tune_noise=True, n_steps=500)
    noise, delta = float(la.sigma_noise), float(la.prior_precision)
    P = case.precision("full", delta, noise)
    gamma = len(P) - delta * float(torch.linalg.inv(P).trace())
    residuals = (case.f - case.y).square().sum()
    assert float(found.effective) == pytest.approx(gamma, rel=1e-8)
    assert noise**2 == pytest.approx(float(residuals) / (case.y.numel() - gamma), rel=1e-5)
    assert delta == pytest.approx(gamma / float(case.mean().square().sum()), rel=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("curvature", ["ggn", "ef"])
def test_the_searches_agree_at_other_temperatures_and_for_the_empirical_fisher(temperature, curvature):
    found = [
        fitted("regression", "full", temperature=temperature, curvature=curvature).optimize_prior_precision(
            optimizer=optimizer, tune_noise=True, n_steps=1000
        )
        for optimizer in OPTIMIZERS
    ]
    assert [f.log_evidence for f in found] == pytest.approx([found[0].log_evidence] * len(OPTIMIZERS), abs=1e-6)


def test_the_argmax_of_the_committed_oracle():
    case = ORACLE["inputs"]["linreg"]
    x, y = data("linreg", "X", "y")
    for optimizer in ("mackay", "newton"):
        noise, delta = case["sigma_noise"], case["prior_precision"]
        for _ in range(40):
            w = torch.linalg.solve(x.T @ x + delta * noise**2 * torch.eye(x.shape[1]), x.T @ y)
            model = linear(w[None])
            la = Laplace(model, "regression", "all", "full", sigma_noise=noise, prior_precision=delta).fit([(x, y)])
            la.optimize_prior_precision(optimizer=optimizer, tune_noise=True)
            noise, delta = float(la.sigma_noise), float(la.prior_precision)
        check([noise, delta], "argmax evidence [sigma_noise, prior_precision]")


# -- structures of the prior


def test_units_are_rows():
    """Of the 5x3, 4x5 and 3x4 weights; biases have one precision for each tensor."""
    la = fitted("classification", "full")
    assert group_sizes(la.fitted, "unit") == (3,) * 5 + (5,) + (5,) * 4 + (4,) + (4,) * 3 + (3,)
    la.optimize_prior_precision(prior_structure="unit")
    rows = la.fitted.parameters.split(la.prior_precision)["0.weight"]
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert len(rows[:, 0].unique()) == 5
    filters = problem("classification", "cnn")
    conv = Laplace(filters.model, "classification", "all", "diag").fit(filters.data)
    assert group_sizes(conv.fitted, "unit")[:2] == (9, 9)


def test_finer_structures_have_more_evidence():
    values = [
        fitted("regression", "full").optimize_prior_precision(prior_structure=s, optimizer="mackay").log_evidence
        for s in ("scalar", "layerwise", "unit", "diag")
    ]
    assert values == sorted(values)
    assert values[-1] > values[0] + 1


# -- hyper-prior and bounds


@pytest.mark.parametrize("optimizer", SEVERAL)
def test_a_hyper_prior_moves_the_fixed_point(optimizer):
    """`delta = (gamma + 2 a) / (|w|^2 + 2 b)` for each group, with gamma from the dense inverse."""
    case, la = problem("classification"), fitted("classification", "full")
    la.optimize_prior_precision(
        prior_structure="layerwise", optimizer=optimizer, hyper_prior=Gamma(2.0, 3.0), n_steps=500
    )
    delta, sizes = la.prior_precision, case.sizes()
    variances = torch.linalg.inv(case.precision("full", delta)).diagonal().split(sizes)
    gamma = torch.stack([n - d * v.sum() for n, d, v in zip(sizes, delta, variances, strict=True)])
    squares = torch.stack([w.square().sum() for w in case.mean().split(sizes)])
    torch.testing.assert_close(delta, (gamma + 4) / (squares + 6), rtol=1e-5, atol=0)
    assert float(la.log_marginal_likelihood()) == pytest.approx(float(case.log_evidence("full", delta)), rel=1e-10)


def test_a_hyper_prior_decides_where_the_data_are_silent():
    """Weights at the prior mean ask for a precision without bound."""
    model = nn.Linear(3, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    la = Laplace(model, "regression", "all", "full").fit([(torch.randn(20, 3), torch.randn(20, 1))])
    for optimizer in OPTIMIZERS:
        found = la.optimize_prior_precision(optimizer=optimizer, hyper_prior=Gamma(1.0, 0.1))
        assert found.converged
        assert 1 < float(found.prior.precision) < 100


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bounds", [(1e-3, 1e-2), (1e3, 1e4)])
def test_bounds_hold_and_are_told(optimizer, bounds):
    la = fitted("classification", "kron")
    with pytest.warns(UserWarning, match="edge of the search, prior precision") as caught:
        found = la.optimize_prior_precision(optimizer=optimizer, bounds=bounds)
    edge = bounds[1] if bounds[1] < 1 else bounds[0]
    assert float(la.prior_precision) == pytest.approx(edge, rel=1e-9)
    assert found.slope == 0
    assert caught[0].filename == __file__


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_noise_at_its_bound_leaves_the_prior_at_its_best(optimizer):
    """The best precision for that noise, not for another."""
    la = fitted("regression", "full")
    with pytest.warns(UserWarning, match=r"edge of the search, noise 0\.1"):
        found = la.optimize_prior_precision(
            optimizer=optimizer, tune_noise=True, noise_bounds=(1e-3, 0.1), n_steps=1000
        )
    fixed = fitted("regression", "full", sigma_noise=0.1).optimize_prior_precision()
    assert float(la.prior_precision) == pytest.approx(float(fixed.prior.precision), rel=1e-5)
    assert found.converged


@pytest.mark.parametrize("optimizer", SEVERAL)
def test_parameters_at_the_edge_are_named(optimizer):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    nn.init.zeros_(model[0].bias)
    with torch.no_grad():
        model[2].weight[0, :3] = 0
    la = Laplace(model, "regression", "all", "diag").fit([(torch.randn(20, 3), torch.randn(20, 2))])
    with pytest.warns(UserWarning, match=r"1e\+08 of 0\.bias: the data speak for all weights at the prior mean"):
        la.optimize_prior_precision(prior_structure="layerwise", optimizer=optimizer)
    with pytest.warns(UserWarning, match=r"1e\+08 of 0\.bias \(4 times\), 2\.weight \(3 times\): "):
        la.optimize_prior_precision(prior_structure="diag", optimizer=optimizer, n_steps=2000)


def test_bounds_that_are_none_are_refused():
    la = fitted("regression", "diag")
    for settings in ({"bounds": (1.0, 1.0)}, {"bounds": (0.0, 1.0)}, {"noise_bounds": (2.0, 1.0), "tune_noise": True}):
        with pytest.raises(ValueError, match="Bounds are positive and ascending"):
            la.optimize_prior_precision(**settings)


# -- noise that residuals do not tell


def overfitted(hidden):
    """A network that was trained, last layer included, on 20 targets."""
    model = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 1))
    return model, torch.randn(20, 2), torch.randn(20, 1)


def test_noise_of_a_last_layer_alone_is_told():
    model, x, y = overfitted(10)
    la = Laplace(model, "regression", "last_layer", "full").fit([(x, y)])
    with pytest.warns(UserWarning, match="30 more weights than the approximation is over") as caught:
        la.optimize_prior_precision(tune_noise=True)
    assert caught[0].filename == __file__
    model[0].requires_grad_(False)  # features that these data did not train
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Laplace(model, "regression", "last_layer", "full").fit([(x, y)]).optimize_prior_precision(tune_noise=True)


def test_noise_without_residuals_is_told():
    """More weights than targets, which they reproduce."""
    model, x = nn.Linear(40, 1), torch.randn(20, 40)
    y = model(x).detach() + 1e-4 * torch.randn(20, 1)
    la = Laplace(model, "regression", "all", "full").fit([(x, y)])
    with pytest.warns(UserWarning, match=r"effective parameters for 20 target values"):
        la.optimize_prior_precision(tune_noise=True)


# -- what is refused, and how a search reports


def test_newton_is_for_one_precision():
    with pytest.raises(ValueError, match="one prior precision, not for 6"):
        fitted("classification", "diag").optimize_prior_precision(prior_structure="layerwise", optimizer="newton")
    with pytest.raises(ValueError, match="Unknown optimizer 'adam'"):
        fitted("classification", "diag").optimize_prior_precision(optimizer="adam")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_too_few_steps_are_reported(optimizer):
    la = fitted("classification", "full", prior_precision=1e3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a first step may end at an edge
        found = la.optimize_prior_precision(optimizer=optimizer, n_steps=1)
    assert not found.converged
    assert found.slope > 1e-3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_curvature_that_is_not_finite_is_refused(optimizer):
    model = nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.fill_(1e200)
    la = Laplace(model, "regression", "all", "full").fit([(torch.randn(20, 3), torch.randn(20, 1))])
    with pytest.raises(ValueError, match="evidence is not finite"):
        la.optimize_prior_precision(optimizer=optimizer)
