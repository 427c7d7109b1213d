"""Scores and compensation of every structure are those of its dense matrix."""

import pytest
import torch
from dense_laplace import problem
from dense_pruning import evidence_fall, fitted, minimiser, rise
from torch import nn

from lapkit import Laplace
from lapkit.curvature import Parameters, hessian_diagonal
from lapkit.pruning import CRITERIA, UNITS, Quadratic, Units, hessian_saliency, prune, random_scores, restriction
from lapkit.pruning.kinds import candidates

STRUCTURES = ("diag", "kron", "ekfac", "blockdiag", "full", "lowrank", "gp")


def parts(case, structure, **options):
    la = fitted(case, structure, **options)
    P = la.posterior_precision.to_dense()
    return la, Quadratic.of(la), P, la.mean, la.prior.diagonal(la.fitted.parameters)


def all_units(quadratic, unit="weight"):
    model = quadratic.model
    return UNITS[unit](model, quadratic.whole, candidates(model, quadratic.whole))


def listed(units):
    return [g.tolist() for g in units.groups()]


@pytest.mark.parametrize("net", ["mlp", "cnn"])
@pytest.mark.parametrize("unit", ["weight", "row", "neuron"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_scores_are_those_of_the_dense_matrix(structure, unit, net):
    _, quadratic, P, w, prior = parts(problem("classification", net), structure)
    units = all_units(quadratic, unit)
    groups = listed(units)
    H = P - prior.diag()

    def alone(group, matrix=P):
        return rise(matrix, torch.zeros_like(w).index_put((torch.tensor(group),), -w[group]))

    expected = {
        "obs": [rise(P, minimiser(P, w, g)) for g in groups],
        "joint": [alone(g) for g in groups],
        "obd": [float((H.diagonal() * w**2)[g].sum() / 2) for g in groups],
        "opd": [float((P.diagonal() * w**2)[g].sum()) for g in groups],
        "magnitude": [float(w[g].norm()) for g in groups],
        "evidence": [evidence_fall(P, w, prior, g) for g in groups],
    }
    for name, values in expected.items():
        found = CRITERIA[name].score(quadratic, units)
        torch.testing.assert_close(found, torch.tensor(values), rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("structure", STRUCTURES)
def test_survivors_make_up_as_the_constrained_minimiser_does(structure):
    la, quadratic, P, w, _ = parts(problem("regression", "cnn"), structure, sigma_noise=0.6)
    for seed, share in enumerate((0.1, 0.5, 0.9)):
        gone = torch.rand(len(w), generator=torch.Generator().manual_seed(seed)) < share
        change = quadratic.compensated(gone)
        torch.testing.assert_close(change, minimiser(P, w, gone.nonzero()[:, 0]), rtol=1e-7, atol=1e-9)
    result = prune(la, 0.5)
    gone = result.gone.nonzero()[:, 0]
    assert result.predicted_increase == pytest.approx(rise(P, minimiser(P, w, gone)), rel=1e-9)
    flat = torch.cat([v.flatten() for v in result.weights.values()])
    torch.testing.assert_close(flat, w + minimiser(P, w, gone), rtol=1e-7, atol=1e-9)
    assert (flat[gone] == 0).all()
    assert result.predicted_increase <= prune(la, 0.5, compensate=False).predicted_increase + 1e-12


def test_what_is_cut_out_of_a_kronecker_product_may_be_iterated(monkeypatch):
    _, quadratic, P, w, _ = parts(problem("classification", "cnn"), "kron")
    monkeypatch.setattr(restriction, "LARGEST", 0)
    gone = torch.rand(len(w)) < 0.4
    expected = minimiser(P, w, gone.nonzero()[:, 0])
    torch.testing.assert_close(quadratic.compensated(gone), expected, rtol=1e-7, atol=1e-9)


def test_weights_of_no_layer_and_all_of_them_are_borders():
    _, quadratic, _, w, _ = parts(problem("classification"), "full")
    none, every = torch.zeros(len(w), dtype=torch.bool), torch.ones(len(w), dtype=torch.bool)
    assert (quadratic.compensated(none) == 0).all()
    assert torch.equal(quadratic.compensated(every), -w)


@pytest.mark.parametrize("structure", ["diag", "blockdiag", "full", "lowrank"])
def test_priors_with_a_mean_and_of_each_weight(structure):
    case = problem("classification")
    size = len(case.mean())
    mean, delta = torch.linspace(-1, 1, size), torch.linspace(0.5, 2, size)
    _, quadratic, P, w, prior = parts(case, structure, prior_mean=mean, prior_precision=delta)
    units = Units.of([torch.tensor([0, 7, 20]), torch.tensor([0, 4, 8]), torch.tensor([3])], [0, 0, 0], ["some"])
    found = CRITERIA["evidence"].score(quadratic, units)
    expected = [evidence_fall(P, w, prior, g, mean) for g in listed(units)]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-8, atol=1e-10)


def test_the_exact_hessian_gives_a_damage_too():
    case = problem("classification")
    la = fitted(case, "diag")
    scores = hessian_saliency(la, case.data)
    found = hessian_diagonal(case.model, la.likelihood, case.data)
    for (module, name), score in scores.items():
        own = next(n for n, p in case.model.named_parameters() if p is getattr(module, name))
        torch.testing.assert_close(score, found[own] * getattr(module, name).detach() ** 2 / 2)
    x, y = case.x, case.y
    vector = Parameters.of(case.model).vector()

    def loss(flat):
        named = dict(Parameters.of(case.model).split(flat))
        return nn.functional.cross_entropy(torch.func.functional_call(case.model, named, (x,)), y, reduction="sum")

    expected = torch.func.hessian(loss)(vector).diagonal() * vector**2 / 2
    whole = torch.cat([found[n].flatten() for n, _ in case.model.named_parameters()]) * vector**2 / 2
    torch.testing.assert_close(whole, expected)


def test_a_noise_and_a_temperature_scale_the_curvature():
    case = problem("regression")
    la = Laplace(case.model, "regression", "all", "full", sigma_noise=0.5, temperature=0.8).fit(case.data)
    quadratic = Quadratic.of(la)
    torch.testing.assert_close(quadratic.precision.to_dense(), la.posterior_precision.to_dense())
    H = Laplace(case.model, "regression", "all", "full").fit(case.data).fitted.curvature.to_dense()
    torch.testing.assert_close(quadratic.curvature.to_dense(), H / 0.25 / 0.8)


def test_random_order_comes_from_its_generator():
    la = fitted(problem("classification"), "diag")
    one, two = (prune(la, 0.5, random_scores(torch.Generator().manual_seed(3))) for _ in range(2))
    assert torch.equal(one.gone, two.gone)
    assert not torch.equal(one.gone, prune(la, 0.5, "magnitude").gone)


@pytest.mark.parametrize("structure", ["kron", "ekfac"])
def test_no_evidence_where_the_prior_is_only_approximated(structure):
    """A product of two matrices and a diagonal is none; the evidence that a weight takes with it is of the diagonal."""
    case = problem("classification", "mlp")
    each = torch.logspace(-2, 3, len(case.mean()))
    la = fitted(case, structure, prior_precision=each)
    with pytest.raises(ValueError, match="only approximates"):
        prune(la, criterion="evidence")
    for same in (0.7, torch.full_like(each, 0.7), torch.linspace(0.5, 2, len(la.fitted.parameters.names))):
        la.prior_precision = same
        prune(la, criterion="evidence")
    for exact in ("diag", "blockdiag", "full", "lowrank"):
        prune(fitted(case, exact, prior_precision=each), criterion="evidence")
