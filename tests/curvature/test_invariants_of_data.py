"""Invariants on random networks under changes of the data, of draws and of what is kept; see test_invariants.py."""

from functools import partial
from itertools import pairwise, product

import pytest
import torch
from random_problems import SEEDS, RandomProblem, close
from torch import nn

from lapkit.curvature import (
    GGN,
    GGNBlocks,
    GGNDense,
    GGNDiagonal,
    GGNDiagonals,
    GGNKronecker,
    Gradients,
    MonteCarloGGN,
    Parameters,
    SqrtGGN,
    compute,
)
from lapkit.posteriors import Fit, GaussianPrior, log_evidence

STRUCTURES = {"full": GGNDense, "blocks": GGNBlocks, "diagonal": GGNDiagonal}


@pytest.fixture(params=SEEDS)
def case(request):
    return RandomProblem(request.param)


# -- Monte Carlo


def outcomes(case):
    """Targets (N, ...) and their probabilities (N,): all there are, or for real targets some of the same covariance."""
    f = case.model(case.x).detach()
    if case.kind == "categorical":
        return [(torch.full((case.examples,), c), f.softmax(1)[:, c]) for c in range(case.classes)]
    if case.kind == "bernoulli":
        answers = torch.tensor(list(product([0.0, 1.0], repeat=case.classes)))
        p = torch.distributions.Bernoulli(logits=f)
        return [(y.expand_as(f), p.log_prob(y.expand_as(f)).sum(1).exp()) for y in answers]
    steps = torch.eye(case.classes) * case.classes**0.5
    weight = torch.full((case.examples,), 1 / (2 * case.classes))
    return [(f + step, weight) for step in torch.cat([steps, -steps])]


def at_outcomes(case, monkeypatch, quantity, weighted=True):
    """Results with Monte Carlo columns, for each outcome as if it had been drawn, weighted by its probability."""
    found = []
    for y, p in outcomes(case):
        monkeypatch.setattr(type(case.likelihood), "sample", lambda self, f, draws, m=0, y=y: y)
        data = [(case.x, case.y, p if weighted else torch.ones_like(p))]
        found.append(case.compute(data, q=partial(quantity, columns=MonteCarloGGN()))["q"])
    return found


def test_monte_carlo_in_expectation(case, monkeypatch):
    """Exactly: DiagGGN-MC is DiagGGN, the whole is the GGN, and KFAC's B is KFLR's."""
    for quantity in (GGNDiagonal, GGNDense):
        sampled = [r.operator().to_dense() for r in at_outcomes(case, monkeypatch, quantity)]
        close(sum(sampled), case.operators(q=quantity)["q"].to_dense())
    exact, sampled = case.compute(q=GGNKronecker)["q"], at_outcomes(case, monkeypatch, GGNKronecker)
    for name in case.names:
        close(sum(r.factors(name)[0] for r in sampled), exact.factors(name)[0])


def variances(case, monkeypatch):
    """Of one draw's DiagGGN-MC, (P,): sums over examples of squares minus squared means."""
    with monkeypatch.context() as patch:
        each = [r.matrix() for r in at_outcomes(case, patch, GGNDiagonals, weighted=False)]
    mean = case.compute(q=GGNDiagonals)["q"].matrix()
    if case.kind == "gaussian":
        return (2 * mean.square()).sum(0)  # that of a squared normal number
    probabilities = [p[:, None] for _, p in outcomes(case)]
    return (sum(p * d.square() for p, d in zip(probabilities, each, strict=True)) - mean.square()).sum(0)


@pytest.mark.parametrize("draws", [1, 9])
def test_monte_carlo_spreads_as_it_should(case, draws, monkeypatch):
    """Errors in units of their standard deviation, `1 / sqrt(M)` of one draw's: mean squares of each and of their mean.

    Both are near one; entries depend on each other, so by a factor of a few.
    """
    exact, variance = case.operators(q=GGNDiagonal)["q"].values, variances(case, monkeypatch)
    alive = variance > 1e-12 * variance.max()
    errors = []
    for seed in range(10):
        columns = MonteCarloGGN(draws, seed=seed)
        errors.append(case.operators(q=partial(GGNDiagonal, columns=columns))["q"].values - exact)
    units = (torch.stack(errors) * (draws / variance).sqrt())[:, alive]
    assert 0.25 < float(units.square().mean()) < 4
    assert float(units.mean(0).square().mean()) * len(units) < 4


# -- evidence and pruning


def test_dropping_entries_raises_the_determinant(case):
    """Fischer and Hadamard: log det of full <= blocks <= diagonal, and the evidence the other way round."""
    results = case.compute(**STRUCTURES)
    totals, parameters = results.totals, Parameters.of(case.model)
    for delta in (0.1, 1.0):
        determinants, evidences = [], []
        for name in STRUCTURES:
            H = results[name].operator()
            fit = Fit(parameters, parameters.vector(), H, totals.loss, totals.count, totals.outputs)
            determinants.append(float(H.shifted_logdet(delta)))
            evidences.append(float(log_evidence(fit, case.likelihood, GaussianPrior(delta))))
        assert all(a <= b + 1e-10 for a, b in pairwise(determinants))
        assert all(a >= b - 1e-10 for a, b in pairwise(evidences))


def test_surgeon_spares_more_than_damage(case):
    """`1 / (C^-1)_ii <= C_ii`, equal for a diagonal: saliencies of OBS and OBD without the squared weights."""
    for name, operator in case.operators(**STRUCTURES, kron=GGNKronecker, columns=SqrtGGN).items():
        damped = operator.shift(0.1)
        surgeon, damage = 1 / damped.inverse_diagonal(), damped.diagonal()
        assert (surgeon <= damage * (1 + 1e-10)).all(), name
        if name == "diagonal":
            close(surgeon, damage)
        close(damped.inverse_diagonal(), torch.linalg.inv(damped.to_dense()).diagonal())


# -- data


def factors(case, data):
    found = case.compute(data, k=GGNKronecker)["k"]
    return {f"{name}{i}": f for name in case.names for i, f in enumerate(found.factors(name))}


def test_every_example_twice(case):
    """Means stay as they are, there are twice as many columns, and A is a mean already."""
    twice = [*case.batches, *case.batches]
    for quantity in (GGNDense, GGNDiagonal, GGNBlocks, SqrtGGN):
        one, two = (case.operators(data, q=quantity)["q"].to_dense() for data in (case.batches, twice))
        close(two / 2, one)
    once, again = factors(case, case.batches), factors(case, twice)
    for name, factor in once.items():
        close(again[name] / (2 if name.endswith("0") else 1), factor)
    numbers = []
    for data in (case.batches, twice):
        found = compute(case.model, case.likelihood, data, {"q": GGNDiagonals, "g": Gradients})
        numbers.append((found.count, len(found["q"].matrix())))
        close(found["g"].matrix().mean(0), case.gradient() / case.examples)
    assert numbers[1] == (2 * numbers[0][0], 2 * numbers[0][1])


def test_number_of_columns(case):
    """N C columns, N (C - 1) for classes, as far as there are not more than weights."""
    each = case.classes - (case.kind == "categorical")
    for times in (1, 2):
        found = case.operators(case.batches * times, q=SqrtGGN)["q"]
        assert found.rank == min(times * case.examples * each, sum(case.sizes))


def test_order_of_examples(case):
    order = torch.randperm(case.examples)
    data = [(case.x[order], case.y[order])]
    for quantity in (GGNDense, GGNDiagonal, GGNBlocks, GGNKronecker, SqrtGGN):
        close(case.operators(data, q=quantity)["q"].to_dense(), case.operators(q=quantity)["q"].to_dense())
    close(case.compute(data, q=Gradients)["q"].matrix(), case.compute(q=Gradients)["q"].matrix()[order])
    close(case.compute(data, q=GGNDiagonals)["q"].matrix(), case.compute(q=GGNDiagonals)["q"].matrix()[order])
    close(factors(case, data)["0.weight0"], factors(case, case.batches)["0.weight0"])


def test_columns_of_classes_add_up(case):
    """The GGN is the sum of its parts by class."""
    parts = [case.operators(q=partial(GGNDense, columns=GGN(classes=(c,))))["q"].matrix for c in range(case.classes)]
    close(sum(parts), case.operators(q=GGNDense)["q"].matrix)


# -- batch normalisation


class Affine(nn.Module):
    """`a x + b`, what batch normalisation is in eval mode."""

    def __init__(self, norm):
        super().__init__()
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        self.a, self.b = (nn.Parameter(t.detach().clone()) for t in (scale, norm.bias - norm.running_mean * scale))

    def forward(self, x):
        return self.a * x + self.b


def change_of_variables(norm):
    """`d (a, b) / d (weight, bias)`."""
    deviation, size = (norm.running_var + norm.eps).sqrt(), len(norm.running_mean)
    change = torch.eye(2 * size)
    change[:size, :size] = torch.diag(1 / deviation)
    change[size:, :size] = torch.diag(-norm.running_mean / deviation)
    return change


@pytest.mark.parametrize("seed", SEEDS)
def test_batch_norm_is_its_affine_map(seed):
    """The same curvature in all other weights, and that of scale and shift by the change of variables."""
    case = RandomProblem(seed, layers=[nn.BatchNorm1d])
    changes = []
    for module in case.model:
        changes.append(torch.eye(sum(p.numel() for p in module.parameters())))
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            changes[-1] = change_of_variables(module)
    change = torch.block_diag(*[matrix for matrix in changes if len(matrix)])
    ours = case.operators(q=GGNDense)["q"].matrix
    case.model = nn.Sequential(*[Affine(m) if isinstance(m, nn.BatchNorm1d) else m for m in case.model])
    close(ours, change.T @ case.operators(q=GGNDense)["q"].matrix @ change)
