"""EKFAC and the Gaussian process as structures of the facade."""

import pytest
import torch
from dense_laplace import problem, untouched
from torch.utils.data import DataLoader, TensorDataset

from lapkit import Laplace, curvature
from lapkit.posteriors import GaussianPrior

SUBSETS = {"all": None, "last_layer": ["4"], ("0.weight", "2"): ["0.weight", "2"]}
LIKELIHOODS = {"classification": curvature.Categorical(), "regression": curvature.Gaussian(0.6)}
KINDS = tuple(LIKELIHOODS)


def laplace(case, structure, subset="all", data=None, **options):
    noise = {"sigma_noise": 0.6} if case.kind == "regression" else {}
    options = {"prior_precision": 0.7} | noise | options
    return Laplace(case.model, case.kind, subset, structure, **options).fit(case.data if data is None else data)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("subset", SUBSETS)
def test_ekfac_is_that_of_the_engine(kind, subset):
    case = problem(kind)
    with untouched(case.model):
        la = laplace(case, "ekfac", subset)
    sums = curvature.ekfac(case.model, LIKELIHOODS[kind], case.data, parameters=SUBSETS[subset])
    H = sums.operator().to_dense() / (0.36 if kind == "regression" else 1)
    P = H + 0.7 * torch.eye(len(H))
    torch.testing.assert_close(la.posterior_precision.to_dense(), P, rtol=1e-9, atol=1e-10)
    names = case.subset(subset) if isinstance(subset, str) else ["0.weight", "2.weight", "2.bias"]
    torch.testing.assert_close(la.function_distribution(case.new_x).covariance, case.function_covariance(P, names))
    torch.testing.assert_close(la.log_det_posterior_precision, torch.logdet(P))
    exact = case.curvature("full", names).trace() / (0.36 if kind == "regression" else 1)
    torch.testing.assert_close(H.trace(), exact)  # each block has the trace of the exact one


def test_ekfac_is_nearer_to_the_blocks_than_kron():
    case = problem("classification")
    blocks = case.curvature("blockdiag")
    errors = [(laplace(case, structure).fitted.curvature.to_dense() - blocks).norm() for structure in ("ekfac", "kron")]
    assert errors[0] < errors[1]


def test_ekfac_needs_data_that_can_be_run_through_twice():
    case = problem("classification")
    with pytest.raises(TypeError, match="two passes over the data, and a list_iterator is used up"):
        laplace(case, "ekfac", data=iter(case.data))
    with pytest.raises(TypeError, match="two passes"):
        laplace(case, "ekfac", "last_layer", data=iter(case.data))
    loader = DataLoader(TensorDataset(case.x, case.y), batch_size=5, shuffle=True)
    one, two = laplace(case, "ekfac", "last_layer", data=loader), laplace(case, "ekfac", "last_layer")
    torch.testing.assert_close(one.log_marginal_likelihood(), two.log_marginal_likelihood())

    class Shrinking:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(case.data[: 3 - self.passes])

    with pytest.raises(ValueError, match="The first pass over the data saw 10 examples and the second 5"):
        laplace(case, "ekfac", data=Shrinking())


def test_monte_carlo_columns_are_the_same_in_both_passes():
    case = problem("classification")
    found = [laplace_with(case, torch.Generator().manual_seed(seed)).fitted.curvature.to_dense() for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    generator = torch.Generator().manual_seed(1)
    sums = curvature.ekfac(
        case.model, LIKELIHOODS["classification"], case.data, columns=curvature.MonteCarloGGN(), generator=generator
    )
    torch.testing.assert_close(found[0], sums.operator().to_dense())


def laplace_with(case, generator):
    return Laplace(case.model, case.kind, "all", "ekfac", curvature="mc").fit(case.data, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("subset", SUBSETS)
def test_the_gaussian_process_is_the_full_posterior(kind, subset):
    case = problem(kind)
    with untouched(case.model):
        gp = laplace(case, "gp", subset)
    full = laplace(case, "full", subset)
    torch.testing.assert_close(gp.log_marginal_likelihood(), full.log_marginal_likelihood())
    one, two = gp.function_distribution(case.new_x), full.function_distribution(case.new_x)
    torch.testing.assert_close(one.covariance, two.covariance, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(gp.optimize_prior_precision().log_evidence, full.optimize_prior_precision().log_evidence)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gaussian_process_is_that_of_gpytorch(kind):
    pytest.importorskip("gpytorch")
    from lapkit.posteriors.function_space import laplace_gp

    case = problem(kind)
    places = [0, 3, 4, 11]
    prior = GaussianPrior(0.7)
    process = laplace_gp(case.model, LIKELIHOODS[kind], case.data, prior, subset_of_data=places)
    gp = laplace(case, "gp", subset_of_data=places)
    torch.testing.assert_close(gp.log_marginal_likelihood(), process.log_marginal_likelihood().detach())
    covariance = process.functions(case.new_x).covariance.detach()
    torch.testing.assert_close(gp.function_distribution(case.new_x).covariance, covariance)


def test_a_subset_of_data_is_that_data_set():
    case = problem("regression")
    places = torch.tensor([12, 0, 7])
    few = laplace(case, "full", data=[(case.x[places], case.y[places])])
    gp = laplace(case, "gp", subset_of_data=places)
    torch.testing.assert_close(gp.log_marginal_likelihood(), few.log_marginal_likelihood())
    torch.testing.assert_close(gp(case.new_x)[1], few(case.new_x)[1], rtol=1e-8, atol=1e-10)
    drawn = [laplace_gp_of(case, seed) for seed in (0, 0, 1)]
    assert drawn[0].fitted.count == 6
    assert drawn[0].log_marginal_likelihood() == drawn[1].log_marginal_likelihood()
    assert drawn[0].log_marginal_likelihood() != drawn[2].log_marginal_likelihood()
    with pytest.raises(ValueError, match="belongs to 'gp' only"):
        laplace(case, "full", subset_of_data=3)


def laplace_gp_of(case, seed):
    la = Laplace(case.model, case.kind, "all", "gp", subset_of_data=6)
    return la.fit(case.data, generator=torch.Generator().manual_seed(seed))


def test_what_is_factored_never_exceeds_the_weights():
    """Else the cost would grow with the cube of the data, for the same posterior."""
    case = problem("classification")
    for structure, options in (("gp", {}), ("lowrank", {"space": "functions"})):
        gp, full = (laplace(case, of, ["4"], **more) for of, more in ((structure, options), ("full", {})))
        rows = sum(len(x) for x, _ in case.data) * case.new_x.new_tensor(gp.fitted.outputs)
        assert gp.fitted.curvature.rank <= gp.n_params < rows
        for precision in (1.0, torch.tensor([1e-4, 3.0])):
            gp.prior_precision = full.prior_precision = precision
            torch.testing.assert_close(gp.log_marginal_likelihood(), full.log_marginal_likelihood())
            torch.testing.assert_close(gp(case.new_x), full(case.new_x), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("structure", ["gp", "lowrank"])
def test_many_columns_are_said_to_take_long(structure, monkeypatch):
    monkeypatch.setattr("lapkit.facade.fitting.MANY", 20)
    case = problem("classification")
    with pytest.warns(UserWarning, match=r"\d+ columns.* factors a matrix of (\d+) x \1 .*subset_of_data=") as told:
        Laplace(case.model, case.kind, "all", structure).fit(case.data)
    assert [one.filename for one in told] == [__file__]
    Laplace(case.model, case.kind, "all", "gp", subset_of_data=5).fit(case.data)  # no warning, which is an error here
    Laplace(case.model, case.kind, "all", "full").fit(case.data)
