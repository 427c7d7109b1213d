"""Removals one after the other, against a search that computes everything anew for each candidate."""

import pytest
import torch
from dense_laplace import problem
from dense_pruning import evidence_cost, fitted, minimiser, obs_cost, one_by_one, rise

from lapkit import Laplace
from lapkit.pruning import UNITS, Quadratic, Units, prune
from lapkit.pruning import surgeons as module
from lapkit.pruning.kinds import candidates

STRUCTURES = ("diag", "kron", "ekfac", "blockdiag", "full", "lowrank", "gp")
COSTS = {"obs": obs_cost, "evidence": evidence_cost}


def units_of(la, unit):
    quadratic = Quadratic.of(la)
    return UNITS[unit](la.model, quadratic.whole, candidates(la.model, quadratic.whole))


@pytest.mark.parametrize("criterion", COSTS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_weights_go_in_the_order_of_an_exhaustive_search(structure, criterion):
    la = fitted(problem("classification"), structure)
    units = units_of(la, "weight")
    P, w, prior = la.posterior_precision.to_dense(), la.mean, la.prior.diagonal(la.fitted.parameters)
    expected = one_by_one(P, w, prior, [g.tolist() for g in units.groups()], 6, COSTS[criterion])
    members = units.members[expected].tolist()
    for count in (1, 3, 6):
        result = prune(la, count / len(units), criterion, step=1 / len(units))
        assert result.gone.nonzero()[:, 0].tolist() == sorted(members[:count])
        cost = rise(P, minimiser(P, w, members[:count]))
        assert result.predicted_increase == pytest.approx(cost, rel=1e-8)


@pytest.mark.parametrize("criterion", COSTS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_neurons_share_weights_and_go_one_after_the_other(structure, criterion):
    """The columns of a neuron are in the rows of the next layer's, which lose them with it."""
    la = fitted(problem("classification"), structure)
    units = units_of(la, "neuron")
    groups = [g.tolist() for g in units.groups()]
    assert len({i for g in groups for i in g}) < sum(map(len, groups))
    P, w, prior = la.posterior_precision.to_dense(), la.mean, la.prior.diagonal(la.fitted.parameters)
    expected = one_by_one(P, w, prior, groups, 4, COSTS[criterion])
    for count in (1, 2, 4):
        result = prune(la, count / len(groups), criterion, unit="neuron", step=1e-9)
        wanted = sorted({i for u in expected[:count] for i in groups[u]})
        assert result.gone.nonzero()[:, 0].tolist() == wanted


@pytest.mark.parametrize("structure", STRUCTURES)
def test_weights_and_covariance_are_those_given_what_has_gone(structure):
    la = fitted(problem("classification", "cnn"), structure)
    P, w = la.posterior_precision.to_dense(), la.mean
    quadratic = Quadratic.of(la)
    hand = module.surgeon(quadratic.precision, quadratic.weights)
    order = torch.randperm(len(w), generator=torch.Generator().manual_seed(0))
    three = order[30:].sort().values[[3, 0, 5]]
    covariance = torch.linalg.inv(P)[three][:, three]
    for removed in (order[:1], order[1:6], order[6:7], order[7:30]):
        hand.remove(removed)
        covariance -= hand.reduction(three)
    left, gone = order[30:].sort().values, order[:30]
    expected = torch.linalg.inv(P[left][:, left])
    torch.testing.assert_close(hand.variance[left], expected.diagonal(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(hand.weights, w + minimiser(P, w, gone), rtol=1e-7, atol=1e-9)
    some = torch.tensor([3, 0, 5])
    torch.testing.assert_close(covariance, expected[some][:, some], rtol=1e-8, atol=1e-10)


def test_one_step_of_everything_is_no_sequence():
    la = fitted(problem("classification"), "full")
    once, stepped = prune(la, 0.5), prune(la, 0.5, step=1.0)
    assert torch.equal(once.gone, stepped.gone)
    assert prune(la, 0.5, step=0.02).predicted_increase < once.predicted_increase


def test_evidence_rises_until_it_stops():
    """In a linear model every step is exact: the sum of all gains is the difference of the two evidences."""
    x = torch.randn(40, 6)
    x[:, 3:] *= 0.1
    y = x[:, :2].sum(1, keepdim=True) + 0.3 * torch.randn(40, 1)
    P = x.T @ x / 0.09 + 2.0 * torch.eye(6)
    model = torch.nn.Linear(6, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.solve(P, x.T @ y / 0.09).T)
    la = Laplace(model, "regression", "all", "full", sigma_noise=0.3, prior_precision=2.0).fit([(x, y)])
    found = prune(la, criterion="evidence", step=1e-9)
    assert 0 < found.units[1] < 5
    gone = found.gone.nonzero()[:, 0].tolist()

    def evidence(without):
        left = [i for i in range(6) if i not in without]
        a = x[:, left]
        covariance = a @ a.T / 2.0 + 0.09 * torch.eye(40)
        return torch.distributions.MultivariateNormal(torch.zeros(40), covariance).log_prob(y[:, 0])

    at = evidence(gone)
    assert at > evidence([])
    assert all(at >= evidence([*gone, i]) for i in range(6) if i not in gone)
    assert -float(found.scores.min()) == pytest.approx(float(evidence([gone_first(found)]) - evidence([])), rel=1e-8)


def gone_first(result):
    return int(result.scores.argmin())


def test_it_stops_by_a_threshold_too():
    la = fitted(problem("classification"), "full")
    result = prune(la, threshold=0.05, step=1e-9)
    assert 0 < result.sparsity < 1
    assert result.predicted_increase < 0.05 * result.units[1]


def test_nothing_hides_a_loss_of_digits_and_of_memory(monkeypatch):
    la = fitted(problem("classification"), "full")
    monkeypatch.setattr(module, "default_budget", lambda device: 100)
    with pytest.raises(ValueError, match="more than is free"):
        prune(la, 0.5, step=0.1)
    with pytest.raises(ValueError, match="'obs' or 'evidence'"):
        prune(la, 0.5, "magnitude", step=0.1)
    with pytest.raises(ValueError, match="fraction of all units"):
        prune(la, 0.5, step=0.0)


def test_units_of_ones_own_may_be_any_groups():
    la = fitted(problem("classification"), "full")
    groups = [torch.tensor([0, 8]), torch.tensor([1, 2, 30]), torch.tensor([5])]
    result = prune(la, 1 / 3, unit=Units.of(groups, [0, 0, 0], ["mine"]))
    P, w = la.posterior_precision.to_dense(), la.mean
    costs = [rise(P, minimiser(P, w, g)) for g in groups]
    assert result.gone.nonzero()[:, 0].tolist() == groups[min(range(3), key=costs.__getitem__)].tolist()
