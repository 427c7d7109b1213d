"""The search for one prior precision over the curvature's eigenvalues: derivatives, edges, and who has eigenvalues."""

import math

import pytest
import torch
from dense_laplace import problem
from torch import nn
from torch.distributions import Gamma

from lapkit import Laplace
from lapkit.curvature import BlockDiagonal, Dense, Diagonal
from lapkit.curvature.operators.log_det_ratio import log_det_ratio_of
from lapkit.evidence_search import automatic, lbfgs, root_of_condition
from lapkit.evidence_surface import EvidenceSurface
from lapkit.posteriors.eigenvalues import known_eigenvalues

DOUBLE = torch.float64


def fitted(structure, kind="classification"):
    case = problem(kind)
    return Laplace(case.model, kind, "all", structure).fit(case.data)


def test_the_ratio_and_its_derivatives_are_those_of_autograd():
    values = torch.rand(7, dtype=DOUBLE) * torch.tensor([0, 1, 1e-6, 1e6, 3, 5, 7], dtype=DOUBLE)
    u = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)

    def direct(u):
        return (values * (-u).exp()).log1p().sum()

    def own(u):
        return log_det_ratio_of(values, u.exp())

    torch.testing.assert_close(own(u), direct(u))
    for order in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):
        torch.testing.assert_close(order(own, u), order(direct, u))


@pytest.mark.parametrize("structure", ["diag", "kron", "ekfac", "blockdiag", "full"])
def test_eigenvalues_are_those_of_the_written_matrix(structure):
    curvature = fitted(structure).fitted.curvature
    found = known_eigenvalues(curvature).sort().values
    assert found.dtype == DOUBLE
    torch.testing.assert_close(found, torch.linalg.eigvalsh(curvature.to_dense().double()), rtol=1e-6, atol=1e-8)


def test_a_matrix_in_single_precision_keeps_the_digits_of_its_eigenvalues():
    matrix = torch.diag(torch.tensor([1e8, 1.0, 1e-8]))
    assert known_eigenvalues(Dense(matrix)).tolist() == pytest.approx([1e-8, 1.0, 1e8], rel=1e-6)


def test_structures_without_known_eigenvalues_are_searched_as_before():
    la = fitted("lowrank")
    assert known_eigenvalues(la.fitted.curvature) is None
    assert known_eigenvalues(BlockDiagonal((Diagonal(torch.ones(2)), la.fitted.curvature))) is None
    assert la.optimize_prior_precision().log_evidence == pytest.approx(
        fitted("full").optimize_prior_precision().log_evidence, abs=1e-6
    )


def surface(values, weights, hyper_prior=None):
    """The evidence of weights under a curvature with these eigenvalues, without a residual."""
    model, x = nn.Linear(len(weights), 1, bias=False).double(), torch.ones(1, len(weights), dtype=DOUBLE)
    model.weight.data[0] = torch.tensor(weights, dtype=DOUBLE)
    la = Laplace(model, "regression", "all", "diag").fit([(x, model(x).detach())])
    eigenvalues = torch.tensor(values, dtype=DOUBLE)
    return EvidenceSurface(
        la.fitted, la.likelihood, 0.0, (len(weights),), hyper_prior=hyper_prior, eigenvalues=eigenvalues
    )


def root(values, weights, start=0.0, hyper_prior=None):
    one = lambda x: torch.tensor([x], dtype=DOUBLE)  # noqa: E731
    return root_of_condition(surface(values, weights, hyper_prior), one(start), one(-10.0), one(10.0), 100)


@pytest.mark.parametrize("start", [-10.0, -3.0, 0.0, 9.9, 10.0])
@pytest.mark.parametrize("values", [[5.0, 5.0], [1e-3, 1e5], [0.0, 2.0]])
def test_the_root_is_the_fixed_point_from_every_start(values, start):
    found = root(values, [0.6, 0.8], start)
    delta = float(found.logs.exp())
    gamma = sum(h / (h + delta) for h in values)
    assert found.converged
    assert found.evaluations < 15
    assert delta == pytest.approx(gamma / 1.0, rel=1e-8)


def test_equal_eigenvalues_have_a_closed_form():
    """`n h / (h + delta) = delta |w|^2`, a quadratic equation."""
    delta = float(root([3.0, 3.0], [0.6, 0.8]).logs.exp())
    assert delta == pytest.approx((-3 + math.sqrt(9 + 4 * 6)) / 2, rel=1e-8)


def test_a_hyper_prior_moves_the_root():
    found = float(root([3.0, 3.0], [0.6, 0.8], hyper_prior=Gamma(2.0, 5.0)).logs.exp())
    assert found == pytest.approx((6 / (3 + found) + 4) / (1 + 10), rel=1e-8)


@pytest.mark.parametrize("mean", [0.3, 1, torch.tensor(0.3), torch.linspace(-1, 1, 8), [0.1] * 8])
def test_prior_means_of_any_kind(mean):
    data = [(torch.randn(9, 3), torch.arange(9) % 2)]
    la = Laplace(nn.Linear(3, 2), "classification", "all", "kron", prior_mean=mean).fit(data)
    found = la.optimize_prior_precision()
    assert float(la.log_marginal_likelihood()) == pytest.approx(found.log_evidence, rel=1e-9)
    scatter = (la.prior_precision * (la.mean - torch.as_tensor(mean, dtype=DOUBLE)).square()).sum()
    torch.testing.assert_close(la.scatter, scatter)


@pytest.mark.parametrize("hyper_prior", [None, Gamma(2.0, 5.0)])
def test_a_point_is_that_of_a_graph(hyper_prior):
    found, logs = surface([3.0, 0.1], [0.6, 0.8], hyper_prior), torch.tensor([0.4], dtype=DOUBLE)
    point, (value, slope) = found.at(logs), found.slope(logs)
    torch.testing.assert_close(point.gradient, slope)
    torch.testing.assert_close(point.log_evidence + found.hyper(logs), torch.tensor(value, dtype=DOUBLE))
    delta = float(logs.exp())
    assert float(point.effective) == pytest.approx(3 / (3 + delta) + 0.1 / (0.1 + delta))


@pytest.mark.parametrize("start", [-10.0, 0.0, 10.0])
def test_a_slope_of_one_sign_ends_at_an_edge(start):
    assert float(root([1.0, 1.0], [0.0, 0.0], start).logs) == 10.0  # all weights at the prior mean
    assert float(root([0.0, 0.0], [1.0, 1.0], start).logs) == -10.0  # no data
    assert float(root([1e9, 1e9], [1e-9, 0.0], start).logs) == 10.0
    assert float(root([1e-9, 0.0], [1e4, 0.0], start).logs) == -10.0


def test_where_neither_data_nor_weights_say_anything_the_start_stays():
    assert float(root([0.0, 0.0], [0.0, 0.0], 0.7).logs) == 0.7


def test_values_that_are_not_finite_are_refused():
    found = surface([math.nan, 1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="not finite"):
        found.at(torch.zeros(1, dtype=DOUBLE))


def test_several_hyper_parameters_are_refused_and_left_to_another_search():
    la = fitted("full", "regression")
    with pytest.raises(ValueError, match="lbfgs"):
        root_of_condition(EvidenceSurface(la.fitted, la.likelihood, 0.0, (la.n_params,)), *torch.zeros(3, 1), 10)
    one, two = (fitted("full", "regression") for _ in range(2))
    found = (
        one.optimize_prior_precision(tune_noise=True),
        two.optimize_prior_precision(optimizer="lbfgs", tune_noise=True),
    )
    assert found[0].log_evidence == found[1].log_evidence
    assert automatic is not lbfgs


def test_evidences_are_differentiable_by_torch_func():
    la = fitted("kron")
    delta = torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)
    (wanted,) = torch.autograd.grad(la.log_marginal_likelihood(delta), delta)
    torch.testing.assert_close(torch.func.grad(la.log_marginal_likelihood)(delta.detach()), wanted)
