"""Columns with chance in them: unbiased, and the same whatever the batches."""

import copy
import itertools

import oracles
import pytest
import torch
from column_cases import EXAMPLES, POSITIONS, N, T, diagonal, matrix, problem_of, words_of
from likelihood_cases import close
from torch import nn

from lapkit.curvature import (
    GGN,
    Categorical,
    Draws,
    EmpiricalFisher,
    FromLogProb,
    HeteroscedasticGaussian,
    MonteCarloGGN,
    RandomSignGGN,
    example_keys,
    seed_from,
)

RANDOM = {"monte carlo": MonteCarloGGN(3), "signs": RandomSignGGN(2)}


@pytest.fixture(params=EXAMPLES)
def problem(request):
    return problem_of(request.param)


@pytest.fixture(params=POSITIONS)
def words(request):
    return words_of(request.param)


def drawn(likelihood, model, x, y, samples, repeats):
    """S S^T of many independent draws, (repeats, N, C, C): each example stands in the batch many times."""
    f = model(x).detach().repeat(repeats, 1)
    draws = Draws(0, torch.arange(len(f)))
    s = MonteCarloGGN(samples)(likelihood, f, y.repeat(repeats, *[1] * (y.ndim - 1)), draws)[:]
    assert s.shape == (samples, *f.shape)
    return torch.einsum("knc,knd->ncd", s, s).unflatten(0, (repeats, len(x)))


@pytest.mark.parametrize("samples", [1, 3])
def test_monte_carlo_columns_are_unbiased(problem, samples):
    """The mean over many draws lies within five of its own standard errors of the exact Hessian."""
    likelihood, model, x, y, hessians = problem
    draws = drawn(likelihood, model, x, y, samples, 20_000)
    standard_error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - hessians).abs() <= 5 * standard_error + 1e-12).all()
    assert standard_error.max() < 0.02  # so that the line above says something


def test_more_samples_spread_less(problem):
    likelihood, model, x, y, hessians = problem

    def spread(samples):
        return float((drawn(likelihood, model, x, y, samples, 4000) - hessians).square().mean())

    assert spread(8) == pytest.approx(spread(1) / 8, rel=0.1)


def test_monte_carlo_follows_the_generator(problem):
    likelihood, model, x, y, _ = problem
    fit = lambda seed: matrix(  # noqa: E731
        MonteCarloGGN(5), likelihood, model, [(x, y)], torch.Generator().manual_seed(seed)
    )
    assert torch.equal(fit(1), fit(1))
    assert not torch.equal(fit(1), fit(2))


def test_monte_carlo_approaches_the_ggn_through_a_network(problem):
    likelihood, model, x, y, hessians = problem
    exact = oracles.ggn(oracles.jacobian(model, x), hessians)
    estimate = matrix(MonteCarloGGN(1000), likelihood, model, [(x, y)], torch.Generator().manual_seed(0))
    # One sample is off by about the matrix itself, so 1000 by some 1/30 of it.
    assert (estimate - exact).norm() < 0.12 * exact.norm()


@pytest.mark.parametrize("columns", [MonteCarloGGN, RandomSignGGN])
@pytest.mark.parametrize("samples", [0, -1])
def test_at_least_one_sample(columns, samples):
    with pytest.raises(ValueError, match="At least one"):
        columns(samples)


# -- random signs


class AllSigns(Draws):
    """Draw number m has the m-th of the `2^T` possible signs, for all examples."""

    def signs(self, draw, *shape, dtype=torch.float64):
        signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=shape[0])), dtype=dtype)[draw]
        return signs.reshape(1, *shape).expand(len(self), *shape)


def test_random_signs_are_unbiased(words):
    """Over all possible signs the mean is the exact matrix; K columns instead of K T each."""
    likelihood, model, x, y, _ = words
    f = model(x).detach()
    columns = RandomSignGGN(samples=2**T)(likelihood, f, y, AllSigns(0, torch.arange(N)))
    assert len(columns) == likelihood.rank(f) * 2**T
    exact = GGN()(likelihood, f, y)[:].flatten(2)
    mixed = columns[:].flatten(2)
    close(torch.einsum("kna,knb->nab", mixed, mixed), torch.einsum("kna,knb->nab", exact, exact))


def test_random_signs_of_one_position_are_exact(problem):
    likelihood, model, x, y, hessians = problem
    expected = oracles.ggn(oracles.jacobian(model, x), hessians)
    close(matrix(RandomSignGGN(), likelihood, model, [(x, y)]), expected)


def test_random_signs_approach_the_ggn_through_a_network(words):
    likelihood, model, x, y, exact = words
    estimate = matrix(RandomSignGGN(400), likelihood, model, [(x, y)], torch.Generator().manual_seed(0))
    assert 0 < (estimate - exact).norm() < 0.1 * exact.norm()


# -- chance that belongs to the examples


@pytest.mark.parametrize("columns", RANDOM.values(), ids=RANDOM.keys())
def test_estimates_do_not_depend_on_batches_or_their_order(words, columns):
    likelihood, model, x, y, _ = words
    if isinstance(likelihood, FromLogProb):
        sample = lambda f, draws, draw: f + draws.normal(draw, *f.shape[1:])  # noqa: E731
        likelihood = FromLogProb(lambda f, y: -((f - y) ** 2).sum(-1), sample_fn=sample)
    whole = diagonal(columns, likelihood, model, [(x, y)])
    for size in (1, 2, 3):
        close(diagonal(columns, likelihood, model, list(zip(x.split(size), y.split(size), strict=True))), whole)
    order = torch.tensor([2, 0, 3, 1])
    close(diagonal(columns, likelihood, model, [(x[order], y[order])]), whole)
    halves = diagonal(columns, likelihood, model, [(x[:2], y[:2])]) + diagonal(
        columns, likelihood, model, [(x[2:], y[2:])]
    )
    close(halves, whole)  # two machines with the same seed
    if isinstance(columns, MonteCarloGGN):
        assert not torch.allclose(diagonal(columns, likelihood, model, [(x, y)], seed=1), whole)


def test_equal_examples_share_their_draws(problem):
    likelihood, model, x, y, _ = problem
    one = diagonal(MonteCarloGGN(), likelihood, model, [(x[:1], y[:1])])
    close(diagonal(MonteCarloGGN(), likelihood, model, [(x[:1].repeat(3, 1), y[[0, 0, 0]])]), 3 * one)


def test_a_seed_of_the_columns_replaces_that_of_the_generator(problem):
    likelihood, model, x, y, _ = problem
    fit = lambda columns, seed: diagonal(columns, likelihood, model, [(x, y)], seed)  # noqa: E731
    assert torch.equal(fit(MonteCarloGGN(seed=5), 1), fit(MonteCarloGGN(seed=5), 2))
    assert not torch.equal(fit(MonteCarloGGN(seed=5), 1), fit(MonteCarloGGN(seed=6), 1))


def test_columns_alone_draw_from_the_global_generator(problem):
    likelihood, model, x, y, _ = problem
    f = model(x).detach()
    columns = MonteCarloGGN()(likelihood, f, y)
    assert torch.equal(columns[:], columns[:])  # asked twice, answered alike
    assert not torch.equal(columns[:], MonteCarloGGN()(likelihood, f, y)[:])


def test_exact_columns_leave_the_global_generator_alone(problem):
    likelihood, model, x, y, _ = problem
    before = torch.get_rng_state()
    matrix(GGN(), likelihood, model, [(x, y)])
    matrix(EmpiricalFisher(), likelihood, model, [(x, y)])
    assert torch.equal(before, torch.get_rng_state())


def test_monte_carlo_of_a_heteroscedastic_network_gives_the_fisher():
    """Its Hessian depends on the targets, so exact and sampled columns stand for the Fisher information instead."""
    likelihood, f = HeteroscedasticGaussian(), torch.tensor([[0.3, -0.5]]).expand(100_000, 2)
    s = MonteCarloGGN()(likelihood, f, f[:, :1], Draws(0, torch.arange(len(f))))[:]
    products = s[0, :, :, None] * s[0, :, None, :]
    exact = torch.diag(torch.tensor([0.5, 0.0]).exp() * torch.tensor([1.0, 0.5]))
    assert ((products.mean(0) - exact).abs() < 5 * products.std(0) / len(f) ** 0.5).all()


# -- another library, given our samples


@pytest.mark.peer("backpack")
@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_backpacks_monte_carlo_diagonal_of_the_same_samples(monkeypatch):
    from backpack import backpack, extend, extensions
    from backpack.core.derivatives.crossentropyloss import CrossEntropyLossDerivatives

    samples, x, y = 3, torch.randn(4, 2), torch.tensor([0, 2, 1, 1])
    model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 3))
    generator = torch.Generator().manual_seed(0)
    draws = Draws(seed_from(generator), example_keys((x, y), 4))
    drawn = torch.stack([Categorical().sample(model(x).detach(), draws, m) for m in range(samples)])

    class Drawn:
        def sample(self, size):
            assert tuple(size) == (samples,)
            return drawn

    monkeypatch.setattr(CrossEntropyLossDerivatives, "_make_distribution", lambda self, f: Drawn())
    theirs, loss = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss(reduction="sum"))
    with backpack(extensions.DiagGGNMC(mc_samples=samples)):
        loss(theirs(x), y).backward()
    expected = torch.cat([p.diag_ggn_mc.flatten() for p in theirs.parameters()])
    close(diagonal(MonteCarloGGN(samples), Categorical(), model, [(x[:1], y[:1]), (x[1:], y[1:])]), expected)
