"""Scikit-learn estimators: scikit-learn's own checks, and what they add to a network and a `Laplace`."""

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator
from torch import nn

from lapkit import Laplace
from lapkit.curvature import Categorical, Gaussian
from lapkit.estimators import LaplaceClassifier, LaplaceRegressor
from lapkit.posteriors import GaussianPrior
from lapkit.training import train_map

CHECKS = [
    pytest.param(estimator, check, id=f"{type(estimator).__name__}-{check.func.__name__}")
    for base in (LaplaceClassifier(max_iter=100), LaplaceRegressor(max_iter=100))
    for estimator, check in estimator_checks_generator(base, legacy=True)
]


@pytest.mark.parametrize(("estimator", "check"), CHECKS)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning", "ignore:The evidence is largest")
def test_scikit_learns_own_checks(estimator, check):
    check(copy.deepcopy(estimator))


def scaled(estimator):
    return make_pipeline(StandardScaler(), estimator)


def test_classification_of_wines():
    X, y = load_wine(return_X_y=True)
    assert cross_val_score(scaled(LaplaceClassifier(random_state=0)), X, y, cv=3).min() > 0.93
    model = scaled(LaplaceClassifier(random_state=0)).fit(X, np.array(["a", "b", "c"])[y])
    assert set(model.predict(X)) <= {"a", "b", "c"}


def test_away_from_the_data_a_network_of_relus_is_less_sure():
    X, y = load_wine(return_X_y=True)
    model = scaled(LaplaceClassifier(activation="relu", random_state=0)).fit(X, y)
    shift = 1e3 * X.std(0) * np.random.default_rng(0).choice([-1, 1], X.shape)
    plain = model[-1].module_(torch.as_tensor(model[0].transform(X + shift))).detach().softmax(-1)
    assert float(plain.max(-1).values.mean()) > 0.99
    assert model.predict_proba(X + shift).max(-1).mean() < 0.9


def test_a_grid_over_structures_and_a_pipeline():
    X, y = load_breast_cancer(return_X_y=True)
    grid = GridSearchCV(
        scaled(LaplaceClassifier(random_state=0, max_iter=30)),
        {"laplaceclassifier__hessian_structure": ["diag", "kron"]},
        scoring="neg_log_loss",
        cv=2,
    ).fit(X, y)
    assert grid.best_score_ > -0.15


def test_regression_of_diabetes_has_honest_error_bars():
    X, y = load_diabetes(return_X_y=True)
    train, test = np.arange(0, 300), np.arange(300, 442)
    model = scaled(LaplaceRegressor(random_state=0)).fit(X[train], y[train])
    mean, std = model.predict(X[test], return_std=True)
    assert mean.shape == std.shape == (142,)
    assert model.score(X[test], y[test]) > 0.4
    coverage = (np.abs(mean - y[test]) < 1.645 * std).mean()
    assert 0.82 < coverage < 0.97
    assert (std >= model[-1].sigma_noise_).all()


def test_several_targets_keep_their_columns_and_units():
    X = np.linspace(-1, 1, 60)[:, None]
    Y = np.stack([np.sin(3 * X[:, 0]), 1e3 * X[:, 0]], axis=1)
    model = LaplaceRegressor(random_state=0).fit(X, Y)
    mean, std = model.predict(X, return_std=True)
    np.testing.assert_allclose(mean, Y, atol=0.05 * Y.std(0).max())
    assert std.shape == Y.shape
    np.testing.assert_allclose(model.predict(X), mean, rtol=1e-10)


def test_std_is_that_of_the_predictive_distribution_in_units_of_y():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(50, 2))
    y = 40 * X[:, 0] + 7 + rng.normal(size=50)
    model = LaplaceRegressor(random_state=0).fit(X, y)
    predicted = model.laplace_.predictive_distribution(torch.as_tensor(X))
    mean, std = model.predict(X, return_std=True)
    np.testing.assert_allclose(mean, predicted.mean[:, 0].numpy() * y.std() + y.mean(), rtol=1e-10)
    np.testing.assert_allclose(std, predicted.variance[:, 0].sqrt().numpy() * y.std(), rtol=1e-10)


def test_a_trained_module_is_taken_as_it_is():
    X, y = load_wine(return_X_y=True)
    X = StandardScaler().fit_transform(X)
    own = LaplaceClassifier(random_state=0).fit(X, y)
    before = copy.deepcopy(own.module_.state_dict())
    given = LaplaceClassifier(own.module_, train=False).fit(X, y)
    assert given.module_ is own.module_
    for name, tensor in own.module_.state_dict().items():
        assert torch.equal(tensor, before[name])
    la = Laplace(own.module_, "classification", "all", "kron").fit([(torch.as_tensor(X), torch.as_tensor(y))])
    la.optimize_prior_precision()
    np.testing.assert_allclose(given.predict_proba(X), la(torch.as_tensor(X)).numpy(), atol=1e-6)


def test_a_given_module_is_copied_before_training():
    X, y = load_wine(return_X_y=True)
    net = nn.Sequential(nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 3))
    before = copy.deepcopy(net.state_dict())
    model = scaled(LaplaceClassifier(net, batch_size=32, max_iter=60, random_state=0)).fit(X, y)
    assert model.score(X, y) > 0.95
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_a_function_makes_the_module():
    X, y = load_wine(return_X_y=True)
    make = lambda inputs, outputs: nn.Linear(inputs, outputs).double()  # noqa: E731
    assert scaled(LaplaceClassifier(make, hessian_structure="full")).fit(X, y).score(X, y) > 0.95


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"activation": "sine"}, "Unknown activation"),
        ({"hidden_layer_sizes": (0,)}, "at least one"),
        ({"refits": -1}, "refits"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        LaplaceClassifier(**settings).fit(np.eye(4), [0, 1, 0, 1])


def test_torchs_own_random_numbers_stay_where_they_were():
    X, y = load_wine(return_X_y=True)
    before = torch.get_rng_state()
    LaplaceClassifier(random_state=0, max_iter=5, refits=0).fit(X, y)
    assert torch.equal(torch.get_rng_state(), before)


# -- MAP training


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(0.5)], ids=["classes", "regression"])
def test_training_ends_where_the_gradient_of_the_log_posterior_vanishes(likelihood):
    x = torch.randn(40, 3)
    y = torch.arange(40) % 3 if isinstance(likelihood, Categorical) else x.sin()
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).train()
    mean = torch.full((sum(p.numel() for p in model.parameters()),), 0.1)
    found = train_map(model, likelihood, x, y, GaussianPrior(0.7, mean), max_iter=2000, tolerance=1e-7)
    assert model.training
    assert found.converged
    weights = torch.cat([p.reshape(-1) for p in model.parameters()])
    loss = likelihood.precision * likelihood.loss(model(x), y).sum() + 0.7 * (weights - mean).square().sum() / 2
    assert float(loss.detach()) == pytest.approx(found.loss, rel=1e-12)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert max(float(g.abs().max()) for g in gradients) < 1e-5
    assert all(p.grad is None for p in model.parameters())


def test_a_linear_regression_has_its_closed_form():
    x, y = torch.randn(30, 4), torch.randn(30, 1)
    model = nn.Linear(4, 1, bias=False)
    train_map(model, Gaussian(0.5), x, y, GaussianPrior(3.0), max_iter=500, tolerance=1e-10)
    exact = torch.linalg.solve(x.T @ x / 0.25 + 3.0 * torch.eye(4), x.T @ y / 0.25)
    torch.testing.assert_close(model.weight.T, exact, rtol=1e-8, atol=1e-8)


def test_batches_approach_the_same_minimum():
    x, y = torch.randn(64, 4), torch.randn(64, 1)
    exact, stochastic = nn.Linear(4, 1), nn.Linear(4, 1)
    one = train_map(exact, Gaussian(), x, y, GaussianPrior(1.0))
    generator = torch.Generator().manual_seed(0)
    two = train_map(stochastic, Gaussian(), x, y, GaussianPrior(1.0), batch_size=16, max_iter=300, generator=generator)
    weights = torch.cat([p.detach().reshape(-1) for p in stochastic.parameters()])
    loss = float((Gaussian().loss(stochastic(x), y).sum() + weights.square().sum() / 2).detach())
    assert loss == pytest.approx(one.loss, rel=1e-3)
    assert two.steps <= 300


def test_what_training_refuses():
    model, x = nn.Linear(2, 1), torch.ones(4, 2)
    with pytest.raises(ValueError, match="positive"):
        train_map(model, Gaussian(), x, torch.ones(4, 1), GaussianPrior(), max_iter=0)
    with pytest.raises(ValueError, match="NaN and huge"):
        train_map(model, Gaussian(), x, torch.full((4, 1), 1e200), GaussianPrior())
    with pytest.raises(ValueError, match="inputs hold NaN"):
        train_map(model, Gaussian(), x * float("nan"), torch.ones(4, 1), GaussianPrior())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("label", "shown"), [(0.0, "0.0"), (3, "3"), ("cat", "'cat'")])
def test_a_single_class_is_refused_by_its_plain_name(label, shown):
    with pytest.raises(ValueError, match=rf"at least two classes, got 1 class: {shown}\.$"):
        LaplaceClassifier().fit([[1.0], [2.0]], [label, label])
