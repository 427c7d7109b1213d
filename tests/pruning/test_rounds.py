"""The posterior over what is left, and pruning in rounds."""

import copy

import pytest
import torch
from dense_laplace import problem
from dense_pruning import fitted, obs_cost, rise
from torch import nn
from torch.nn import functional as F

from lapkit import Laplace
from lapkit.pruning import Criterion, Quadratic, Units, cubic_schedule, prune, prune_gradually, surviving

STRUCTURES = ("diag", "kron", "ekfac", "blockdiag", "full", "lowrank", "gp")


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_survivors_posterior_is_that_of_the_pruned_network(structure):
    case = problem("classification", "cnn")
    la = fitted(case, structure)
    result = prune(la, 0.5)
    small = surviving(la, result, case.data)
    left = (~result.gone).nonzero()[:, 0]
    whole = Laplace(result.pruned(), "classification", "all", structure, prior_precision=0.7).fit(case.data)
    P = whole.posterior_precision.to_dense()[left][:, left]
    torch.testing.assert_close(small.posterior_precision.to_dense(), P, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(small.mean, whole.mean[left])
    ratio = torch.logdet(P) - len(P) * torch.tensor(0.7).log()
    evidence = whole.log_likelihood - (ratio + 0.7 * whole.mean.square().sum()) / 2
    torch.testing.assert_close(small.log_marginal_likelihood(), evidence)
    assert small.n_params == len(left)


@pytest.mark.parametrize("prior", ["layerwise", "diag"])
def test_its_prior_is_that_of_the_survivors(prior):
    case = problem("classification")
    la = fitted(case, "full", prior_mean=torch.linspace(-1, 1, len(case.mean())))
    la.optimize_prior_precision(prior_structure=prior, bounds=(1e-3, 1e4))
    before = la.prior.diagonal(la.fitted.parameters)
    result = prune(la, 0.6)
    small = surviving(la, result, case.data)
    left = ~result.gone
    torch.testing.assert_close(small.prior.diagonal(small.fitted.parameters), before[left])
    torch.testing.assert_close(torch.as_tensor(small.prior.mean), la.prior.mean[left])


def test_settings_go_along():
    case = problem("regression")
    la = Laplace(case.model, "regression", ["0", "4"], "kron", sigma_noise=0.5, temperature=0.7, curvature="ef")
    la.fit(case.data)
    result = prune(la, 0.5, unit="row", ignore=["4"])
    small = surviving(la, result, case.data)
    assert small.likelihood is la.likelihood
    assert (small.temperature, small.columns) == (0.7, la.columns)
    assert small.n_params == la.n_params - int(result.gone.sum())
    assert set(small.fitted.parameters.names) == {"0.weight", "0.bias", "4.weight", "4.bias"}


def test_weights_that_have_come_back_are_refused():
    case = problem("classification")
    la = fitted(case, "diag")
    result = prune(la, 0.5)
    with pytest.raises(ValueError, match="not zero"):
        surviving(la, result, case.data, case.fresh)
    with pytest.raises(ValueError, match="permanent"):
        surviving(la, result, case.data, result.apply(case.fresh))


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_rounds_add_up(structure, scope):
    """What has gone stays gone and counts; curvature and ranking are those of the rest."""
    case = problem("classification", "mlp")
    la = fitted(case, structure)
    before = torch.cat([p.detach().flatten() for p in case.model.parameters()])
    found = prune_gradually(la, case.data, [0.25, 0.5, 0.75], scope=scope)
    assert torch.equal(before, torch.cat([p.detach().flatten() for p in case.model.parameters()]))
    for early, late in zip(found.rounds, found.rounds[1:], strict=False):
        assert (late.gone | ~early.gone).all()
    zeros = sum(int((p == 0).sum()) for p in found.model.parameters())
    assert zeros == int(found.rounds[-1].gone.sum()) == found.rounds[-1].units[1]
    one = prune(la, 0.75, scope=scope)
    assert one.units == found.rounds[-1].units
    assert found.sparsity == one.sparsity


def test_the_second_round_is_that_of_the_smaller_network():
    case = problem("classification")
    found = prune_gradually(fitted(case, "full"), case.data, [0.3, 0.32])
    first, second = found.rounds
    model = first.pruned()
    whole = Laplace(model, "classification", "all", "full", prior_precision=0.7).fit(case.data)
    left = (~first.gone).nonzero()[:, 0]
    P, w = whole.posterior_precision.to_dense()[left][:, left], whole.mean[left]
    names = [n for n, p in model.named_parameters() for _ in range(p.numel())]
    costs = {int(left[i]): obs_cost(P, w, None, [], [i]) for i in range(len(left)) if "weight" in names[left[i]]}
    new = (second.gone & ~first.gone).nonzero()[:, 0].tolist()
    assert new == sorted(sorted(costs, key=costs.get)[: len(new)])
    assert second.predicted_increase == pytest.approx(rise(P, second.change), rel=1e-8)


def test_neurons_that_have_lost_weights_may_still_go():
    case = problem("classification")
    la = fitted(case, "full")
    small = surviving(la, prune(la, 0.5), case.data)
    result = prune(small, 0.3, unit="neuron")
    assert result.units[1] == 3
    assert Quadratic.of(small).size == small.n_params


def test_training_between_rounds_keeps_the_zeros():
    case = problem("classification")
    seen = []

    def train(model):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(model(case.x), case.y).backward()
            optimizer.step()
        seen.append(float(F.cross_entropy(model(case.x), case.y).detach()))

    with_training = prune_gradually(fitted(case, "diag"), case.data, [0.4, 0.8], train=train, tune=True)
    without = prune_gradually(fitted(case, "diag"), case.data, [0.4, 0.8])
    assert len(seen) == 2
    for name, gone in with_training.rounds[-1].parameters.split(with_training.rounds[-1].gone).items():
        assert (dict(with_training.model.named_parameters())[name][gone] == 0).all()
    losses = [float(F.cross_entropy(r.model(case.x), case.y).detach()) for r in (with_training, without)]
    assert losses[0] < losses[1]
    assert float(with_training.laplace.prior_precision) != 0.7


def test_cubic():
    assert cubic_schedule(0.9, 1) == [0.9]
    values = cubic_schedule(0.9, 4, 0.1)
    assert values == pytest.approx([0.9 - 0.8 * (1 - t / 4) ** 3 for t in (1, 2, 3, 4)])
    for wrong in ((1.0, 3, 0.0), (0.5, 0, 0.0), (0.5, 3, 0.6)):
        with pytest.raises(ValueError, match="Expected steps"):
            cubic_schedule(*wrong)


def test_errors():
    case = problem("classification")
    la = fitted(case, "diag")
    with pytest.raises(TypeError, match="many times"):
        prune_gradually(la, iter(case.data), [0.5])
    with pytest.raises(ValueError, match="ascending"):
        prune_gradually(la, case.data, [0.5, 0.4])
    frozen = copy.deepcopy(case.model)
    nn.init.zeros_(frozen[0].weight)
    assert prune(Laplace(frozen, "classification", ["2", "4"], "diag").fit(case.data), 0.5).sparsity == 0.5


@pytest.mark.parametrize("subset", ["last_layer", ["2"]])
@pytest.mark.parametrize("unit", ["weight", "row"])
def test_a_sparsity_is_of_the_same_units_in_each_round(subset, unit):
    """Those of the layers that are random, of which there are fewer than the network has."""
    case = problem("classification", "mlp")
    la = Laplace(case.model, "classification", subset, "full", prior_precision=0.7).fit(case.data)
    found = prune_gradually(la, case.data, [0.2, 0.4], unit=unit)
    total = prune(la, 0.2, unit=unit).units[0]
    assert [r.units for r in found.rounds] == [(total, round(s * total)) for s in (0.2, 0.4)]
    assert found.rounds[0].gone.shape == found.rounds[1].gone.shape
    if unit == "weight":
        assert sum(int((p == 0).sum()) for p in found.model.parameters()) == round(0.4 * total)
    by_hand = prune(surviving(la, found.rounds[0], case.data), 0.4, unit=unit)
    assert torch.equal(by_hand.gone, found.rounds[1].gone)


def test_units_of_ones_own_keep_their_places_when_a_tensor_is_gone():
    case = problem("classification", "mlp")
    la = fitted(case, "diag")
    first = case.model[0].weight.numel()
    sizes = la.fitted.parameters.sizes
    groups = [torch.arange(first, first + sizes[1]), torch.tensor([first + sizes[1] + 1]), torch.tensor([0])]
    mine = Units.of(groups, [0, 0, 0], ["mine"])
    bias_first = Criterion(lambda quadratic, units: -units.counts.double())
    found = prune_gradually(la, case.data, [1 / 3, 2 / 3], bias_first, unit=mine)
    assert found.rounds[0].gone.nonzero()[:, 0].tolist() == groups[0].tolist()
    last = found.rounds[1].gone.nonzero()[:, 0].tolist()
    assert last in (sorted([0, *groups[0].tolist()]), [*groups[0].tolist(), int(groups[1])])


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_a_sparsity_of_a_subnetwork_is_of_its_weights(scope):
    """The others stay as they are, and a second pruning counts what has gone in the first."""
    case = problem("classification", "mlp")
    size = case.model[0].weight.numel()
    chosen = torch.arange(size)[::3]
    la = Laplace(case.model, case.kind, "subnetwork", "full", subnetwork=chosen, prior_precision=0.7).fit(case.data)
    result = prune(la, 0.5, scope=scope)
    rows = torch.bincount(chosen // case.model[0].in_features).tolist()
    gone = sum(min(round(0.5 * n), n - 1) for n in rows) if scope == "row" else round(0.5 * len(chosen))
    assert result.units == (len(chosen), gone)
    assert set(result.gone.nonzero()[:, 0].tolist()) < set(chosen.tolist())
    again = prune(surviving(la, result, case.data), 0.75, scope="global")
    assert again.units == (len(chosen), round(0.75 * len(chosen)))
