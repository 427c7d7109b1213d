"""The committed oracle's values of pruning, from `lapkit.pruning`."""

from itertools import pairwise

import pytest
import torch
from committed_oracle import ORACLE, check, data, linear, value
from torch import nn

from lapkit import Laplace
from lapkit.pruning import Criterion, Units, prune, report, saliency

TINY = 1e-12  # a prior precision that is none: the oracle's objective is half the sum of squares
STRUCTURES = ("full", "blockdiag", "lowrank", "gp")


def regression(structure, prior_precision=TINY):
    x, y = data("prune", "X", "y")
    w = torch.linalg.lstsq(x, y[:, None]).solution.T
    batches = [(x[:15], y[:15, None]), (x[15:], y[15:, None])]
    return Laplace(linear(w), "regression", "all", structure, prior_precision=prior_precision).fit(batches), batches


def scores(la, criterion):
    return next(iter(saliency(la, criterion).values())).flatten()


def group(size, *members):
    """These weights, and the others as a second group, since one unit of a layer is always kept."""
    others = [i for i in range(size) if i not in members]
    return Units.of([torch.tensor(members), torch.tensor(others)], [0, 0], ["weight"])


@pytest.mark.parametrize("structure", ["diag", *STRUCTURES])
def test_damage(structure):
    la, _ = regression(structure)
    check(scores(la, "obd"), "OBD saliency 1/2 H_qq w_q^2")
    check(
        scores(regression(structure, 0.9)[0], "opd"), "OPD saliency w^2 * posterior precision diag (prior precision .9)"
    )


@pytest.mark.parametrize("structure", STRUCTURES)
def test_surgeon(structure):
    la, batches = regression(structure)
    least = prune(la, 1 / 6)
    check(least.weights["weight"][0], "OBS update for the least salient weight: w+dw")
    both = prune(la, threshold=float("inf"), unit=group(6, 1, 4), criterion=Criterion(pair_first, compensates=True))
    check(both.weights["weight"][0], "group OBS update")
    for result in (least, both):
        assert report(la, result, batches).actual == pytest.approx(result.predicted_increase, rel=1e-9)


def pair_first(quadratic, units):
    return torch.arange(len(units))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_surgeon_one_after_the_other(structure):
    la, _ = regression(structure)
    gone = [prune(la, k / 6, step=1 / 6).gone.nonzero()[:, 0].tolist() for k in range(5)]
    order = [next(iter(set(b) - set(a))) for a, b in pairwise(gone)]
    check(torch.tensor(order), "sequential OBS removal order (4 steps)")


def test_two_of_four_by_magnitude():
    (w,) = data("nm", "w")
    la = Laplace(linear(w[None]), "regression", "all", "diag").fit([(torch.randn(5, 8), torch.randn(5, 1))])
    result = prune(la, (2, 4), "magnitude")
    check(next(iter(result.masks.values())).flatten(), "2:4 mask by magnitude")


def test_evidence_that_a_group_costs():
    (case,) = [c for c in ORACLE["cases"] if c["metric"] == "evidence change when a group Q is removed (exact)"]
    x, y = data("linreg", "X", "y")
    noise, delta = (ORACLE["inputs"]["linreg"][k] for k in ("sigma_noise", "prior_precision"))
    w = torch.linalg.solve(x.T @ x / noise**2 + delta * torch.eye(4), x.T @ y / noise**2)

    def posterior(columns):
        model = nn.Linear(len(columns), 1, bias=False)
        with torch.no_grad():
            mean = torch.linalg.solve(
                x[:, columns].T @ x[:, columns] / noise**2 + delta * torch.eye(len(columns)),
                x[:, columns].T @ y / noise**2,
            )
            model.weight.copy_(mean[None])
        la = Laplace(model, "regression", "all", "full", sigma_noise=noise, prior_precision=delta)
        return la.fit([(x[:, columns], y[:, None])])

    la = posterior([0, 1, 2, 3])
    torch.testing.assert_close(la.mean, w)
    found = prune(la, threshold=1e9, criterion="evidence", unit=group(4, *case["args"]["Q"]))
    torch.testing.assert_close(-found.scores[0], value(case["metric"])[0], rtol=0, atol=case["tol"])
    fell = posterior([1, 3]).log_marginal_likelihood() - la.log_marginal_likelihood()
    torch.testing.assert_close(-found.scores[0], fell)
