"""The evidence of mini-batches: below that of all examples on average, equal to it for all of them at once."""

import itertools

import pytest
import torch
from committed_oracle import ORACLE, data, linear
from dense_laplace import problem

from lapkit import Laplace
from lapkit.curvature import Gaussian
from lapkit.posteriors import GaussianPrior, evidence_lower_bound, log_evidence

ADDITIVE = ("diag", "blockdiag", "full", "lowrank")
KINDS = ("classification", "regression", "binary")


def fit(case, structure, part=slice(None)):
    return Laplace(case.model, case.kind, "all", structure).fit([(case.x[part], case.y[part])])


@pytest.mark.parametrize("structure", ADDITIVE)
@pytest.mark.parametrize("kind", KINDS)
def test_all_examples_at_once_give_the_evidence_itself(kind, structure):
    case = problem(kind)
    la, prior = fit(case, structure), GaussianPrior(0.7)
    bound = evidence_lower_bound(la.fitted, la.likelihood, prior, len(case.x))
    assert float(bound) == pytest.approx(float(case.log_evidence(structure, 0.7)), rel=1e-10)


@pytest.mark.parametrize("structure", ADDITIVE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("delta", [0.01, 1.0])
def test_partitions_are_below_and_finer_ones_further(kind, structure, delta):
    case, prior = problem(kind), GaussianPrior(delta)
    order = torch.arange(12)
    means = []
    for size in (12, 6, 3, 1):
        fits = [fit(case, structure, part) for part in order.split(size)]
        bounds = [evidence_lower_bound(la.fitted, la.likelihood, prior, 12) for la in fits]
        means.append(float(torch.stack(bounds).mean()))
    whole = fit(case, structure, order)
    exact = float(log_evidence(whole.fitted, whole.likelihood, prior))
    assert means[0] == pytest.approx(exact, rel=1e-10)
    assert means[0] > means[1] > means[2] > means[3]


def test_the_mean_over_all_batches_is_below():
    """All 15 batches of 2 of 6 examples, which is the expectation; from float64 matrices of the batch alone."""
    case, prior = problem("classification"), GaussianPrior(0.3)
    pairs = [list(pair) for pair in itertools.combinations(range(6), 2)]
    fits = [fit(case, "full", pair) for pair in pairs]
    bounds = torch.stack([evidence_lower_bound(la.fitted, la.likelihood, prior, 6) for la in fits])
    whole = fit(case, "full", slice(6))
    assert float(bounds.mean()) < float(log_evidence(whole.fitted, whole.likelihood, prior)) - 0.1
    H, w = fits[0].fitted.curvature.to_dense(), case.mean()
    ratio = torch.linalg.slogdet(torch.eye(len(w)) + H / 0.3)[1]
    dense = 3 * (-fits[0].fitted.loss - ratio / 2) - 0.3 * w.square().sum() / 2
    torch.testing.assert_close(bounds[0], dense, rtol=1e-10, atol=0)


def test_the_committed_oracle():
    """Blocks of 30, 15, 5 and 1 examples: what the data add to the log determinant."""
    x, y, w = data("softmax_linear", "X", "y", "W")
    prior = GaussianPrior(ORACLE["inputs"]["softmax_linear"]["prior_precision"])
    halves = []
    for size in (30, 15, 5, 1):
        fits = [Laplace(linear(w), "classification", "all", "full").fit([b]) for b in zip(x.split(size), y.split(size))]  # noqa: B905
        means = [evidence_lower_bound(la.fitted, la.likelihood, prior, 30) for la in fits]
        loss, scatter = sum(la.fitted.loss for la in fits), prior.scatter(fits[0].fitted.parameters, w.flatten())
        halves.append(float(-2 * (torch.stack(means).mean() + loss + scatter / 2)))
    assert halves == pytest.approx([11.32, 16.07, 22.86, 27.04], abs=0.006)


def test_it_is_differentiable_in_prior_and_noise():
    case = problem("regression")
    batch = fit(case, "full", slice(5)).fitted
    logs = torch.tensor([0.3, -0.2], requires_grad=True)

    def bound(z):
        return evidence_lower_bound(batch, Gaussian(z[1].exp()), GaussianPrior(z[0].exp()), 13)

    assert torch.autograd.gradcheck(bound, logs)


def test_example_weights_count():
    case, prior = problem("classification"), GaussianPrior(1.0)
    la = Laplace(case.model, "classification", "all", "full").fit([(case.x, case.y, 2 * torch.ones(13))])
    exact = log_evidence(la.fitted, la.likelihood, prior)
    torch.testing.assert_close(evidence_lower_bound(la.fitted, la.likelihood, prior, 26), exact, rtol=1e-10, atol=0)


def test_what_bounds_nothing_is_refused():
    case, prior = problem("classification"), GaussianPrior(1.0)
    la = fit(case, "kron")
    with pytest.raises(TypeError, match="Kronecker factors of batches do not add up"):
        evidence_lower_bound(la.fitted, la.likelihood, prior, 100)
    la = fit(case, "diag")
    with pytest.raises(ValueError, match="A batch of 13 examples was given, of 5 in all"):
        evidence_lower_bound(la.fitted, la.likelihood, prior, 5)
