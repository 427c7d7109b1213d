"""The columns of every curvature, in output space and through a network."""

import oracles
import pytest
import torch
from column_cases import EXAMPLES, POSITIONS, N, T, Words, diagonal, matrix, problem_of, words_of
from likelihood_cases import close
from torch import nn

from lapkit.curvature import (
    GGN,
    Categorical,
    CustomColumns,
    Draws,
    EmpiricalFisher,
    FromLogProb,
    Gaussian,
    GGNDense,
    LossGradient,
    MonteCarloGGN,
    Parameters,
    RandomSignGGN,
    accumulate,
)


@pytest.fixture(params=EXAMPLES)
def problem(request):
    return problem_of(request.param)


@pytest.fixture(params=POSITIONS)
def words(request):
    return words_of(request.param)


def test_exact_ggn(problem):
    likelihood, model, x, y, hessians = problem
    expected = oracles.ggn(oracles.jacobian(model, x), hessians)
    close(matrix(GGN(), likelihood, model, [(x, y)]), expected)


def test_exact_ggn_does_not_see_the_targets(problem):
    likelihood, model, x, y, _ = problem
    close(matrix(GGN(), likelihood, model, [(x, y.flip(0))]), matrix(GGN(), likelihood, model, [(x, y)]))


def test_empirical_fisher_is_the_sum_of_gradient_products(problem):
    """Of the loss, without the precision: `dispersion_power` says how often that enters."""
    likelihood, model, x, y, _ = problem
    expected = 0.0
    for x_n, y_n in zip(x, y, strict=True):
        loss = likelihood.loss(model(x_n[None]), y_n[None]).sum()
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        expected = expected + torch.outer(gradient, gradient)
    close(matrix(EmpiricalFisher(), likelihood, model, [(x, y)]), expected)
    expected_log_prob = 0.0
    for x_n, y_n in zip(x, y, strict=True):
        log_prob = likelihood.log_prob(model(x_n[None]), y_n[None]).sum()
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(log_prob, list(model.parameters()))])
        expected_log_prob = expected_log_prob + torch.outer(gradient, gradient)
    close(float(likelihood.precision) ** EmpiricalFisher.dispersion_power * expected, expected_log_prob)


# -- many positions: pixels, words


def test_exact_ggn_of_positions(words):
    likelihood, model, x, y, expected = words
    close(matrix(GGN(), likelihood, model, [(x, y)]), expected)
    close(matrix(GGN(), likelihood, model, [(x[:1], y[:1]), (x[1:], y[1:])]), expected)


def test_columns_of_positions_are_zero_but_for_one(words):
    likelihood, model, x, y, _ = words
    f = model(x).detach()
    columns = GGN()(likelihood, f, y)
    assert len(columns) == T * likelihood.rank(f)
    assert columns[:].shape == (len(columns), *f.shape)
    assert ((columns[:] != 0).any(3).any(1).sum(1) <= 1).all()
    assert columns.to(torch.float32)[:1].dtype == torch.float32


def test_targets_follow_the_axis_of_the_outputs():
    """Outputs and targets `(N, C, T)` with as many classes as positions, which no shape tells apart."""
    torch.manual_seed(1)
    model, x, y = Words(), torch.randn(N, T, 2), torch.randn(N, T, 3)
    turned = nn.Sequential(model, Turned())
    found = []
    for network, targets, axis in ((model, y, None), (turned, y.mT, 1)):
        parameters = Parameters.of(network)
        quantity = GGNDense(parameters)
        totals = accumulate(
            network, parameters, Gaussian(), LossGradient(), [(x, targets)], [quantity], output_axis=axis
        )
        found.append((totals.loss, quantity.result().operator().matrix))
    for one, other in zip(*found, strict=True):
        close(one, other)


class Turned(nn.Module):
    """Classes before positions."""

    def forward(self, f):
        return f.mT


LAZY = {
    "ggn": GGN(),
    "classes": GGN(classes=(2, 0)),
    "signs": RandomSignGGN(samples=3, seed=1),
    "monte carlo": MonteCarloGGN(samples=5, seed=1),
}


@pytest.mark.parametrize("columns", LAZY.values(), ids=LAZY.keys())
@pytest.mark.parametrize("shape", [(N, 3), (N, T, 3)], ids=["examples", "positions"])
def test_columns_do_not_depend_on_how_they_are_cut(columns, shape):
    f, y = torch.randn(shape), torch.randint(3, shape[:-1])
    made = columns(Categorical(), f, y, Draws(0, torch.arange(N)))
    whole = made[:]
    assert whole.shape == (len(made), *shape)
    for size in (1, 2, 4, 100):
        close(torch.cat([made[start : start + size] for start in range(0, len(made), size)]), whole)
    assert made[len(made) :].shape == (0, *shape)


def test_only_what_is_asked_for_is_computed():
    """A vocabulary of 20,000 words at 50 positions: all columns would take 8 TB."""
    f, y = torch.randn(1, 50, 20_000), torch.zeros(1, 50, dtype=torch.long)
    columns = GGN()(Categorical(), f, y)
    assert len(columns) == 50 * 19_999
    part = columns[19_998:20_000]
    assert part.count_nonzero((1, 3)).tolist() == [[2, *[0] * 49], [0, 20_000, *[0] * 48]]


# -- classes


def test_parts_of_all_classes_add_up(problem):
    likelihood, model, x, y, _ = problem
    f = model(x).detach()
    parts = [matrix(GGN(classes=(c,)), likelihood, model, [(x, y)]) for c in range(3)]
    close(sum(parts), matrix(GGN(), likelihood, model, [(x, y)]))
    close(matrix(GGN(classes=[2, 0]), likelihood, model, [(x, y)]), parts[0] + parts[2])
    if isinstance(likelihood, Categorical):
        p = f.softmax(1)
        s = p[:, 1, None].sqrt() * (torch.eye(3)[1] - p)
        close(parts[1], oracles.ggn(oracles.jacobian(model, x), s[:, :, None] * s[:, None, :]))


def test_parts_of_all_classes_add_up_for_positions(words):
    likelihood, model, x, y, expected = words
    if isinstance(likelihood, FromLogProb):
        with pytest.raises(ValueError, match="has no root"):
            matrix(GGN(classes=(0,)), likelihood, model, [(x, y)])
    else:
        close(sum(matrix(GGN(classes=(c,)), likelihood, model, [(x, y)]) for c in range(3)), expected)


@pytest.mark.parametrize(("classes", "words_"), [((), "at least one class"), ((1, 1), "none twice")])
def test_classes_must_be_a_set(classes, words_):
    with pytest.raises(ValueError, match=words_):
        GGN(classes=classes)


@pytest.mark.parametrize("classes", [(3,), (0, -1)])
def test_classes_must_be_outputs(problem, classes):
    likelihood, model, x, y, _ = problem
    with pytest.raises(ValueError, match=r"outputs 0 ... 2"):
        GGN(classes=classes)(likelihood, model(x).detach(), y)


# -- given columns


def test_given_columns_are_sent_as_they_are(problem):
    """So that another library's samples can be compared with."""
    likelihood, model, x, y, _ = problem
    given = torch.randn(2, *model(x).shape)
    s = torch.einsum("knc,knd->ncd", given, given)
    actual = matrix(CustomColumns(lambda *_: given), likelihood, model, [(x, y)])
    close(actual, oracles.ggn(oracles.jacobian(model, x), s))


def test_own_columns_see_targets_and_draws(problem):
    likelihood, model, x, y, _ = problem
    same = CustomColumns(lambda likelihood, f, y, draws: MonteCarloGGN(3)(likelihood, f, y, draws))
    close(diagonal(same, likelihood, model, [(x, y)]), diagonal(MonteCarloGGN(3), likelihood, model, [(x, y)]))
    gradient = CustomColumns(lambda likelihood, f, y, draws: likelihood.loss_gradient(f, y)[None])
    close(
        matrix(gradient, likelihood, model, [(x, y)]),
        matrix(LossGradient(), likelihood, model, [(x, y)]),
    )


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 2), (4, 3)])
def test_given_columns_must_fit_the_outputs(problem, shape):
    likelihood, model, x, y, _ = problem
    with pytest.raises(ValueError, match=r"Expected columns \(K, 4, 3\), got"):
        matrix(CustomColumns(lambda *_: torch.zeros(shape)), likelihood, model, [(x, y)])
