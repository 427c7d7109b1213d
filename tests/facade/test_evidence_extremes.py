"""Evidences of singular curvature under small priors, in single precision beside double, and their type."""

import copy

import pytest
import torch
from torch import nn

from lapkit import Laplace

SINGLE, DOUBLE = torch.float32, torch.float64


def network(kind):
    """With weights of single precision; tanh saturates for large inputs, so that eigenvalues decay."""
    torch.manual_seed(1)
    hidden = 20 if kind == "last_layer" else 6
    return nn.Sequential(nn.Linear(10, hidden), nn.Tanh(), nn.Linear(hidden, 4)).float()


def data(dtype, scale=1.0):
    generator = torch.Generator().manual_seed(2)
    x = scale * torch.randn(300, 10, generator=generator, dtype=SINGLE)
    y = torch.randint(4, (300,), generator=generator)
    return list(zip(x.to(dtype).split(40), y.split(40), strict=True))


def both(structure, subset, scale=1.0):
    model = network(subset)
    single = Laplace(model, "classification", subset, structure).fit(data(SINGLE, scale))
    double = Laplace(copy.deepcopy(model).double(), "classification", subset, structure).fit(data(DOUBLE, scale))
    return single, double


@pytest.mark.parametrize("structure", ["kron", "kron_reduce", "blockdiag", "full", "diag"])
def test_a_softmax_has_no_curvature_in_all_logits_together(structure):
    """A quarter of the last layer's eigenvalues are zero: in float32 their rounding was 0.2 nats at 1e-5, 40 at 1e-10.

    Some 1e-7 of each eigenvalue is left, and what float32 has of numbers around 1,000.
    """
    single, double = both(structure, "last_layer")
    for delta in (1.0, 1e-2, 1e-5, 1e-10):
        first, second = (float(single.log_marginal_likelihood(delta)) for _ in range(2))
        assert first == pytest.approx(float(double.log_marginal_likelihood(delta)), rel=1e-6, abs=1e-3)
        assert second == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("structure", ["kron", "blockdiag"])
def test_spectra_that_decay(structure, scale):
    """Down to 1e-8 of the curvature rounding decides nothing: errors were 7 nats at 1e-6, 0.3 at 1e-4."""
    single, double = both(structure, "all", scale)
    for delta in (10.0, 1.0, 1e-2, 1e-4, 1e-6):
        wanted = float(double.log_marginal_likelihood(delta))
        assert float(single.log_marginal_likelihood(delta)) == pytest.approx(wanted, rel=2e-6, abs=5e-3)


@pytest.mark.parametrize("structure", ["diag", "kron", "blockdiag", "full", "lowrank", "gp"])
def test_the_evidence_has_the_type_of_the_model(structure):
    single, double = both(structure, "last_layer")
    for la, dtype in ((single, SINGLE), (double, DOUBLE)):
        for prior in (0.7, torch.tensor(0.7, dtype=DOUBLE), torch.tensor([0.7, 0.3], dtype=DOUBLE), torch.tensor(2)):
            assert la.log_marginal_likelihood(prior).dtype == dtype
    noisy = Laplace(nn.Linear(2, 1).float(), "regression", "all", structure, sigma_noise=torch.tensor(0.3))
    noisy.fit([(torch.randn(5, 2, dtype=SINGLE), torch.randn(5, 1, dtype=SINGLE))])
    assert noisy.log_marginal_likelihood().dtype == SINGLE


@pytest.mark.parametrize("structure", ["full", "lowrank", "gp"])
def test_tensors_with_priors_far_apart(structure):
    """Against Kronecker-free algebra: of a full matrix in double precision, through its inverse elsewhere."""
    model = network("last_layer").double()
    la = Laplace(model, "classification", "last_layer", structure).fit(data(DOUBLE))
    near = la.log_marginal_likelihood(torch.tensor([1e-8, 1.0]))
    # With one prior much larger than all curvature, its weights are fixed: those of the other tensor are left.
    weight = Laplace(model, "classification", ["2.weight"], structure).fit(data(DOUBLE))
    bias = model[2].bias.detach().square().sum()
    for large in (1e8, 1e10, 1e12):
        wanted = weight.log_marginal_likelihood(1e-8) - large * bias / 2
        found = la.log_marginal_likelihood(torch.tensor([1e-8, large]))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e4 / large)
    assert torch.isfinite(near)


@pytest.mark.parametrize("start", [1e-6, 1.0, 1e6])
def test_tuning_from_any_start_ends_at_one_top(start):
    single, double = both("full", "last_layer")
    for la in (single, double):
        la.prior_precision = start
        found = la.optimize_prior_precision()
        assert found.converged
        assert found.evaluations < 12
        assert float(la.log_marginal_likelihood()) == pytest.approx(found.log_evidence, rel=1e-6)
    assert float(single.prior_precision) == pytest.approx(float(double.prior_precision), rel=1e-4)
