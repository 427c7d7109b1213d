"""What a notebook shows of results that are not printed, and what is said of those that nobody reads."""

import pytest
import torch
from dense_laplace import problem

from lapkit import Laplace
from lapkit.comparison import compare
from lapkit.curvature import Bernoulli
from lapkit.estimators import LaplaceClassifier, LaplaceRegressor
from lapkit.marglik import marglik_training


def fitted(structure="kron"):
    case = problem("classification")
    return Laplace(case.fresh, "classification", "all", structure).fit(case.data)


def test_results_are_a_line_or_a_table():
    la = fitted()
    scalar = la.optimize_prior_precision()
    evidence = float(la.log_marginal_likelihood())
    assert repr(scalar).startswith(
        f"Selection(prior precision {float(la.prior_precision):.4g}; log evidence {evidence:.6g}"
    )
    several = la.optimize_prior_precision(prior_structure="layerwise")
    low, high = la.prior_precision.min(), la.prior_precision.max()
    assert f"({len(la.prior_precision)} prior precisions, {low:.4g} to {high:.4g};" in repr(several)
    rows = sum(len(p) if p.ndim > 1 else 1 for p in la.model.parameters())
    assert f"({rows} prior precisions, " in repr(la.optimize_prior_precision(prior_structure="unit"))
    ranked = compare({"one": la, "two": fitted("diag")})
    assert repr(ranked) == str(ranked)
    assert "log evidence" in repr(ranked)


def test_a_training_is_told_in_a_line():
    case = problem("classification")
    found = marglik_training(case.fresh, case.data, "classification", n_epochs=2, hessian_structure="diag")
    assert repr(found).startswith(f"MarglikTraining(log evidence {max(found.log_evidences):.6g} after ")
    assert "of 2 epochs" in repr(found)


def test_a_search_that_did_not_end_says_so(monkeypatch):
    la, few = fitted(), {"prior_structure": "diag", "optimizer": "lbfgs", "n_steps": 2}
    assert not la.optimize_prior_precision(**few).converged  # as was to be expected of so few
    monkeypatch.setattr("lapkit.facade.tuning.STEPS", 2)
    la.prior_precision = 1.0
    with pytest.warns(UserWarning, match=r"a slope of .* nats is left.*n_steps=2"):
        la.optimize_prior_precision(**few)


def test_probabilities_for_a_binary_likelihood():
    f, y = torch.rand(16, 1), torch.ones(16, 1)
    with pytest.warns(UserWarning, match=r"leave out the last nn\.Sigmoid"):
        Bernoulli().check(f, y)
    Bernoulli().check(f[:15], y[:15])
    Bernoulli().check(f - 0.5, y)


def test_a_selection_of_many_names_is_counted():
    case = problem("classification")
    names = [name for name, _ in case.fresh.named_parameters()]
    assert f", {tuple(names[:3])!r}, " in repr(Laplace(case.fresh, "classification", names[:3]))
    la = Laplace(case.fresh, "classification", names)
    assert len(names) > 3
    assert f", {len(names)} names, GGNKronecker; not fitted)" in repr(la)
    assert la.subset_of_weights == tuple(names)
    assert ", 'last_layer', " in repr(Laplace(case.fresh, "classification"))


@pytest.mark.parametrize("wrong", ["hessian_structure", "prior_structure", "subset_of_weights"])
def test_estimators_read_their_settings_before_they_train(wrong, monkeypatch):
    monkeypatch.setattr("lapkit.estimator_base.train_map", lambda *given, **options: pytest.fail("It trained."))
    with pytest.raises(ValueError, match="no such thing"):
        LaplaceRegressor(**{wrong: "no such thing"}).fit(torch.randn(9, 2).numpy(), torch.randn(9).numpy())


def test_a_classifier_reads_its_link_before_it_trains(monkeypatch):
    monkeypatch.setattr("lapkit.estimator_base.train_map", lambda *given, **options: pytest.fail("It trained."))
    with pytest.raises(ValueError, match="Unknown link_approx 'foo'"):
        LaplaceClassifier(link_approx="foo").fit(torch.randn(9, 2).numpy(), torch.arange(9).numpy() % 3)
