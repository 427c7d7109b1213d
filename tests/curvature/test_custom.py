"""A likelihood from a log density alone, against the built-in ones, and what it refuses."""

import pytest
import torch
from torch import distributions

from lapkit.curvature import Bernoulli, Categorical, Draws, FromLogProb, Gaussian, HeteroscedasticGaussian, Poisson

N, T = 4, 3


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def outer(columns):
    return torch.einsum("k...c,k...d->...cd", columns, columns)


# name: (built-in likelihood, log density of rows, targets for outputs of a shape)
PAIRS = {
    "gaussian": (Gaussian(), lambda f, y: distributions.Normal(f, 1.0).log_prob(y).sum(-1), torch.randn_like),
    "poisson": (Poisson(), lambda f, y: distributions.Poisson(f.exp()).log_prob(y).sum(-1), lambda f: f.abs().round()),
    "bernoulli": (
        Bernoulli(),
        lambda f, y: distributions.Bernoulli(logits=f).log_prob(y).sum(-1),
        lambda f: (f > 0).to(f),
    ),
    "categorical": (
        Categorical(),
        lambda f, y: distributions.Categorical(logits=f).log_prob(y),
        lambda f: f.argmax(-1),
    ),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
@pytest.mark.parametrize("shape", [(N, 3), (1, 3), (N, T, 3)], ids=["examples", "one", "positions"])
def test_own_log_prob_gives_what_the_built_in_one_gives(pair, shape):
    likelihood, log_prob, targets = pair
    own, f = FromLogProb(log_prob), 2 * torch.randn(shape)
    y = own.check(f, targets(torch.randn(shape)))
    close(own.log_prob(f, y), likelihood.log_prob(f, y))
    close(own.loss_gradient(f, y), likelihood.loss_gradient(f, y))
    root = own.hessian_root(f, y)
    assert root.shape == (3, *shape)
    assert own.rank(f) == 3
    close(outer(root), outer(likelihood.hessian_root(f, y)))
    close(own.hessian_root(f, y, slice(1, 2)), root[1:2])


def test_confident_outputs_in_single_precision():
    """Curvature of 1e-9 beside some of 1e-1: cancelled digits must not look like an indefinite Hessian."""
    f = torch.tensor([[20.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float32)
    y = torch.tensor([0, 1])
    root = FromLogProb(PAIRS["categorical"][1]).hessian_root(f, y)
    assert root.dtype == torch.float32
    torch.testing.assert_close(
        outer(root).double(), outer(Categorical().hessian_root(f.double())), rtol=1e-5, atol=1e-15
    )


def test_log_densities_that_are_linear_or_constant():
    f, y = torch.randn(N, 2), torch.randn(N, 2)
    for log_prob in (lambda f, y: f.sum(-1), lambda f, y: y.sum(-1), lambda f, y: f[:, 0] * y[:, 0]):
        assert not FromLogProb(log_prob).hessian_root(f, y).any()


def student(f, y):
    return distributions.StudentT(3.0, f).log_prob(y).sum(-1)


def test_an_indefinite_hessian_is_refused():
    """Beyond the bend of a Student's t, and for means and log variances."""
    f = torch.zeros(N, 2)
    assert torch.isfinite(FromLogProb(student).hessian_root(f, f + 0.1)).all()
    y = f.clone()
    y[2, 1] = 10.0
    with pytest.raises(
        ValueError, match=r"indefinite: it has an eigenvalue -0.\d+ in row 2.*hessian_root_fn.*sample_fn"
    ):
        FromLogProb(student).hessian_root(f, y)
    built_in = HeteroscedasticGaussian()
    with pytest.raises(ValueError, match="indefinite"):
        FromLogProb(lambda f, y: -built_in.loss(f, y)).hessian_root(f, f[:, :1] + 3)


def test_a_root_of_ones_own_is_used():
    fisher = FromLogProb(
        student, hessian_root_fn=lambda f, y: torch.eye(2)[:, None].expand(2, *f.shape) * (4 / 6) ** 0.5
    )
    f = torch.randn(N, T, 2)
    close(outer(fisher.hessian_root(f, 10 * f)), (4 / 6) * torch.eye(2).expand(N, T, 2, 2))
    one = FromLogProb(student, hessian_root_fn=lambda f, y: torch.ones(1, *f.shape))
    close(outer(one.hessian_root(f, f)), torch.ones(N, T, 2, 2))
    assert len(one.hessian_root(f, f)) == one.rank(f)


@pytest.mark.parametrize("shape", [(3, N, 2), (2, N, 1), (N, 2)])
def test_a_root_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"must return columns \(K, 4, 2\), K at most 2"):
        FromLogProb(student, hessian_root_fn=lambda f, y: torch.ones(shape)).hessian_root(
            torch.zeros(N, 2), torch.zeros(N, 2)
        )


MIXING = {
    "normalised over the batch": lambda f, y: -((f - f.mean(0) - y) ** 2).sum(-1),
    "looking back": lambda f, y: -((f.cumsum(0) - y) ** 2).sum(-1),
    "looking ahead": lambda f, y: -((f.flip(0).cumsum(0).flip(0) - y) ** 2).sum(-1),
}


@pytest.mark.parametrize("log_prob", MIXING.values(), ids=MIXING.keys())
def test_rows_must_not_mix(log_prob):
    with pytest.raises(ValueError, match="rows of f influence each other"):
        FromLogProb(log_prob).hessian_root(torch.randn(N, 2), torch.randn(N, 2))


def test_one_number_for_each_row():
    for log_prob in (lambda f, y: -((f - y) ** 2), lambda f, y: -((f - y) ** 2).sum()):
        with pytest.raises(ValueError, match=r"one number for each row of f, \(4,\)"):
            FromLogProb(log_prob).loss(torch.zeros(N, 2), torch.zeros(N, 2))


def test_a_kink_of_infinite_curvature_is_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        FromLogProb(lambda f, y: -((f - y) ** 2).sqrt().sum(-1)).hessian_root(torch.zeros(N, 2), torch.zeros(N, 2))


MISSING = {
    "targets": (lambda own, f: own.hessian_root(f), "depends on the targets"),
    "samples": (lambda own, f: own.sample(f, Draws.fresh(N)), "sample_fn"),
    "mean": (lambda own, f: own.inverse_link(f), "inverse_link_fn"),
    "expectation": (lambda own, f: own.expectation(f, torch.eye(2).expand(N, 2, 2)), "inverse_link_fn"),
    "distribution": (lambda own, f: own.predictive(f, torch.eye(2).expand(N, 2, 2)), "distribution_fn"),
}


@pytest.mark.parametrize(("ask", "words"), MISSING.values(), ids=MISSING.keys())
def test_what_is_not_known_is_named(ask, words):
    with pytest.raises(ValueError, match=words):
        ask(FromLogProb(student), torch.zeros(N, 2))


def test_no_samples_of_outputs():
    with pytest.raises(ValueError, match="at least one sample"):
        FromLogProb(student, samples=0)


def test_sampled_columns_are_gradients_at_own_samples():
    own = FromLogProb(student, sample_fn=lambda f, draws, draw: f + draws.normal(draw, *f.shape[1:]))
    f, draws = torch.randn(N, T, 2), Draws(0, torch.arange(N))
    y = f + draws.normal(2, T, 2)
    close(own.sampled_column(f, f, draws, 2), own.loss_gradient(f, y))


# -- predictions by Monte Carlo over f

PREDICTING = FromLogProb(
    PAIRS["poisson"][1],
    inverse_link_fn=torch.exp,
    distribution_fn=lambda f: distributions.Independent(distributions.Poisson(f.exp()), 1),
    samples=4000,
)


@pytest.mark.parametrize("shape", [(N, 2), (N, T, 2)], ids=["examples", "positions"])
def test_predictions_approach_the_closed_form(shape):
    mean, root = torch.randn(shape), torch.randn(*shape, 2) / 3
    covariance = root @ root.mT
    exact = Poisson().predictive(mean, covariance)
    predictive = PREDICTING.predictive(mean, covariance)
    assert predictive.batch_shape == shape[:-1]
    assert predictive.event_shape == (2,)
    torch.testing.assert_close(PREDICTING.expectation(mean, covariance), exact.mean, rtol=0.1, atol=0)
    torch.testing.assert_close(predictive.mean, exact.mean, rtol=0.1, atol=0)
    torch.testing.assert_close(predictive.variance, exact.variance, rtol=0.3, atol=0)
    close(PREDICTING.expectation(mean, covariance), PREDICTING.expectation(mean, covariance))


def test_predictions_without_uncertainty_are_exact():
    f, none = torch.randn(N, 2), torch.zeros(N, 2, 2)
    y = torch.tensor([[0.0, 2.0]]).expand(N, 2)
    close(PREDICTING.expectation(f, none), f.exp())
    close(PREDICTING.predictive(f, none).log_prob(y), PREDICTING.log_prob(f, y))


def test_predictions_see_the_correlation_of_outputs():
    """`E[exp(f_1 + f_2)] = exp(v)` with `v = Var[f_1 + f_2]/2`, 1.8 or 0.2 by the sign of the correlation."""
    own = FromLogProb(student, inverse_link_fn=lambda f: f.sum(-1, keepdim=True).exp(), samples=20_000)
    for r in (0.8, -0.8):
        covariance = torch.tensor([[[1.0, r], [r, 1.0]]])
        expected = torch.tensor([[1 + r]]).exp()
        torch.testing.assert_close(own.expectation(torch.zeros(1, 2), covariance), expected, rtol=0.15, atol=0)


# -- targets

F62 = torch.zeros(N, 6, 2)
IMAGE = torch.arange(N * 2 * 2 * 3.0).reshape(N, 2, 2, 3)
PLACED = {
    "labels of pixels": (torch.arange(N * 6).reshape(N, 2, 3), None, (N, 6)),
    "like the outputs": (IMAGE, None, (N, 6, 2)),
    "axis said": (IMAGE, 1, (N, 6, 2)),
    "a sequence": (torch.zeros(N, 6, 5), None, (N, 6, 5)),
}


@pytest.mark.parametrize("case", PLACED)
def test_targets_are_placed_like_the_outputs(case):
    y, axis, shape = PLACED[case]
    checked = FromLogProb(student).check(F62, y, axis)
    assert checked.shape == shape
    if y is IMAGE:
        assert torch.equal(checked, IMAGE.permute(0, 2, 3, 1).reshape(N, 6, 2))


@pytest.mark.parametrize("y", [torch.zeros(N, 5), torch.zeros(3, 6), torch.zeros(N)])
def test_targets_that_do_not_fit(y):
    with pytest.raises(ValueError, match="xpected"):
        FromLogProb(student).check(F62, y)


def test_targets_take_the_type_of_the_outputs():
    f = torch.zeros(N, 2, dtype=torch.float32)
    assert FromLogProb(student).check(f, torch.zeros(N, 7)).dtype == torch.float32
    assert FromLogProb(student).check(f, torch.zeros(N).long()).dtype == torch.long
