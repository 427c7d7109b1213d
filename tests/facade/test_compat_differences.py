"""Where lapkit.compat.laplace differs from laplace-torch on purpose: docs/coming-from-laplace-torch.md, row by row."""

import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lapkit.compat.laplace import (
    ELLA,
    DiagLaplace,
    FullLaplace,
    FunctionalLaplace,
    KronLaplace,
    Laplace,
    LowRankLaplace,
    VaLLA,
    marglik_training,
)
from lapkit.compat.laplace.curvature import BackPackEF, CurvlinopsGGN, CurvlinopsHessian
from lapkit.curvature import EmpiricalFisher, MonteCarloGGN

X, KINDS = torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(12, 3), ("classification", "regression")


def targets(kind):
    return torch.arange(12) % 3 if kind == "classification" else X[:, :2].sin()


def problem(kind="classification", net=None):
    net = net or nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    if kind == "regression":
        net[-1] = nn.Linear(3, 2)
    return net, DataLoader(TensorDataset(X, targets(kind)), batch_size=5)


def fitted(cls, kind="classification", **options):
    net, loader = problem(kind)
    la = cls(net, kind, **options)
    la.fit(loader)
    return la


def test_the_page_names_tests_that_exist():
    root = Path(__file__).parents[2]
    page = (root / "docs" / "coming-from-laplace-torch.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    here = "".join(path.read_text() for path in (root / "tests" / "facade").glob("test_*.py"))
    assert len(named) > 20
    assert not [name for name in named if f"def {name}(" not in here]


def test_the_network_is_left_alone():
    net, loader = problem()
    net.train()
    net(X).sum().backward()
    before = [p.grad.clone() for p in net.parameters()]
    la = FullLaplace(net, "classification")
    la.fit(loader)
    la(X, pred_type="nn", link_approx="mc", n_samples=3)
    assert net.training
    assert la.model is net
    assert "output_size" not in vars(net)
    assert all(torch.equal(p.grad, old) for p, old in zip(net.parameters(), before, strict=True))
    assert torch.equal(torch.nn.utils.parameters_to_vector(net.parameters()), la.mean)


def test_the_generator_is_the_only_source_of_randomness():
    la = fitted(DiagLaplace)
    for pred_type in ("glm", "nn"):
        one, two = (
            la(X, pred_type=pred_type, link_approx="mc", generator=torch.Generator().manual_seed(1)) for _ in range(2)
        )
        assert torch.equal(one, two)


def test_examples_are_counted_not_the_data_set():
    net, _ = problem()
    loader = DataLoader(TensorDataset(X, targets("classification")), batch_size=5, drop_last=True)
    la = KronLaplace(net, "classification")
    la.fit(loader)
    assert la.n_data == 10
    la.fit(list(loader))  # a list of batches has no data set
    assert la.n_data == 10


def test_evidence_is_differentiable_in_the_noise():
    la = fitted(KronLaplace, "regression", sigma_noise=0.5)
    noise = torch.tensor(0.5, requires_grad=True)
    (slope,) = torch.autograd.grad(la.log_marginal_likelihood(sigma_noise=noise), noise)
    up, down = (float(la.log_marginal_likelihood(sigma_noise=torch.tensor(0.5 + h))) for h in (1e-5, -1e-5))
    assert math.isclose(float(slope), (up - down) / 2e-5, rel_tol=1e-6)


def test_functions_are_drawn_independently_between_inputs():
    la = fitted(FullLaplace, "regression")
    draws = la.functional_samples(X[:2], n_samples=4000, generator=torch.Generator().manual_seed(0))
    assert draws.shape == (4000, 2, 2)
    both = torch.corrcoef(draws[:, :, 0].T)[0, 1]
    assert abs(float(both)) < 0.06
    joint = la.laplace.functional_samples(X[:2], 4000, torch.Generator().manual_seed(0), joint=True)[:, :, 0]
    _, covariance = la(X[:2], joint=True)
    true = covariance[0, 2] / (covariance[0, 0] * covariance[2, 2]).sqrt()
    assert abs(float(torch.corrcoef(joint.T)[0, 1] - true)) < 0.06


def test_a_prior_may_have_any_structure_on_any_weights():
    for cls, structure in ((KronLaplace, "diag"), (DiagLaplace, "layerwise"), (FullLaplace, "diag")):
        la = fitted(cls)
        la.optimize_prior_precision(prior_structure=structure)
        assert len(la.prior_precision) == (la.n_params if structure == "diag" else la.n_layers)
    net, loader = problem()
    la = Laplace(net, "classification", "subnetwork", "diag", subnetwork_indices=torch.tensor([0, 3, 20]))
    la.fit(loader)
    la.optimize_prior_precision(prior_structure="diag")
    assert la.prior_precision.shape == (3,)
    assert la.log_prob(la.mean_subnet).ndim == 0


@pytest.mark.filterwarnings("ignore:The (smallest|largest) prior precision of the grid:UserWarning")
def test_a_grid_search_scores_each_precision_by_itself():
    """The reference never resets its default metric, so that it minimises a running mean over the grid."""
    la, x = fitted(KronLaplace), X.flip(0) * 3
    y = la.model(X).argmax(1).flip(0)
    y[::4] = 2 - y[::4]
    la.optimize_prior_precision(method="gridsearch", val_loader=[(x, y)], grid_size=17)
    best, scores = float(la.prior_precision), {}
    for precision in torch.logspace(-4, 4, 17):
        la.prior_precision = precision
        scores[float(precision)] = float(-la(x)[torch.arange(12), y].log().sum())
    assert math.isclose(best, min(scores, key=scores.get), rel_tol=1e-6)


@pytest.mark.filterwarnings("ignore:The (smallest|largest) prior precision of the grid:UserWarning")
def test_a_grid_search_sees_the_variance_or_refuses():
    la = fitted(DiagLaplace, "regression", sigma_noise=0.1)
    held_out = [(X[::2] + 0.2, targets("regression")[::2])]
    la.optimize_prior_precision(method="gridsearch", val_loader=held_out)  # the negative log likelihood
    with pytest.raises(ValueError, match="does not see the predictive variance"):
        la.optimize_prior_precision(
            method="gridsearch", val_loader=held_out, loss=lambda mean, variance, y: (mean - y).square().mean()
        )
    with pytest.raises(ValueError, match="held-out"):
        la.optimize_prior_precision(method="gridsearch")
    with pytest.raises(ValueError, match="linearised"):
        la.optimize_prior_precision("nn", "gridsearch", val_loader=held_out)


def test_a_last_layer_may_be_named():
    net, loader = problem()
    la = Laplace(net, "classification", last_layer_name="2")
    assert la.n_params == 15  # known before the fit
    la.fit(loader)
    assert la.mean.shape == (15,)


def test_optimisation_ends_at_the_maximum():
    la = fitted(KronLaplace)
    la.optimize_prior_precision()
    best = float(la.log_marginal_likelihood())
    here = float(la.prior_precision)
    for other in (0.9 * here, 1.1 * here):
        assert float(la.laplace.log_marginal_likelihood(other)) < best


def test_empirical_fisher_of_a_regression_is_that_of_its_likelihood():
    """Noise 0.5: gradients of log p scale with 4, their outer products with 16; the reference has 2 * 4."""
    la = fitted(FullLaplace, "regression", sigma_noise=0.5, prior_precision=1.0, backend=BackPackEF)
    rows = []
    for x, y in zip(X, targets("regression"), strict=True):
        loss = ((la.model(x) - y).square().sum() / 2) / 0.25
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(la.model.parameters()))]))
    expected = torch.stack(rows).T @ torch.stack(rows) + torch.eye(la.n_params)
    torch.testing.assert_close(la.posterior_precision, expected)


def test_frozen_biases_keep_their_partners():
    net, loader = problem()
    for name, p in net.named_parameters():
        p.requires_grad_("bias" not in name)
    la = KronLaplace(net, "classification")
    la.fit(loader)
    assert la.n_params == 12 + 12 + 9 == la.posterior_precision.to_matrix().shape[0]
    assert la(X).shape == (12, 3)


def test_dead_units_and_a_missing_bias_give_no_error():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3, bias=False))
    net[0].bias.data.fill_(-100.0)
    la = FullLaplace(net, "classification")
    la.fit(problem(net=net)[1])
    torch.testing.assert_close(la(X, link_approx="mc").sum(-1), torch.ones(12))


def test_data_in_function_space_count_once():
    la = fitted(FunctionalLaplace, n_subset=12)
    full = FullLaplace(la.model, "classification")
    full.fit(problem()[1])
    torch.testing.assert_close(la.log_marginal_likelihood(), full.log_marginal_likelihood())
    torch.testing.assert_close(la.predictive_moments(X)[1], full._glm_predictive_distribution(X)[1])
    torch.testing.assert_close(la(X, pred_type="gp"), full(X))
    few = FunctionalLaplace(la.model, "classification", 5, seed=3)
    few.fit(problem()[1])
    assert few.n_data == 5


def test_low_rank_is_the_full_matrix():
    low, loader = fitted(LowRankLaplace), problem()[1]
    full = FullLaplace(low.model, "classification")
    full.fit(loader)
    torch.testing.assert_close(low.posterior_precision.to_dense(), full.posterior_precision)
    torch.testing.assert_close(low.log_marginal_likelihood(), full.log_marginal_likelihood())


def test_more_data_come_to_a_fit():
    net, _ = problem()
    y = targets("classification")
    for structure in ("full", "kron", "diag"):
        for subset in ("all", "last_layer"):
            one, two = (Laplace(net, "classification", subset, structure) for _ in range(2))
            one.fit([(X, y)])
            two.fit([(X[:5], y[:5])])
            two.fit([(X[5:], y[5:])], override=False)
            torch.testing.assert_close(one.log_marginal_likelihood(), two.log_marginal_likelihood())


def test_a_state_is_plain_and_belongs_to_its_class(tmp_path):
    la = fitted(KronLaplace, prior_precision=2.0)
    torch.save(la.state_dict(), tmp_path / "la.pt")
    state = torch.load(tmp_path / "la.pt", weights_only=True)
    other = KronLaplace(la.model, "classification")
    other.load_state_dict(state)
    torch.testing.assert_close(other(X), la(X))
    with pytest.raises(ValueError, match="KronLaplace"):
        DiagLaplace(la.model, "classification").load_state_dict(state)
    with pytest.raises(ValueError, match="likelihood 'classification' was given"):
        KronLaplace(la.model, "regression").load_state_dict(state)
    with pytest.raises(ValueError, match="of laplace-torch"):
        DiagLaplace(la.model, "classification").load_state_dict({"cls_name": "DiagLaplace", "H": torch.ones(3)})


def test_training_with_the_evidence():
    net, loader = problem("regression")
    la, model, margliks, losses = marglik_training(
        net, loader, "regression", "kron", CurvlinopsGGN, n_epochs=12, n_epochs_burnin=4, marglik_frequency=4
    )
    assert model is net is la.model
    assert isinstance(la, KronLaplace)
    assert len(losses) == 12
    assert len(margliks) == 2  # one for each evaluation, not for each step within
    assert math.isclose(float(-la.log_marginal_likelihood()), min(margliks), rel_tol=1e-9)
    with pytest.warns(UserWarning, match="weight_decay"):
        marglik_training(net, loader, "regression", optimizer_kwargs={"weight_decay": 0.1}, n_epochs=1)
    with pytest.warns(UserWarning, match="lr_hyp"):
        marglik_training(net, loader, "regression", lr_hyp=0.5, n_epochs=1)


def test_dead_options_say_so():
    net, _ = problem()
    with pytest.warns(UserWarning, match="damping") as heard:
        KronLaplace(net, "classification", damping=True)
    assert heard[0].filename == __file__
    with pytest.warns(UserWarning, match="feature_reduction"):
        Laplace(net, "classification", feature_reduction="pick_last")
    la = fitted(DiagLaplace)
    with pytest.warns(UserWarning, match="lr is not read"):
        la.optimize_prior_precision(lr=0.5)
    with pytest.warns(UserWarning, match="val_loader"):
        la.optimize_prior_precision(val_loader=[(X, targets("classification"))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none of the reference's warnings for things that are right
        la.optimize_prior_precision()


def test_backends_say_which_curvature():
    net, _ = problem()
    sampled = {"stochastic": True, "num_samples": 3}
    la = Laplace(net, "classification", "all", "kron", backend=CurvlinopsGGN, backend_kwargs=sampled)
    assert la.laplace.columns == MonteCarloGGN(3)
    assert DiagLaplace(net, "classification", backend=BackPackEF).laplace.columns == EmpiricalFisher()


REFUSED = [
    (lambda net: Laplace(net, "poisson"), ValueError, "Choose one of 'regression'"),
    (lambda net: Laplace(net, "classification", "last_layer", "lowrank"), ValueError, "no class"),
    (lambda net: Laplace(net, "classification", "all", "gp", functional_approximation="nystrom"), ValueError, "ELLA"),
    (lambda net: ELLA(net, "classification", 10, 5), ValueError, "variance outside"),
    (lambda net: VaLLA(net, "classification", "random"), ValueError, "VaLLA"),
    (lambda net: DiagLaplace(net, "classification", backend=CurvlinopsHessian), ValueError, "negative eigenvalues"),
    (lambda net: DiagLaplace(net, "classification", backend=nn.Linear), TypeError, "none of lapkit.compat"),
    (lambda net: DiagLaplace(net, "classification", backend_kwargs={"foo": 1}), TypeError, "foo"),
    (lambda net: DiagLaplace(net, "classification", damping=True), TypeError, "unknown: .'damping'"),
    (lambda net: Laplace(net, "classification", "subnetwork", "full"), TypeError, "subnetwork_indices"),
    (
        lambda net: KronLaplace(net, "classification", asdl_fisher_kwargs={"kfac_approx": "reduce"}),
        ValueError,
        "reduce",
    ),
]


@pytest.mark.parametrize(("make", "error", "words"), REFUSED)
def test_what_is_not_offered_says_why(make, error, words):
    with pytest.raises(error, match=words):
        make(problem()[0])


def test_arguments_of_the_model_are_refused():
    with pytest.raises(TypeError, match="mask"):
        fitted(DiagLaplace)(X, mask=None)


def test_a_joint_distribution_of_classes_is_refused():
    with pytest.raises(ValueError, match="joint"):
        fitted(DiagLaplace)(X, joint=True)


def test_half_precision_has_kronecker_factors():
    net, _ = problem()
    la = KronLaplace(net.bfloat16(), "classification")
    la.fit([(X.bfloat16(), targets("classification"))])
    assert torch.isfinite(la.log_marginal_likelihood())
    assert (la(X.bfloat16()).sum(-1) - 1).abs().max() < 0.02
