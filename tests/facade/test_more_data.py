"""Data that come to a fit, and fits that are broken off."""

import pytest
import torch
from dense_laplace import problem
from torch import nn

from lapkit import Laplace

STRUCTURES = ("diag", "kron", "blockdiag", "full", "lowrank", "gp")
KINDS = ("classification", "regression")
LOW_RANK = (
    {"space": "weights"},
    {"space": "functions"},
    {"per_parameter": True},
    {"per_parameter": True, "space": "functions"},
)


def made(case, structure, subset="all", **options):
    noise = {"sigma_noise": 0.6} if case.kind == "regression" else {}
    return Laplace(case.model, case.kind, subset, structure, prior_precision=0.7, **noise, **options)


def same(one, two, case):
    torch.testing.assert_close(one.posterior_precision.to_dense(), two.posterior_precision.to_dense())
    torch.testing.assert_close(one.log_marginal_likelihood(), two.log_marginal_likelihood())
    f, g = one.function_distribution(case.new_x), two.function_distribution(case.new_x)
    torch.testing.assert_close(f.covariance, g.covariance, rtol=1e-7, atol=1e-9)
    assert one.fitted.count == two.fitted.count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("net", ["mlp", "cnn"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_parts_make_the_whole(kind, net, subset, structure):
    case = problem(kind, net)
    la = made(case, structure, subset)
    for batch in case.data:
        assert la.fit([batch], override=False) is la
    same(la, made(case, structure, subset).fit(case.data), case)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_parts_of_a_subnetwork(structure):
    case = problem("classification")
    chosen = torch.tensor([0, 5, 6, 17, 30, 41, 46])
    la = made(case, structure, "subnetwork", subnetwork=chosen).fit(case.data[:2]).fit(case.data[2:], override=False)
    same(la, made(case, structure, "subnetwork", subnetwork=chosen).fit(case.data), case)


@pytest.mark.parametrize("options", LOW_RANK)
def test_parts_of_low_rank(options):
    case = problem("classification")
    la = made(case, "lowrank", **options).fit(case.data[:1]).fit(case.data[1:], override=False)
    same(la, made(case, "lowrank", **options).fit(case.data), case)


@pytest.mark.parametrize("first", [4, 100])
def test_columns_in_different_forms_add_up(first):
    """Of many examples they are written out, of few they are kept as factors."""
    case = problem("classification")
    x, y = torch.randn(104, 3), torch.arange(104) % 3
    parts = [[(x[:first], y[:first])], [(x[first:], y[first:])]]
    la = made(case, "lowrank").fit(parts[0])
    kind = type(la._sums[0])
    la.fit(parts[1], override=False)
    assert type(made(case, "lowrank").fit(parts[1])._sums[0]) is not kind  # else this tests nothing
    same(la, made(case, "full").fit([(x, y)]), case)


def test_by_default_a_fit_replaces_the_last():
    case = problem("classification")
    la = made(case, "kron").fit(case.data[:1]).fit(case.data)
    same(la, made(case, "kron").fit(case.data), case)


def test_noise_that_was_tuned_in_between():
    case = problem("regression")
    la = made(case, "full").fit(case.data[:2])
    la.optimize_prior_precision(tune_noise=True)
    noise, prior = la.sigma_noise, la.prior_precision
    la.fit(case.data[2:], override=False)
    whole = Laplace(case.model, "regression", "all", "full", sigma_noise=noise, prior_precision=prior).fit(case.data)
    same(la, whole, case)


def test_ekfac_does_not_add_up():
    case = problem("classification")
    la = made(case, "ekfac").fit(case.data[:2], override=False)
    before = la.log_marginal_likelihood()
    with pytest.raises(ValueError, match="belong to the eigenvectors of the data"):
        la.fit(case.data[2:], override=False)
    assert la.log_marginal_likelihood() == before


def test_other_weights_do_not_add_up():
    case = problem("classification")
    la = Laplace(case.fresh, "classification", "all", "diag").fit(case.data)
    with torch.no_grad():
        next(la.model.parameters()).mul_(1.5)
    with pytest.raises(RuntimeError, match="Call fit again"):
        la.fit(case.data, override=False)
    la.fit(case.data)


class Interrupted:
    """Data whose reading breaks off."""

    def __init__(self, batches, error):
        self.batches, self.error = batches, error

    def __iter__(self):
        yield from self.batches
        raise self.error


@pytest.mark.parametrize(
    ("structure", "override"), [*((s, o) for s in STRUCTURES for o in (True, False)), ("ekfac", True)]
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_is_broken_off_leaves_the_fit_as_it_was(structure, error, override):
    case = problem("classification")
    la = made(case, structure).fit(case.data)
    before, evidence, p = la.fitted, la.log_marginal_likelihood(), la(case.new_x)
    with pytest.raises(error):
        la.fit(Interrupted(case.data[:2], error), override=override)
    assert la.fitted is before
    assert la.log_marginal_likelihood() == evidence
    assert torch.equal(la(case.new_x), p)
    if structure != "ekfac":
        la.fit(case.data[:1], override=False)
        assert la.fitted.count == len(case.x) + len(case.data[0][0])


def test_an_error_in_the_middle_of_a_backward_pass():
    case = problem("classification")
    la = made(case, "full").fit(case.data)
    before = la.posterior_precision.to_dense()
    bad = [case.data[0], (case.data[1][0], torch.full_like(case.data[1][1], 7))]  # no such class
    with pytest.raises(ValueError, match="7"):
        la.fit(bad, override=False)
    assert torch.equal(la.posterior_precision.to_dense(), before)


def test_the_last_layer_stays_the_one_that_was_found():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(6, 2), torch.arange(6) % 2
    la = Laplace(model, "classification", "last_layer", "full").fit([(x[:3], y[:3])])
    la.fit([(x[3:], y[3:])], override=False)
    assert la.fitted.parameters.names == ("2.weight", "2.bias")
