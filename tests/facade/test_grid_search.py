"""The prior precision by held-out data: scores are those of the predictive at each, and nothing else is touched."""

import warnings
from dataclasses import replace

import pytest
import torch
from dense_laplace import KINDS, problem, untouched
from torch import nn
from torch.distributions import Bernoulli, Categorical, MultivariateNormal

from lapkit import Laplace, curvature
from lapkit.grid_search import Grid, log_grid

STRUCTURES = ("diag", "kron", "blockdiag", "full", "lowrank")
BOUNDS = {"bounds": (1e-2, 1e3), "grid_size": 6}
SPLIT = [slice(0, 4), slice(4, 9)]


def held_out(kind, n=9):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 3, generator=generator)
    y = {
        "classification": torch.arange(n) % 3,
        "regression": torch.randn(n, 2, generator=generator),
        "binary": torch.randint(2, (n, 2), generator=generator) * 1.0,
    }[kind]
    return x, y


def batches(x, y):
    return [(x[part], y[part]) for part in SPLIT]


def fitted(kind="classification", structure="full", **options):
    case = problem(kind)
    noise = {"sigma_noise": 0.6} if kind == "regression" else {}
    return Laplace(case.fresh, kind, "all", structure, **noise, **options).fit(case.data)


def nll(la, kind, x, y):
    """By torch.distributions, at the present prior."""
    if kind == "regression":
        mean, covariance = la(x)
        return -MultivariateNormal(mean, covariance + 0.36 * torch.eye(2)).log_prob(y)
    p = la(x)
    return -(Categorical(p).log_prob(y) if kind == "classification" else Bernoulli(p).log_prob(y).sum(-1))


@pytest.mark.filterwarnings("ignore:The (smallest|largest) prior precision")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_scores_are_those_of_the_predictive_at_each_precision(kind, structure):
    la, (x, y) = fitted(kind, structure, temperature=1.2), held_out(kind)
    with untouched(la.model):
        found = la.optimize_prior_precision("gridsearch", val_loader=batches(x, y), **BOUNDS)
    chosen = float(la.prior_precision)
    torch.testing.assert_close(found.grid.precisions, torch.logspace(-2, 3, 6))
    scores = []
    for delta in found.grid.precisions:
        la.prior_precision = delta
        scores.append(nll(la, kind, x, y).mean())
    torch.testing.assert_close(found.grid.scores, torch.stack(scores))
    assert chosen == float(found.grid.precisions[torch.stack(scores).argmin()])
    assert found.grid.scores.max() - found.grid.scores.min() > 1e-3


def test_what_is_reported():
    la, (x, y) = fitted("regression"), held_out("regression")
    found = la.optimize_prior_precision("gridsearch", val_loader=batches(x, y), bounds=(1e-3, 1e5), grid_size=17)
    assert found.converged
    assert found.evaluations == 17
    assert found.prior is la.prior
    assert found.log_evidence == pytest.approx(float(la.log_marginal_likelihood()))
    P, delta = la.posterior_precision.to_dense(), float(la.prior_precision)
    H = P - delta * torch.eye(len(P))
    assert float(found.effective) == pytest.approx(float(torch.linalg.solve(P, H).trace()))
    assert la.prior_precision.shape == ()


def test_pieces_batches_and_weights():
    x, y = held_out("regression")
    whole = fitted("regression").optimize_prior_precision("gridsearch", val_loader=[(x, y)], bounds=(1e-3, 1e5))
    small = fitted("regression", memory_budget=3000)
    pieces = small.optimize_prior_precision("gridsearch", val_loader=[(x, y)], bounds=(1e-3, 1e5))
    torch.testing.assert_close(pieces.grid.scores, whole.grid.scores)
    weights = torch.tensor([2.0, 0, 1, 1, 3, 1, 0, 1, 1])
    places = torch.arange(9).repeat_interleave(weights.long())
    repeated = [(x[places], y[places])]
    one = fitted("regression").optimize_prior_precision("gridsearch", val_loader=repeated, bounds=(1e-3, 1e5))
    two = fitted("regression").optimize_prior_precision("gridsearch", val_loader=[(x, y, weights)], bounds=(1e-3, 1e5))
    torch.testing.assert_close(two.grid.scores, one.grid.scores)


@pytest.mark.filterwarnings("ignore:The (smallest|largest) prior precision")
def test_missing_targets_do_not_count():
    x, y = held_out("classification")
    la = fitted()
    known = la.optimize_prior_precision("gridsearch", val_loader=[(x[2:], y[2:])], **BOUNDS)
    holes = torch.cat([torch.full((2,), -100), y[2:]])
    found = la.optimize_prior_precision("gridsearch", val_loader=[(x, holes)], **BOUNDS)
    torch.testing.assert_close(found.grid.scores * 9, known.grid.scores * 7)


@pytest.mark.filterwarnings("ignore:The (smallest|largest) prior precision")
@pytest.mark.parametrize("link", ["mean_field", "mc", "qmc"])
def test_links(link):
    la, (x, y) = fitted(), held_out("classification")
    options = {"link_approx": link, "n_samples": 16}
    found = la.optimize_prior_precision(
        "gridsearch", val_loader=[(x, y)], generator=torch.Generator().manual_seed(1), **options, **BOUNDS
    )
    for delta, score in zip(found.grid.precisions, found.grid.scores, strict=True):
        la.prior_precision = delta
        p = la(x, generator=torch.Generator().manual_seed(1), **options)
        torch.testing.assert_close(score, -Categorical(p).log_prob(y).mean())


@pytest.mark.filterwarnings("ignore:The (smallest|largest) prior precision")
def test_a_loss_of_ones_own():
    la, (x, y) = fitted("regression"), held_out("regression")

    def crps_like(distribution, y):
        return (y - distribution.mean).abs().sum(-1) + distribution.variance.sum(-1).log()

    found = la.optimize_prior_precision("gridsearch", val_loader=batches(x, y), loss=crps_like, **BOUNDS)
    la.prior_precision = found.grid.precisions[2]
    torch.testing.assert_close(found.grid.scores[2], crps_like(la.predictive_distribution(x), y).mean())
    mean = la.optimize_prior_precision(
        "gridsearch", val_loader=batches(x, y), loss=lambda d, y: crps_like(d, y).mean(), **BOUNDS
    )
    torch.testing.assert_close(mean.grid.scores, found.grid.scores)


def test_a_loss_that_does_not_see_the_variance_is_refused():
    la, (x, y) = fitted("regression"), held_out("regression")
    before = la.prior
    with pytest.raises(ValueError, match="at every prior precision: it does not see"):
        la.optimize_prior_precision("gridsearch", val_loader=[(x, y)], loss=lambda d, y: (d.mean - y).square().sum(-1))
    assert la.prior is before


def test_a_result_prints_the_score_it_went_by():
    la, data = fitted(), batches(*held_out("classification"))
    with pytest.warns(UserWarning, match="smallest prior precision"):
        found = la.optimize_prior_precision("gridsearch", val_loader=data, **BOUNDS)
    told = f"Selection(prior precision 0.01; held-out loss {float(found.grid.scores[0]):.6g}; "
    assert repr(found) == told + "at the edge of a grid of 6)"
    assert repr(replace(found, converged=True)) == told + "inside a grid of 6)"


def test_the_edge_warns():
    la, (x, y) = fitted("regression"), held_out("regression")
    with pytest.warns(UserWarning, match=r"largest prior precision of the grid, 0\.01") as told:
        found = la.optimize_prior_precision("gridsearch", val_loader=[(x, y)], bounds=(1e-3, 1e-2), grid_size=3)
    assert not found.converged
    assert told[0].filename == __file__


def test_the_best_of_equal_scores_and_of_failures():
    p = torch.tensor([1.0, 2, 3, 4])
    assert Grid(p, torch.tensor([torch.inf, 1.0, 1.0, 2.0])).best == 2
    assert Grid(p, torch.tensor([torch.inf, torch.inf, 1.0, torch.inf])).best == 2
    with pytest.raises(ValueError, match="infinite or NaN at every"):
        _ = Grid(p, torch.full((4,), torch.inf)).best
    with pytest.raises(ValueError, match="does not see"):
        _ = Grid(p, torch.ones(4)).best


@pytest.mark.filterwarnings("ignore:The (smallest|largest) prior precision")
def test_precisions_at_which_the_factorisation_fails_are_passed_over():
    """In single precision a tiny prior leaves an indefinite matrix."""
    torch.manual_seed(0)
    model, x = nn.Linear(40, 2).float(), 1e3 * torch.randn(6, 40, dtype=torch.float32)
    y = model(x).detach() + torch.randn(6, 2, dtype=torch.float32)
    la = Laplace(model, "regression", "all", "full").fit([(x, y)])
    found = la.optimize_prior_precision("gridsearch", val_loader=[(x, y)], bounds=(1e-6, 1e8), grid_size=15)
    assert torch.isinf(found.grid.scores[0])
    assert torch.isfinite(la(x)[1]).all()


@pytest.mark.filterwarnings("ignore:The (smallest|largest) prior precision")
def test_other_likelihoods():
    case = problem("regression")
    x, y = held_out("regression")
    for likelihood, targets in (
        (curvature.PerOutputGaussian(torch.tensor([0.5, 2.0])), y),
        (curvature.HeteroscedasticGaussian(), y[:, :1]),
        (curvature.Poisson(), torch.ones(9, 2)),
    ):
        data = case.y[:, :1] if targets.shape[1] == 1 else case.y.abs().round()
        la = Laplace(case.fresh, likelihood, "all", "diag").fit([(case.x, data)])
        grid = {"bounds": (1e-3, 1e6), "grid_size": 4, "val_loader": [(x, targets)]}
        found = la.optimize_prior_precision("gridsearch", loss=lambda d, y: -d.log_prob(y), **grid)
        again = la.optimize_prior_precision("gridsearch", **grid)
        torch.testing.assert_close(found.grid.scores, again.grid.scores)


def test_refusals():
    la, (x, y) = fitted(), held_out("classification")
    with pytest.raises(ValueError, match="needs val_loader="):
        la.optimize_prior_precision("gridsearch")
    with pytest.raises(ValueError, match="prior_structure='scalar'"):
        la.optimize_prior_precision("gridsearch", "diag", val_loader=[(x, y)])
    with pytest.raises(ValueError, match="belong to method='gridsearch'"):
        la.optimize_prior_precision(val_loader=[(x, y)])
    with pytest.raises(ValueError, match="no validation data"):
        la.optimize_prior_precision("gridsearch", val_loader=[])
    with pytest.raises(ValueError, match="positive ascending bounds"):
        log_grid((1.0, 0.1), 5)
    with pytest.raises(ValueError, match="one target an example"):
        la.optimize_prior_precision("gridsearch", val_loader=[(x, y[:4])])


@pytest.mark.peer("laplace")
@pytest.mark.filterwarnings("ignore:The (smallest|largest) prior precision")
def test_laplace_torch_finds_the_same_precision_for_classes():
    from laplace import Laplace as Peer

    la, (x, y) = fitted("classification"), held_out("classification")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=9)
    case = problem("classification")
    peer = Peer(case.fresh, "classification", "all", "full")
    peer.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(case.x, case.y), batch_size=5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer.optimize_prior_precision(
            method="gridsearch", val_loader=loader, grid_size=9, log_prior_prec_min=-2, log_prior_prec_max=2
        )
    la.optimize_prior_precision("gridsearch", val_loader=loader, bounds=(1e-2, 1e2), grid_size=9)
    assert float(la.prior_precision) == pytest.approx(float(peer.prior_precision))


@pytest.mark.parametrize("progress_bar", [True, False])
def test_held_out_data_are_batches(progress_bar):
    case = problem("regression")
    la = Laplace(case.model, "regression").fit(case.data)
    x, y = case.data[0][:2]
    for bad in (torch.utils.data.TensorDataset(x, y), (x, y), lambda: case.data):
        with pytest.raises(TypeError, match="expected"):
            la.optimize_prior_precision("gridsearch", val_loader=bad, progress_bar=progress_bar)
