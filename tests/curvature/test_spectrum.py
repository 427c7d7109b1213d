"""Eigenpairs, spectral densities and determinants from products alone, against dense decompositions."""

import math

import pytest
import reference_problem as ref
import torch

from lapkit.curvature import (
    Categorical,
    Dense,
    Diagonal,
    GGNProduct,
    HessianProduct,
    largest_eigenpairs,
    smallest_eigenpairs,
    spectral_density,
)
from lapkit.curvature.products.estimators import rademacher
from lapkit.curvature.products.quadrature import lanczos

DATA = [(ref.inputs()[:2], ref.labels()[:2]), (ref.inputs()[2:], ref.labels()[2:])]
ENDS = {"largest": largest_eigenpairs, "smallest": smallest_eigenpairs}


def product(kind):
    return kind(ref.model(), Categorical(), DATA)


def symmetric(size, positive=False):
    matrix = torch.randn(size, size)
    return matrix @ matrix.T / size if positive else (matrix + matrix.T) / 2


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_golden_eigenvalues():
    top = largest_eigenpairs(product(GGNProduct), 5).values / ref.EXAMPLES
    assert top.tolist() == pytest.approx(ref.GGN_MEAN_TOP_EIGENVALUES, rel=1e-9, abs=1e-10)
    hessian = product(HessianProduct)
    ends = [float(find(hessian).values) / ref.EXAMPLES for find in (smallest_eigenpairs, largest_eigenpairs)]
    assert ends == pytest.approx(ref.HESSIAN_MEAN_EXTREME_EIGENVALUES, rel=1e-9)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(("size", "k"), [(1, 1), (5, 5), (20, 3), (60, 4), (60, 40), (100, 1)])
def test_eigenpairs(end, size, k):
    """Small matrices are formed, large ones are not."""
    matrix = symmetric(size)
    pairs = ENDS[end](Dense(matrix), k)
    expected = torch.linalg.eigvalsh(matrix)
    torch.testing.assert_close(pairs.values, expected.flip(0)[:k] if end == "largest" else expected[:k])
    torch.testing.assert_close(pairs.vectors.T @ pairs.vectors, torch.eye(k), rtol=0, atol=1e-9)
    torch.testing.assert_close(matrix @ pairs.vectors, pairs.vectors * pairs.values, rtol=0, atol=1e-7)
    assert (pairs.residuals < 1e-7).all()


def test_repeated_eigenvalues():
    values = torch.cat([torch.full((3,), 5.0), torch.linspace(0, 1, 60)])
    assert largest_eigenpairs(Diagonal(values), 4).values.tolist() == pytest.approx([5, 5, 5, 1])


def test_single_precision():
    matrix = symmetric(80)
    pairs = largest_eigenpairs(Dense(matrix.float()), 3)
    assert pairs.vectors.dtype == torch.float32
    torch.testing.assert_close(pairs.values, torch.linalg.eigvalsh(matrix).flip(0)[:3], rtol=1e-5, atol=0)
    assert (pairs.residuals < 1e-4).all()


def test_seeded_start():
    matrix = Dense(symmetric(60))
    torch.manual_seed(1)
    one = largest_eigenpairs(matrix, 2, generator=generator())
    torch.manual_seed(2)
    assert torch.equal(largest_eigenpairs(matrix, 2, generator=generator()).vectors, one.vectors)


def test_no_convergence_is_an_error():
    values = 1 + 1e-7 * torch.arange(2000.0)
    with pytest.raises(RuntimeError, match="converged"):
        largest_eigenpairs(Diagonal(values), 4, max_products=40)
    coarse = largest_eigenpairs(Diagonal(values), 4, tolerance=1e-3)
    assert coarse.values.tolist() == pytest.approx([1] * 4, rel=1e-3)


@pytest.mark.parametrize("k", [0, 7])
def test_impossible_numbers(k):
    with pytest.raises(ValueError, match="eigenpairs"):
        largest_eigenpairs(Dense(symmetric(6)), k)


def test_lanczos_matrices():
    """T = Q^T A Q has A's moments as the start vector sees them, and its eigenvalues after P steps."""
    matrix = symmetric(12)
    start = torch.randn(12, 3)
    for steps in (1, 4, 12):
        t = lanczos(Dense(matrix), start, steps)
        assert t.shape == (3, steps, steps)
        for degree in range(2 * steps):
            inside = torch.linalg.matrix_power(t, degree)[:, 0, 0]
            outside = (start * (torch.linalg.matrix_power(matrix, degree) @ start)).sum(0) / start.square().sum(0)
            torch.testing.assert_close(inside, outside, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(torch.linalg.eigvalsh(t), torch.linalg.eigvalsh(matrix).expand(3, 12))


def test_lanczos_stops_where_the_space_is_exhausted():
    root = torch.randn(30, 3)
    low = Dense(root @ root.T)
    density = spectral_density(low, probes=4, steps=20)
    nonzero = density.nodes[density.weights > 1e-10]
    expected = torch.cat([torch.zeros(1), torch.linalg.eigvalsh(root.T @ root)])
    assert ((nonzero[:, None] - expected).abs().min(1).values < 1e-8).all()
    torch.testing.assert_close(density.weights.sum(1), torch.ones(4))
    zero = spectral_density(Diagonal(torch.zeros(30)), probes=2, steps=5)
    assert float(zero.logdet(2.0).value) == pytest.approx(30 * math.log(2))


def exact(matrix, f):
    return float(f(torch.linalg.eigvalsh(matrix)).sum())


def test_quadrature_is_exact_for_each_vector():
    """`z^T log(A + shift) z` of the very vectors that were drawn."""
    matrix, shift = symmetric(25, positive=True), 0.3
    density = spectral_density(Dense(matrix), probes=6, steps=25, generator=generator())
    z = rademacher(Dense(matrix), 6, generator())
    values, vectors = torch.linalg.eigh(matrix)
    samples = ((vectors.T @ z).square() * (values + shift).log()[:, None]).sum(0)
    estimate = density.logdet(shift)
    torch.testing.assert_close(estimate.value, samples.mean())
    torch.testing.assert_close(estimate.standard_error, samples.std() / 6**0.5)
    assert estimate.products == 150


def test_estimates_of_the_reference_problem():
    ggn = product(GGNProduct)
    dense = ggn.to_dense()
    density = spectral_density(ggn, probes=200, steps=15, generator=generator())
    for estimate, f in (
        (density.logdet(0.5), lambda e: (e + 0.5).log()),
        (density.logdet(10.0), lambda e: (e + 10).log()),
        (density.effective_dimension(0.5), lambda e: e / (e + 0.5)),
        (density.trace_of(lambda e: e), lambda e: e),
    ):
        assert estimate.standard_error > 0
        assert abs(float(estimate.value) - exact(dense, f)) < 4 * float(estimate.standard_error)
    assert float(density.logdet(1.0).value) == pytest.approx(ref.LOG_DET_PRECISION["full"], abs=3)


def test_standard_error_is_the_spread():
    matrix = Dense(symmetric(20, positive=True))
    estimates = [spectral_density(matrix, 10, 20, generator=generator(s)).logdet(0.1) for s in range(200)]
    values = torch.stack([e.value for e in estimates])
    errors = torch.stack([e.standard_error for e in estimates])
    assert float(errors.square().mean()) == pytest.approx(float(values.var()), rel=0.35)
    expected = exact(matrix.matrix, lambda e: (e + 0.1).log())
    assert abs(float(values.mean()) - expected) < 4 * float(values.std()) / 200**0.5


def test_chunks_and_precision():
    matrix = symmetric(30, positive=True)
    whole, parts = (
        spectral_density(Dense(matrix), 5, 10, memory_budget=budget, generator=generator()) for budget in (None, 1)
    )
    torch.testing.assert_close(parts.nodes, whole.nodes)
    single = spectral_density(Dense(matrix.float()), 5, 10, generator=generator())
    torch.testing.assert_close(single.logdet(0.5).value, whole.logdet(0.5).value, rtol=1e-4, atol=1e-4)


def test_density_integrates_to_one_and_has_its_mass_where_the_eigenvalues_are():
    density = spectral_density(Diagonal(torch.cat([torch.zeros(90), torch.full((10,), 3.0)])), probes=3, steps=5)
    grid = torch.linspace(-2, 5, 7001)
    values = density.density(grid, 0.1)
    assert float(values.sum()) * 1e-3 == pytest.approx(1, rel=1e-3)
    assert float(values[grid > 1.5].sum()) * 1e-3 == pytest.approx(0.1, rel=1e-3)


def test_indefinite_matrices_have_no_determinant():
    density = spectral_density(product(HessianProduct), 2, 30)
    with pytest.raises(ValueError, match="larger shift"):
        density.logdet(0.1)
    assert torch.isfinite(density.logdet(10.0).value)
    for shift in (0.0, -1.0):
        with pytest.raises(ValueError, match="positive"):
            density.effective_dimension(shift)
    with pytest.raises(ValueError, match="width"):
        density.density(torch.zeros(1), 0.0)
    with pytest.raises(ValueError, match="at least one"):
        spectral_density(Diagonal(torch.ones(3)), 0)
